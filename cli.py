"""Runs the command from a checkout: ``python cli.py expand model.onnx --factor 2 -o big.onnx``."""

from hyperclone_onnx.entry import main

if __name__ == "__main__":
    main()
