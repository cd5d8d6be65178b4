"""Plans how a model grows.

In: the dimensions of a model and a request. Out: a plan.
"""
