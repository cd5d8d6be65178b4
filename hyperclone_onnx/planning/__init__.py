"""Planning a growth.

In: the dimensions of a model and a request. Out: a plan.
"""
