"""The plan of a growth, as data.

In: the decisions of planning, or JSON. Out: frozen objects that say how each tensor, node, input and output changes.
This package does not know ONNX.
"""
