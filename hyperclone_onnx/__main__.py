"""``python -m hyperclone_onnx`` is the ``hyperclone-onnx`` command."""

from hyperclone_onnx.cli import main

main(prog_name="hyperclone-onnx")
