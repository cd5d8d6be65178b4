"""Computes grown tensors.

In: a source tensor and its recipe. Out: any slice of the grown tensor, computed from the source rows that it needs.
"""
