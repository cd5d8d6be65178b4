"""Transforms the source graph before it grows.

In: the path of a source file, and the steps that a plan records. Out: the normalised and transformed graph. It computes
the same as the file, unless a step says that it does not.
"""
