"""``python -m hyperclone_onnx`` is the ``hyperclone-onnx`` command."""

from hyperclone_onnx.entry import main

main("hyperclone-onnx")
