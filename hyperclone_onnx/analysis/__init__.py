"""Finds the dimensions of a model.

In: a normalised graph. Out: the dimensions of the axes of all values, and the role and the name of every dimension.
"""
