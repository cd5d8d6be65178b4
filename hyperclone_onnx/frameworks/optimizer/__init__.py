"""Grow the state of an optimizer by the plan that grew its model.

In: AdamW's state of the small model, and the grown file with its plan. Out: a file with the grown state, and functions
that load the file into an optimizer of PyTorch or optax.
"""
