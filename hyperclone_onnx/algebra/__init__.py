"""Computes with sizes and dimensions.

In: the sizes of axes, and which axes are equal. Out: a description of every axis, and for each dimension that keeps its
size the reason. Nothing here knows ONNX.
"""
