"""Reading a model.

In: the path of an ONNX file. Out: a checked graph in one normal form, with its weights still on disk.
"""
