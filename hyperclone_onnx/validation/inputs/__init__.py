"""Inputs on which a model runs.

In: the dimensions of a model, and what the user gives. Out: sets of inputs whose sizes fit together and whose values
make sense. The stages: `equations` (which sizes must agree), `sizes` (numbers for them), `uses` (what the graph does
with each input), `values` (arrays), `given` (arrays of the user's own), `search` (all of it, until the model runs).
"""
