"""Finding the dimensions of a model.

In: a normalised graph. Out: the axes of every value as dimensions, each with a role and a name.
"""
