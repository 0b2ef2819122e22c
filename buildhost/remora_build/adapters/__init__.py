"""PEFT adapters -> sidecars: what an adapter says, checked field by field, and its algebra."""
