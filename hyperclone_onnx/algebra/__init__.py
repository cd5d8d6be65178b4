"""Sizes, dimensions and their arithmetic.

In: lengths and descriptions of axes. Out: one description for each axis, and the reason why a dimension keeps its size.
Nothing here knows ONNX.
"""
