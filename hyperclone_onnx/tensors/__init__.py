"""Grown tensors.

In: a source tensor and its recipe. Out: any slice of the grown tensor, computed from a few source rows at a time.
"""
