"""Growing a model that is several files: an encoder and a decoder, a decoder with and without its cache.

Each file grows by itself, by the same factors, and what one file makes another must still be able to read: the folder
appears only when every file is equal to its source and they fit together.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.analysis.roles import name_dimensions
from hyperclone_onnx.errors import BadModel, BadRequest, NothingGrows, Refused
from hyperclone_onnx.expansion import Expansion, expand
from hyperclone_onnx.progress import Notify, tell_nobody
from hyperclone_onnx.publishing.publication import publication_folder
from hyperclone_onnx.reading import loading


@dataclass
class FolderExpansion:
    """What growing a folder did; `models` by path within the folder."""

    source: str
    output: str
    models: dict[str, Expansion] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    """Models in which nothing can grow, copied as they are."""
    copied: list[str] = field(default_factory=list)
    """Files that are no models: a tokenizer, a configuration."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "source": self.source,
            "output": self.output,
            "models": {name: each.to_json() for name, each in self.models.items()},
            "unchanged": self.unchanged,
            "copied": self.copied,
        }


def expand_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    factor: int = 1,
    requests: Mapping[str, int] | None = None,
    *,
    exclude: Sequence[str] = (),
    notify: Notify | None = None,
    **options: Any,
) -> FolderExpansion:
    """Grow every .onnx file in a folder and its folders into a new folder, and copy the other files.

    Args:
        folder: the source.
        output: the folder to make; it must not exist, or be empty.
        factor: as for `expansion.expand`.
        requests: a factor by role; a file that has not the role is not concerned by it.
        exclude: patterns of files to leave out, as they are called within the folder (``onnx/*_q4.onnx``).
        notify: told of each file and stage begun.
        options: passed on to `expansion.expand`.

    Raises:
        BadRequest: the output exists, a link leads out of the folder, no file has a role that was asked for, or a
            dimension of one file was named.
        BadModel: there is no model in the folder, or one of them cannot be read.
        Refused: one of the files cannot grow so, or the grown files would not fit together.
        CannotWrite, ModelsDiffer: see `expansion.expand`.
    """
    source, out = Path(folder).resolve(), Path(output)
    if out.resolve() == source or out.resolve().is_relative_to(source):
        raise BadRequest(f"{out}: lies in the source folder; choose another output")
    with publication_folder(out) as partial:
        files = _files(source, exclude)
        _check_links(source, files)
        models = [each for each in files if each.suffix == ".onnx"]
        if not models:
            raise BadModel(f"{folder}: no .onnx file in this folder")
        result = FolderExpansion(str(folder), str(out))
        asked = dict(requests or {})
        roles = _roles(source, models, asked)
        data = _grow_models(result, source, partial, models, factor, (asked, roles), notify or tell_nobody, options)
        check_fit(source, partial, models)
        for each in files:
            if each not in models and (source / each).resolve() not in data:
                _copy(source / each, partial / each)
                result.copied.append(str(each))
    return result


def _files(source: Path, exclude: Sequence[str]) -> list[Path]:
    """The files of a folder, and links to folders, by their paths in it; what is hidden is left out.

    Raises:
        BadModel: a folder in it cannot be read.
    """

    def unreadable(problem: OSError) -> None:
        raise BadModel(f"{problem.filename}: cannot be read ({problem.strerror or problem})") from problem

    found: list[Path] = []
    for place, folders, files in os.walk(source, onerror=unreadable):
        folders[:] = [each for each in folders if not each.startswith(".")]
        paths = [Path(place) / each for each in (*folders, *files) if not each.startswith(".")]
        found += [each.relative_to(source) for each in paths if each.is_file() or each.is_symlink()]
    return sorted(each for each in found if not any(fnmatch.fnmatch(each.as_posix(), pattern) for pattern in exclude))


def _check_links(source: Path, files: list[Path]) -> None:
    """Refuse links that lead out of the folder, to another folder, or nowhere: they are no files to copy.

    Raises:
        BadRequest: there is one.
    """
    for each in files:
        if not (source / each).is_file():
            raise BadRequest(
                f"{source / each}: a link to a folder, or to nothing; put the files themselves there, or leave it out: "
                f"--exclude {each.as_posix()}"
            )
        if not (source / each).resolve().is_relative_to(source):
            raise BadRequest(
                f"{source / each}: a link that leads out of the folder; put the file itself there, or leave it out: "
                f"--exclude {each.as_posix()}"
            )


def _roles(source: Path, models: list[Path], asked: Mapping[str, int]) -> dict[Path, set[str]]:
    """The roles of each model's dimensions.

    Raises:
        BadRequest: none of them has a role that is asked for.
    """
    if not asked:
        return {}
    found = {each: {named.role for named in name_dimensions(analyse(source / each).dimensions)} for each in models}
    every = set().union(*found.values()) - {"other"}
    for name in asked:
        if name not in every:
            numbered = " (numbered dimensions are one file's own)" if "." in name else ""
            raise BadRequest(f"no model in {source} has a dimension {name!r}{numbered}; they have {sorted(every)}")
    return found


def _grow_models(
    result: FolderExpansion,
    source: Path,
    partial: Path,
    models: list[Path],
    factor: int,
    request: tuple[dict[str, int], dict[Path, set[str]]],
    say: Notify,
    options: Mapping[str, Any],
) -> set[Path]:
    """Grow each model; returns the files that hold their data."""
    asked, roles = request
    data: set[Path] = set()
    for each in models:
        (partial / each).parent.mkdir(parents=True, exist_ok=True)
        own = {role: times for role, times in asked.items() if role in roles[each]}
        data |= loading.source_files(source / each, loading.load(source / each))

        def tell(stage: str, name: str = each.as_posix()) -> None:
            say(f"{name}: {stage}")

        try:
            made = expand(source / each, partial / each, factor, own, notify=tell, **options)
        except NothingGrows:
            for file in (source / each, *(f for f in data if f.parent == (source / each).parent)):
                _copy(file, partial / file.relative_to(source))
            result.unchanged.append(each.as_posix())
            continue
        except Refused as problem:
            raise Refused(f"{each}: {problem}. Or leave the file out: --exclude {each.as_posix()}") from problem
        made = replace(made, source=str(source / each), output=str(Path(result.output) / each))
        result.models[each.as_posix()] = made
    return data


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copyfile(source, target)


# -- do they fit together? --------------------------------------------------------------------------------

Sizes = list[tuple[int | None, int | None]]
"""The size of each axis before and after, None where it is known only when running."""


def check_fit(source: Path, grown: Path, models: Sequence[Path]) -> None:
    """Check that what one grown file makes, another that reads it takes in the same size.

    Outputs and inputs are taken for the same tensor by their names, as exporters give them: ``last_hidden_state`` of
    an encoder is ``encoder_hidden_states``, ``present`` is ``past_key_values``.

    Raises:
        Refused: two files would no longer fit.
    """
    seen: dict[str, tuple[Path, Sizes]] = {}
    for model in models:
        for name, sizes in _interface(source / model, grown / model):
            link = _link(name)
            first, known = seen.setdefault(link, (model, sizes))
            for axis, ((before, after), (own_before, own_after)) in enumerate(zip(known, sizes, strict=False)):
                if before is not None and before == own_before and after != own_after:
                    raise Refused(
                        f"{first} would have {after} and {model} {own_after} along axis {axis} of {link}, where both "
                        f"have {before}: the files would no longer fit together. Grow their roles alike with --set"
                    )


def _link(name: str) -> str:
    """What a tensor is called between files."""
    if name == "last_hidden_state":
        return "encoder_hidden_states"
    return re.sub(r"^(present|past)(_key_values|_keys|_values)?(?=[._])", "cache", name)


def _interface(before: Path, after: Path) -> Iterator[tuple[str, Sizes]]:
    """The inputs and outputs of a model, each with the sizes of its axes."""
    graphs = [loading.load(path).graph for path in (before, after)]
    old, new = ({value.name or "": value for value in (*graph.inputs, *graph.outputs)} for graph in graphs)
    for name, value in old.items():
        shapes = [_sizes(each) for each in (value, new[name])]
        yield name, list(zip(*shapes, strict=False))


def _sizes(value: ir.Value) -> list[int | None]:
    dims = value.shape.dims if value.shape is not None else ()
    return [dim if isinstance(dim, int) else None for dim in dims]
