"""Applies a plan to a graph.

In: the source graph and a plan. Out: the grown graph. Its tensors are computed when they are read.
"""
