"""From an ONNX graph to a program, and from a program to the source of a function in PyTorch or JAX."""
