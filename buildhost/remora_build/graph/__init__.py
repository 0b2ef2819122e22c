"""The portable graph: built with onnx_ir from a DecoderSpec, linted, its weights laid out in one
data file. docs/graph.md is the contract.
"""
