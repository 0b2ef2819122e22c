"""The adapter bank for ONNX decoders that Remora did not export (docs/insert-lora.md)."""
