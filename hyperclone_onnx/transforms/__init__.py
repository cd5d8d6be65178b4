"""Transforms of the source graph, which come before any growth.

In: the path of a source, and the steps that a plan records. Out: the normalised graph, transformed; it computes what
the file computes, unless a step says that it does not.
"""
