"""Bundles around engine folders that TensorRT Edge-LLM's own builder made."""
