"""Engines of the modules `tensorrt` and `tensorrt_rtx`: one implementation, the module a parameter.
Nothing here imports either, or CUDA, before it is asked to build or to load."""
