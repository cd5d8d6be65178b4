"""The plan of a growth, as data.

In: what planning decided, or JSON. Out: frozen objects that say how each tensor, node, input and output changes.
Nothing here knows ONNX.
"""
