"""Comparing a grown model with its source.

In: two models and a plan. Out: a report that says how far outputs and tensors differ, and whether that is rounding.
"""
