"""Checkpoints that a quantization tool has written: read as they are, code by code."""
