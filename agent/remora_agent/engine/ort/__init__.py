"""The ONNX Runtime engine: rewriting, building, running. Nothing outside imports its modules but
`engine.opening` and the build child."""
