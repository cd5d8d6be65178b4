"""Writes model files.

In: a graph, or tensors by name. Out: ONNX or safetensors files, written block by block.
"""
