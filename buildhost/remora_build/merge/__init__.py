"""PEFT adapters merged into a Hugging Face checkpoint, tensor by tensor, without torch."""
