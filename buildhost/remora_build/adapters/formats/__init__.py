"""Adapters of other runtimes, read and written: TensorRT-LLM, TensorRT Edge-LLM."""
