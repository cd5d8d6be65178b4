"""Runs models with ONNX Runtime: chooses the provider and its options, and shortens its messages."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest, Refused
from hyperclone_onnx.graphs import weight_bytes
from hyperclone_onnx.system import isolation

if TYPE_CHECKING:
    import onnxruntime

Device = Literal["auto", "cpu", "cuda"]
Array = npt.NDArray[Any]
_Feeds = dict[str, Array]

CUDA_OPTIONS: Mapping[str, str] = {"use_tf32": "0"}
"""TF32 rounds float32 products to 10 bits, so equal models would look different."""


def providers(device: Device, available: Sequence[str]) -> list[str | tuple[str, dict[str, str]]]:
    """The execution providers to request, the preferred one first.

    Raises:
        BadRequest: CUDA is requested, but this ONNX Runtime was not built with it.
    """
    cuda: tuple[str, dict[str, str]] = ("CUDAExecutionProvider", dict(CUDA_OPTIONS))
    has_cuda = "CUDAExecutionProvider" in available
    if device == "cuda" and not has_cuda:
        raise BadRequest(
            "--device cuda: this ONNX Runtime has no CUDA provider; pip install 'hyperclone-onnx[cuda]', or use "
            "--device cpu"
        )
    if device == "cpu" or not has_cuda:
        return ["CPUExecutionProvider"]
    return [cuda, "CPUExecutionProvider"]


PATIENCE = 300.0
"""The seconds that loading a model or running it on a few short inputs may take, without reading its weights."""

SLOW = 1e7
"""Bytes of weights per second that a busy machine with a slow disk reads and uses."""


class Runner:
    """A session on one model file.

    Args:
        path: the model file.
        device: where to run. "auto" uses the CPU if CUDA cannot start.
        graph: a serialised model to run instead of the one in the file, with the data files of the file.
        isolated: whether to run in a copy of this process, if possible: ONNX Runtime aborts on some graphs. We make no
            copy if this process already uses CUDA, because CUDA does not work in a copy.
        model: the model in the file, or the serialised one. A slow disk needs time to read its weights: an isolated run
            has `PATIENCE` seconds and that time, since a Loop may never end. If running changes the stored tensors
            (see `keeps_state`), each run has a new session.
        overrides: whether feeds take the place of defaults, where an input has one.
        frugal: whether memory that a node has freed goes back to the system at once. Runs take a little longer.

    Raises:
        BadRequest: CUDA was requested and cannot start.
        Refused: ONNX Runtime cannot load the model, or breaks down on it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: Device = "auto",
        graph: bytes | None = None,
        *,
        isolated: bool = False,
        model: ir.Model | None = None,
        overrides: bool = False,
        frugal: bool = False,
    ) -> None:
        import onnxruntime as ort

        wanted = providers(device, ort.get_available_providers())
        weights = 0 if model is None else weight_bytes(model)
        start = functools.partial(_started, ort, path, wanted, graph, model is not None and keeps_state(model), frugal)
        alone = isolated and isolation.POSSIBLE and (wanted == ["CPUExecutionProvider"] or not _has_cuda())
        try:
            self._ask: Callable[[_Feeds | None], Any] = (
                isolation.Isolated(start, PATIENCE + weights / SLOW) if alone else start()
            )
            self.provider, inputs, defaults, self.outputs = self._ask(None)
        except isolation.BrokenDown as problem:
            raise Refused(
                f"{path}: ONNX Runtime breaks down on it ({problem}); --no-validate grows a model without running it"
            ) from problem
        except Exception as problem:  # ONNX Runtime's exceptions share no base class
            raise Refused(f"{path}: ONNX Runtime cannot load it ({runtime_message(problem)})") from problem
        self.inputs = {*inputs, *(defaults if overrides else ())}
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise BadRequest(
                "--device cuda: the CUDA provider did not start (no GPU, or no CUDA 13 and cuDNN 9); "
                "pip install 'hyperclone-onnx[cuda]', or use --device cpu"
            )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model.

        Raises:
            RuntimeError: the model does not run on these inputs.
        """
        try:
            values = self._ask({name: a for name, a in feeds.items() if name in self.inputs})
        except isolation.BrokenDown as problem:
            raise RuntimeError(f"ONNX Runtime breaks down on it: {problem}") from problem
        except Exception as problem:  # ONNX Runtime's exceptions share no base class
            raise RuntimeError(runtime_message(problem)) from problem
        return {name: np.asarray(value) for name, value in zip(self.outputs, values, strict=True)}


_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_NODE = re.compile(r"Non-zero status code returned while running (\S+) node\. Name:'([^']*)' Status Message: ")
_SOURCE_LINE = re.compile(r"(?:\S*onnxruntime\S*|/\S+)\.(?:cc|cu|cuh|h|hpp):\d+ (?:.*?(?: was false\. | failed\. ))?")
LONGEST_MESSAGE = 300


def runtime_message(problem: object) -> str:
    r"""A message of ONNX Runtime in one line: the node and the reason, without codes and paths of its source.

    >>> runtime_message("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Add "
    ...     "node. Name:'/add' Status Message: /src/onnxruntime/core/x.h:5 void Init() largest was false. 7 by 9\n")
    "Add '/add': 7 by 9"
    """
    text = " ".join(str(problem).split())
    text = _SOURCE_LINE.sub("", _NODE.sub(r"\1 '\2': ", _STATUS.sub("", text))).strip()
    return text[:LONGEST_MESSAGE] if text else type(problem).__name__


def _has_cuda() -> bool:
    """Whether CUDA's driver is loaded in this process, or may be."""
    try:
        return "/libcuda.so" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def keeps_state(model: ir.Model) -> bool:
    """Whether a run of the model changes what the next run of the same session gives.

    ONNX Runtime writes the running mean and variance of a BatchNormalization in training mode over the stored tensors.
    """
    nodes = (node for node in model.graph.all_nodes() if node.op_type == "BatchNormalization")
    modes = (node.attributes.get("training_mode") for node in nodes)
    return any(mode is not None and mode.as_int() for mode in modes)


def _started(
    ort: Any,
    path: str | os.PathLike[str],
    wanted: Sequence[Any],
    graph: bytes | None,
    afresh: bool,
    frugal: bool,
) -> Callable[[_Feeds | None], Sequence[Any]]:
    """A session as a function: of feeds it returns outputs, of None its provider and the names.

    The names are those of the inputs, of the inputs that have a default, and of the outputs. With `afresh`, each run
    has a session of its own.
    """
    session = _session(ort, path, wanted, graph, frugal)

    def ask(feeds: _Feeds | None) -> Sequence[Any]:
        if feeds is not None:
            runs = _session(ort, path, wanted, graph, frugal) if afresh else session
            outputs: Sequence[Any] = runs.run(None, feeds)
            return outputs
        sides = (session.get_inputs(), session.get_overridable_initializers(), session.get_outputs())
        return session.get_providers()[0], *([value.name for value in side] for side in sides)

    return ask


def _session(
    ort: Any, path: str | os.PathLike[str], wanted: Sequence[Any], graph: bytes | None, frugal: bool
) -> onnxruntime.InferenceSession:
    options = ort.SessionOptions()
    # The runtime's own fusions have changed results before: compare the graphs as they are.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    # Otherwise ONNX Runtime copies the weights into another layout. Without copies, a session starts at once.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The search for a freed buffer of the right size takes time quadratic in the number of nodes: for thousands of them
    # most of the time of starting a session. Without it every buffer is freed after its last use all the same.
    options.enable_mem_reuse = False
    options.enable_cpu_mem_arena = not frugal
    ort.set_default_logger_severity(4)
    if graph is not None:
        folder = os.fspath(Path(path).resolve().parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return ort.InferenceSession(graph, options, providers=list(wanted))
    return ort.InferenceSession(os.fspath(path), options, providers=list(wanted))
