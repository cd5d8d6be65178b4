"""Finds inputs on which a model runs.

In: the dimensions of a model, and the user's own inputs. Out: sets of inputs whose sizes fit together and whose values
make sense. The stages: `equations` (which sizes must agree), `sizes` (numbers for these sizes), `uses` (what the graph
does with each input), `values` (arrays), `given` (the user's arrays), `search` (tries inputs until the model runs).
"""
