"""Forecasts the loss and the cost of a larger model from the loss curves of small ones.

In: curves of finished runs (CSV, JSON, the Trainer's logs, TensorBoard) and a target size. Out: a fitted scaling law
with its uncertainty, and the loss, tokens and FLOPs of the target from random weights and grown.
"""
