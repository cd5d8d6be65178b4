"""Finds the layers of a graph by its structure, and the numbers of layers in names.

In: a normalised graph. Out: its stacks of layers. The layers of a stack are alike, node by node.
"""
