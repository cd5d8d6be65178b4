"""Compile an ONNX graph to a program, and a program to the source of a function in PyTorch or JAX."""
