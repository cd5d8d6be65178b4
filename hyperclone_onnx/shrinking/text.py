"""Makes inputs of a language model out of a text and a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.analysis.roles import source_input
from hyperclone_onnx.errors import BadRequest, Refused, first_line
from hyperclone_onnx.validation.inputs.given import Inputs
from hyperclone_onnx.validation.inputs.search import NoInputs, Wishes, find_inputs
from hyperclone_onnx.validation.inputs.sizes import Row
from hyperclone_onnx.validation.sessions import Device, Runner

Array = npt.NDArray[Any]

LENGTHS = ((8, 128), (8, 64), (4, 32), (1, 16))
"""The numbers of windows and of tokens in a window, in the order in which they are tried."""

ARRAYS = {".npz", ".npy", ".pb"}


def is_text(data: Inputs | None) -> bool:
    """Whether data are a text and no arrays."""
    if not isinstance(data, str | os.PathLike):
        return False
    path = Path(data)
    return path.is_file() and path.suffix not in ARRAYS


def inputs_from_text(
    analysis: Analysis, text: Path, tokenizer: Path | None, device: Device, dims: Mapping[str, int] | None = None
) -> dict[str, Array]:
    """Inputs of a model whose tokens are those of a text. All other inputs are as for random tokens.

    Args:
        analysis: the model.
        text: the file with the text, in UTF-8.
        tokenizer: a ``tokenizer.json``, or a folder that has one; by default the folder of the model.
        device: the device on which the model runs.
        dims: numbers for symbolic sizes, by name.

    Raises:
        BadRequest: there is no tokenizer, the text is too short, or the tokens are not those of this model.
        Refused: the model runs on no inputs.
    """
    table = _table(analysis)
    if table is None:
        raise BadRequest(
            f"--data {text}: the model indexes no table by an input, so that it reads no tokens: give arrays"
        )
    name, size = table
    tokens = _tokens(text, tokenizer or analysis.path.parent)
    if len(tokens) and int(tokens.max()) >= size:
        raise BadRequest(
            f"--data {text}: the tokenizer gives the token {int(tokens.max())}, and {name!r} indexes a table of {size} "
            "rows: it is the tokenizer of another model"
        )
    runner = Runner(analysis.path, device, isolated=True, model=analysis.model)
    rows = [Row((batch, *[length] * 8), empty_cache=True) for batch, length in LENGTHS]
    try:
        (accepted,) = find_inputs(analysis.dimensions, runner.run, Wishes(dims=dims or {}), 1, rows)
    except NoInputs as problem:
        raise Refused(f"{analysis.path}: {problem}") from problem
    feeds = dict(accepted.case.feeds)
    wanted = feeds[name].size
    if len(tokens) < wanted:
        raise BadRequest(f"--data {text}: it has {len(tokens)} tokens, and {wanted} are needed: give a longer text")
    feeds[name] = tokens[:wanted].reshape(feeds[name].shape).astype(feeds[name].dtype)
    return feeds


def _table(analysis: Analysis) -> tuple[str, int] | None:
    """The input that indexes the largest table, and the number of rows of that table."""
    dimensions = analysis.dimensions
    tables: list[tuple[int, ir.Value]] = []
    for indices, term in dimensions.index_tables:
        value, size = source_input(dimensions, indices), dimensions.space.static(term)
        if value is not None and size is not None:
            tables.append((size, value))
    if not tables:
        return None
    size, value = max(tables, key=lambda table: table[0])
    return value.name or "", size


def _tokens(text: Path, tokenizer: Path) -> Array:
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadRequest(f"--data {text}: no readable text in UTF-8 ({problem})") from problem
    if not file.is_file():
        raise BadRequest(f"--data {text}: no tokenizer: {file} is not there; name its folder with --tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError as problem:
        raise BadRequest(
            f"--data {text}: a text needs the package tokenizers: pip install 'hyperclone-onnx[hf]', or give arrays"
        ) from problem
    try:
        read: Any = Tokenizer.from_file(str(file))
    except Exception as problem:  # the package raises plain exceptions
        raise BadRequest(f"{file}: not a readable tokenizer ({first_line(problem)})") from problem
    return np.asarray(read.encode(content).ids, dtype=np.int64)
