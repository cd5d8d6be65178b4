"""Names the formats that people take for ONNX, and says how each becomes ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_PYTORCH = (
    "a PyTorch checkpoint, which holds weights but no graph; build the model in Python, load the checkpoint, and write "
    "it with torch.onnx.export(model, inputs, 'model.onnx', dynamo=True)"
)
_SAFETENSORS = (
    "a safetensors file, which holds weights but no graph; export the model that it belongs to "
    "(of transformers: optimum-cli export onnx --model FOLDER OUT)"
)
_GGUF = (
    "a GGUF file of llama.cpp, which holds weights but no graph; export the original model "
    "with optimum-cli export onnx --model NAME OUT"
)
_TFLITE = "a TensorFlow Lite model; convert it with python -m tf2onnx.convert --tflite FILE --output model.onnx"
_CORE_ML = "a Core ML model; convert it with onnxmltools.convert_coreml, or export the original model to ONNX"
_KERAS = "a Keras model; convert it with tf2onnx.convert.from_keras(model, output_path='model.onnx')"
_TENSORFLOW = "a TensorFlow graph; convert it with python -m tf2onnx.convert --graphdef FILE --output model.onnx"

_BY_SUFFIX = {
    ".pt": _PYTORCH,
    ".pth": _PYTORCH,
    ".ckpt": _PYTORCH,
    ".bin": _PYTORCH,
    ".safetensors": _SAFETENSORS,
    ".gguf": _GGUF,
    ".tflite": _TFLITE,
    ".mlmodel": _CORE_ML,
    ".h5": _KERAS,
    ".keras": _KERAS,
    ".pb": _TENSORFLOW,
}

_BY_CONTENT: list[tuple[Callable[[bytes], bool], str]] = [
    (lambda head: head.startswith(b"GGUF"), _GGUF),
    (lambda head: head[4:8] == b"TFL3", _TFLITE),
    (lambda head: head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32, _SAFETENSORS),
    (lambda head: head.startswith((b"PK\x03\x04", b"\x80\x02")), _PYTORCH),
    (lambda head: head.startswith(b"\x89HDF"), _KERAS),
]


def foreign_format(file: Path) -> str | None:
    """The format of a file that is no ONNX model, and the way from it to ONNX. None if we do not know the format.

    >>> foreign_format(Path("model.gguf")).split(",")[0]  # its suffix tells, whether it exists or not
    'a GGUF file of llama.cpp'
    """
    if file.suffix.lower() in _BY_SUFFIX:
        return _BY_SUFFIX[file.suffix.lower()]
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
    except OSError:
        return None
    return next((text for is_so, text in _BY_CONTENT if is_so(head)), None)
