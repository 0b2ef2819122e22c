"""Reading a Hugging Face checkpoint directory: its tensors, and their bytes as a stream."""
