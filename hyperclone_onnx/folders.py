"""Growing a model that is several files: an encoder and a decoder, a decoder with and without its cache.

Each model grows by itself, by the same factors. A model that reads what another one makes must still be able to: the
output folder appears only when every grown model is equal to its source and they fit together.
"""

from __future__ import annotations

import filecmp
import fnmatch
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import analyse
from hyperclone_onnx.analysis.quantities import quantities
from hyperclone_onnx.errors import BadModel, BadRequest, HypercloneError, NothingGrows, Refused
from hyperclone_onnx.expansion.expanding import expand, plan_file
from hyperclone_onnx.expansion.report import Expansion
from hyperclone_onnx.layers.stacks import Stack
from hyperclone_onnx.plan.maps import names_in
from hyperclone_onnx.plan.plans import Interface
from hyperclone_onnx.planning.asked import whole_numbers
from hyperclone_onnx.planning.configuration import GrownConfiguration, NotSaid, Size, grown_configuration
from hyperclone_onnx.progress import Notify, ignore_stage
from hyperclone_onnx.publishing.journal import data_files
from hyperclone_onnx.publishing.publication import publication_folder
from hyperclone_onnx.reading import loading
from hyperclone_onnx.summaries import Summarised, Summary
from hyperclone_onnx.system.patterns import is_excluded
from hyperclone_onnx.transforms.layers import LayersRequest, deepened, stacks_of
from hyperclone_onnx.transforms.source import source_of


@dataclass(repr=False)
class FolderExpansion(Summarised):
    """What growing a folder did; `models` by path within the folder."""

    source: str
    output: str
    models: dict[str, Expansion] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    """Models in which nothing can grow, copied with their data as they are."""
    copied: list[str] = field(default_factory=list)
    """Files that are no models: a tokenizer, for example."""
    changed: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Configurations that were grown, with the fields that changed and their values before and after."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Files of the small model that would be wrong beside the grown one, with the reason."""

    def summary(self) -> Summary:
        """The models that grew, with their parameters."""
        rows = [
            (name, f"{model.parameters_before:,}", f"{model.parameters_after:,}") for name, model in self.models.items()
        ]
        line = f"{self.source} -> {self.output}, {len(rows)} models grew, {len(self.unchanged)} are unchanged"
        return Summary(line, ("model", "parameters", "grown"), rows)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "source": self.source,
            "output": self.output,
            "models": {name: expansion.to_json() for name, expansion in self.models.items()},
            "unchanged": self.unchanged,
            "copied": self.copied,
            "changed": self.changed,
            "left_out": self.left_out,
        }


def expand_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    factor: float | None = None,
    requests: Mapping[str, float] | None = None,
    *,
    sizes: Mapping[str, float] | None = None,
    layers: LayersRequest | None = None,
    exclude: Sequence[str] = (),
    notify: Notify | None = None,
    **options: Any,
) -> FolderExpansion:
    """Grow every .onnx file in a folder and its folders into a new folder, and copy the other files.

    A data file of a model, one that is left out too, is no other file: it is copied only with a model that is copied.
    Where a model grows, weights in other formats are left out. config.json and genai_config.json are grown; one that
    cannot say the sizes of the grown model is left out.

    Args:
        folder: the source.
        output: the folder to make; it must not exist, or be empty.
        factor: as for `expansion.expand`.
        requests: a factor by role; a model without the role ignores it.
        sizes: a size by role; a model without the role ignores it.
        layers: the number of layers, or one for each stack. A stack is called encoder if its model makes what another
            one reads, decoder if it reads what another one makes. A model without the stack ignores it.
        exclude: patterns of files to leave out, as they are called within the folder (``onnx/*_q4.onnx``).
        notify: called with each model and each stage as it begins.
        options: passed on to `expansion.expand`.

    Raises:
        BadRequest: the output exists, a link leads out of the folder, no model has a role or a stack that was asked
            for, or a dimension of one model was named.
        BadModel: there is no model in the folder, or one of them cannot be read.
        Refused: one of the models cannot grow so, or the grown models would not fit together.
        CannotWrite, ModelsDiffer: see `expansion.expand`.
    """
    source, out = Path(folder).resolve(), Path(output)
    if out.resolve() == source or out.resolve().is_relative_to(source):
        raise BadRequest(f"{out}: lies in the source folder; choose another output")
    with publication_folder(out) as partial:
        files, left_out = _files(source, exclude)
        _check_links(source, files)
        models = [file for file in files if file.suffix == ".onnx"]
        if not models:
            raise BadModel(f"{folder}: no .onnx file in this folder")
        work = _Work(FolderExpansion(str(folder), str(out)), source, partial, factor, notify or ignore_stage, options)
        work.requests = _by_model(source, models, whole_numbers(requests, "requests", "factor"))
        work.sizes = _by_model(source, models, whole_numbers(sizes, "sizes", "size"))
        work.layers = layers_by_model(source, models, layers)
        work.data = {model: _data_of(source / model) for model in models}
        no_others = set[Path]().union(*work.data.values(), _data_of_models_left_out(source, left_out))
        others = [file for file in files if file not in models and (source / file).resolve() not in no_others]
        work.copy_others(file for file in others if not _describes_model(file))
        work.grow()
        work.finish(file for file in others if _describes_model(file))
        check_fit(source, partial, models)
    return work.result


@dataclass
class _Work:
    """What is done for one folder."""

    result: FolderExpansion
    source: Path
    partial: Path
    """The folder that becomes the output."""
    factor: float | None
    say: Notify
    options: Mapping[str, Any]
    requests: dict[Path, dict[str, int]] = field(default_factory=dict)
    """For each model the requested factors of the roles that it has."""
    sizes: dict[Path, dict[str, int]] = field(default_factory=dict)
    """For each model the requested sizes of the roles that it has."""
    layers: dict[Path, dict[str, int]] = field(default_factory=dict)
    """The requested layers by stack, for each model that becomes deeper."""
    data: dict[Path, set[Path]] = field(default_factory=dict)
    """For each model its data files, resolved."""

    def options_of(self, model: Path) -> dict[str, Any]:
        """The options for a model. The options of layers are for models that become deeper."""
        if model in self.layers:
            return {**self.options, "layers": self.layers[model]}
        return {name: option for name, option in self.options.items() if name not in ("depth", "layers_at")}

    def copy_others(self, files: Iterable[Path]) -> None:
        """Copy the files that are no part of a model.

        They come before the models: a grown model then gives its data file a name that is free.
        """
        for file in files:
            _copy(self.source / file, self.partial / file)
            self.result.copied.append(file.as_posix())

    def finish(self, files: Iterable[Path]) -> None:
        """Copy, grow or leave out the files that describe the small model."""
        for file in files:
            name, why = file.as_posix(), WEIGHTS_WHY
            if not self.result.models:
                self.copy_others([file])
                continue
            if file.name == GENAI_CONFIG:
                grown, why = _grown_genai_config(self.source / file, list(self.result.models.values()))
                if grown is not None:
                    fields, self.result.changed[name] = grown
                    (self.partial / file).parent.mkdir(parents=True, exist_ok=True)
                    (self.partial / file).write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")
                    continue
            elif file.name == CONFIG:
                models = [model for path, model in self.result.models.items() if Path(path).is_relative_to(file.parent)]
                configuration, why = _grown_config(self.source / file, models)
                if configuration is not None:
                    self.result.changed[name] = configuration.changed
                    (self.partial / file).parent.mkdir(parents=True, exist_ok=True)
                    text = json.dumps(configuration.fields, indent=2) + "\n"
                    (self.partial / file).write_text(text, encoding="utf-8")
                    continue
            self.result.left_out[name] = why

    def grow(self) -> None:
        """Grow each model, or copy it where nothing in it can grow.

        Raises:
            Refused: one of them cannot grow so.
        """
        # A model that is copied needs its data files under their own names. So it is copied before any model grows
        # that would give one of these names to its own data.
        copied = [model for model in self.data if self._keeps_names(model) and not self._can_grow(model)]
        for model in copied:
            self._copy_model(model)
        for model in self.data:
            if model not in copied:
                self._grow_model(model)

    def _keeps_names(self, model: Path) -> bool:
        """Whether the model reads a file that has the name of another model's grown data."""
        others = [self.source / other for other in self.data if other != model]
        return any(
            path.parent == other.parent and data_files(other.name).fullmatch(path.name)
            for path, other in itertools.product(self.data[model], others)
        )

    def _can_grow(self, model: Path) -> bool:
        given = self.options_of(model)
        options = {name: given[name] for name in PLANNING_OPTIONS if name in given}
        try:
            plan_file(self.source / model, self.factor, self.requests[model], sizes=self.sizes[model], **options)
        except NothingGrows:
            return False
        except Refused:
            return True  # `_grow_model` reports it, with the name of the file
        return True

    def _grow_model(self, model: Path) -> None:
        path, name = self.source / model, model.as_posix()
        (self.partial / model).parent.mkdir(parents=True, exist_ok=True)

        def say(stage: str) -> None:
            self.say(f"{name}: {stage}")

        try:
            grown = expand(
                path,
                self.partial / model,
                self.factor,
                self.requests[model],
                sizes=self.sizes[model],
                notify=say,
                **self.options_of(model),
            )
        except NothingGrows:
            self._copy_model(model)
            return
        except Refused as problem:
            raise Refused(f"{model}: {problem}. Or leave the file out: --exclude {name}") from problem
        self.result.models[name] = replace(grown, source=str(path), output=str(Path(self.result.output) / model))

    def _copy_model(self, model: Path) -> None:
        """Copy a model and its own data files; those lie in its folder, or below."""
        path, target = self.source / model, self.partial / model
        _copy(path, target)
        for data in self.data[model]:
            inside = data.relative_to(path.resolve().parent)
            copy = target.parent / inside
            if not copy.exists():
                _copy(data, copy)
            elif not filecmp.cmp(data, copy, shallow=False):  # two models may share a data file
                raise Refused(
                    f"{model}: its data file {inside} and another file would have one name; rename one of them"
                )
        self.result.unchanged.append(model.as_posix())


CONFIG, GENAI_CONFIG = "config.json", "genai_config.json"
WEIGHTS = (
    "*.safetensors *.safetensors.index.json pytorch_model*.bin pytorch_model*.bin.index.json *.pt *.pth *.ckpt *.h5 "
    "*.msgpack *.gguf"
).split()
"""Patterns of files with the small model's weights in other formats."""

WEIGHTS_WHY = "it holds the small model's weights"
CONFIG_WHY = "it describes the small model"

GENAI_LAYERS = "num_hidden_layers"
"""The field of a decoder in the same configuration that says its layers."""

GENAI_FIELDS = {
    "hidden_size": ("hidden",),
    "num_attention_heads": ("heads", "group"),
    "num_key_value_heads": ("heads",),
    "head_size": ("head_dim",),
}
"""For fields of a decoder in ONNX Runtime GenAI's configuration, the roles whose growth multiplies the value."""


def _describes_model(file: Path) -> bool:
    """Whether a file describes the model beside it, or holds its weights in another format."""
    return file.name in (CONFIG, GENAI_CONFIG) or any(fnmatch.fnmatch(file.name, pattern) for pattern in WEIGHTS)


def _grown_config(path: Path, models: Sequence[Expansion]) -> tuple[GrownConfiguration | None, str]:
    """The grown configuration; or None and the reason."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        return None, f"{CONFIG_WHY}, and cannot be read ({type(problem).__name__})"
    if not isinstance(fields, dict):
        return None, f"{CONFIG_WHY}, and has no fields"
    if any(model.plan.keep_interface for model in models):
        return GrownConfiguration(fields, {}), ""
    depths = [tuple(deepened(model.plan.transforms).values()) for model in models]
    layers = {("layers", before, after) for pairs in depths for before, after in pairs}
    if layers and (len(layers) > 1 or not all(depths)):
        return None, f"{CONFIG_WHY}: its stacks have other numbers of layers now"
    if any(isinstance(value, list) and len(value) == before for value in fields.values() for _, before, _ in layers):
        return None, f"{CONFIG_WHY}: it has a list with an entry for each layer"
    try:
        return grown_configuration(fields, [*_sizes_of(models), *layers]), ""
    except NotSaid as reason:
        return None, f"{CONFIG_WHY}: {reason}"


def _sizes_of(models: Sequence[Expansion]) -> list[Size]:
    """Every size of models that belong together.

    What one of them makes and another one reads has the role that the first one gives it. The width of an encoder's
    output is `hidden` there; a decoder alone cannot know that, and calls it `width`.
    """
    made: dict[tuple[str, int], str] = {}
    for model in models:
        roles = {size.dims: size.role for size in model.sizes}
        made |= {place: roles[dims] for place, dims in _growing_axes(model.plan.outputs) if dims in roles}
    sizes: list[Size] = []
    for model in models:
        read = {dims: made[place] for place, dims in _growing_axes(model.plan.inputs) if place in made}
        for size in model.sizes:
            role = read.get(size.dims, size.role) if size.role == "width" else size.role
            sizes.append((role, size.before, size.after))
    return sizes


def _growing_axes(interfaces: Iterable[Interface]) -> Iterator[tuple[tuple[str, int], tuple[str, ...]]]:
    """The axes of inputs or of outputs: the link and the number of the axis, and the names of its dimensions."""
    for interface in interfaces:
        for number, axis in enumerate(interface.axes):
            yield (_link(interface.name), number), tuple(name for factor in axis or () for name in names_in(factor))


def _grown_genai_config(
    path: Path, models: Sequence[Expansion]
) -> tuple[tuple[dict[str, Any], dict[str, tuple[int, int]]] | None, str]:
    """The fields of a grown configuration and those that changed; or None and the reason."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        decoder = fields["model"]["decoder"]
        values = {name: int(decoder[name]) for name in (*GENAI_FIELDS, GENAI_LAYERS) if name in decoder}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return None, f"it is no configuration that we can grow ({type(problem).__name__} {problem})"
    changed: dict[str, tuple[int, int]] = {}
    depths = {after for model in models for _, after in deepened(model.plan.transforms).values()}
    if len(depths) > 1:
        return None, f"its {GENAI_LAYERS} would need one number, but stacks have {sorted(depths)} layers"
    before = values.pop(GENAI_LAYERS, None)
    if before is not None and depths:
        decoder[GENAI_LAYERS] = depths.pop()
        changed[GENAI_LAYERS] = before, decoder[GENAI_LAYERS]
    if any(model.plan.keep_interface for model in models):
        return (fields, changed), ""
    for name, value in values.items():
        grown = Fraction(value)
        for role in GENAI_FIELDS[name]:
            ratios = {ratio for model in models for ratio in _ratios(model, role)}
            if len(ratios) > 1:
                return None, f"its {name} would need one number, but {role} grows by {sorted(map(str, ratios))}"
            grown *= next(iter(ratios), Fraction(1))
        if grown.denominator != 1:
            return None, f"its {name} would be {float(grown):g}"
        if grown != value:
            changed[name] = (value, int(grown))
            decoder[name] = int(grown)
    return (fields, changed), ""


def _ratios(model: Expansion, role: str) -> set[Fraction]:
    """By how much the dimensions of a role grow in a model."""
    grown = {Fraction(dim.map.grown, dim.map.size) for dim in model.plan.dims.values() if dim.role == role}
    return grown | ({Fraction(1)} if any(kept.role == role for kept in model.kept) else set())


PLANNING_OPTIONS = (
    "allow_change",
    "depth",
    "layers",
    "layers_at",
    "like",
    "maps",
    "strategies",
    "strategy",
    "untie",
    "separate",
    "keep_interface",
)
"""The options of `expansion.expand` that decide the plan."""


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


# -- the files --------------------------------------------------------------------------------------------


def _files(source: Path, exclude: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files of a folder by their paths in it: those to grow or copy, and those that a pattern leaves out.

    Links to folders are among them, for `_check_links` to refuse. Hidden files are in neither.

    Raises:
        BadModel: a folder in it cannot be read.
    """

    def unreadable(problem: OSError) -> None:
        raise BadModel(f"{problem.filename}: cannot be read ({problem.strerror or problem})") from problem

    files: list[Path] = []
    for place, folders, names in os.walk(source, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place) / name for name in (*folders, *names) if not name.startswith(".")]
        files += [path.relative_to(source) for path in paths if path.is_file() or path.is_symlink()]
    excluded = [file for file in files if is_excluded(file, exclude)]
    return sorted(set(files) - set(excluded)), sorted(excluded)


def _check_links(source: Path, files: list[Path]) -> None:
    """Refuse links that lead out of the folder, to another folder, or nowhere: they are no files to copy.

    Raises:
        BadRequest: there is one.
    """
    for file in files:
        if not (source / file).is_file():
            raise BadRequest(
                f"{source / file}: a link to a folder, or to nothing; put the files themselves there, or leave it out: "
                f"--exclude {file.as_posix()}"
            )
        if not (source / file).resolve().is_relative_to(source):
            raise BadRequest(
                f"{source / file}: a link that leads out of the folder; put the file itself there, or leave it out: "
                f"--exclude {file.as_posix()}"
            )


def _by_model(source: Path, models: list[Path], asked: Mapping[str, int]) -> dict[Path, dict[str, int]]:
    """For each model the requests for roles that it has.

    Raises:
        BadRequest: none of them has a role that is asked for.
    """
    if not asked:
        return {model: {} for model in models}
    roles: dict[Path, set[str]] = {}
    for model in models:
        analysis = analyse(source / model)
        roles[model] = {named.role for named in analysis.named}
        roles[model] |= {quantity.role for quantity in quantities(analysis.dimensions, analysis.named)}
    known = set[str]().union(*roles.values()) - {"other"}
    for name in asked:
        if name not in known:
            numbered = " (numbered dimensions are one file's own)" if "." in name else ""
            raise BadRequest(f"no model in {source} has a dimension {name!r}{numbered}; they have {sorted(known)}")
    return {model: {role: number for role, number in asked.items() if role in roles[model]} for model in models}


def layers_by_model(source: Path, models: Sequence[Path], wanted: LayersRequest | None) -> dict[Path, dict[str, int]]:
    """The requested layers by stack, for each model that becomes deeper.

    Args:
        source: the folder of the models.
        models: their paths in it.
        wanted: the number of layers, or one for each stack; None where none were asked for.

    Raises:
        BadRequest: no model has a stack that is asked for, or a number is given where there are several stacks, or a
            model without layers shares a cache with one that becomes deeper.
    """
    if wanted is None:
        return {}
    graphs = {model: source_of(source / model).model for model in models}
    links = {model: (_links(graph.graph.inputs), _links(graph.graph.outputs)) for model, graph in graphs.items()}
    stacks: dict[Path, dict[str, Stack]] = {}
    for model, graph in graphs.items():
        others = [pair for other, pair in links.items() if other != model]
        alike = stacks_of(graph)
        stacks[model] = {_called(stack, len(alike), links[model], others): stack for stack in alike}
    _call_decoders(stacks, links)
    called = dict.fromkeys(name for of_model in stacks.values() for name in of_model)
    listed = ", ".join(
        f"{name} in {model} ({stack.layers} layers)" for model in models for name, stack in stacks[model].items()
    )
    if not called:
        raise BadRequest(f"layers were asked for, but no layers were found in any model in {source}")
    if isinstance(wanted, int):
        if len(called) > 1:
            example = ",".join(f"{name}={wanted}" for name in called)
            raise BadRequest(
                f"the models have several stacks: {listed}. Say how many layers each has: --layers {example}"
            )
        wanted = dict.fromkeys(called, wanted)
    for name in wanted:
        if name not in called:
            raise BadRequest(f"no model in {source} has a stack of layers {name!r}. They have {listed}")
    deeper = {
        model: {stack.name: wanted[name] for name, stack in of_model.items() if name in wanted}
        for model, of_model in stacks.items()
    }
    deeper = {model: request for model, request in deeper.items() if request}
    caches = {link for model in deeper for side in links[model] for link in side if _is_cache(link)}
    for model in models:
        if not stacks[model] and any(link in caches for side in links[model] for link in side):
            raise BadRequest(
                f"{model}: no layers were found in it, but it shares a cache with a model that becomes deeper. Leave "
                f"it out: --exclude {model.as_posix()}"
            )
    return deeper


def _links(values: Iterable[ir.Value]) -> set[str]:
    return {_link(value.name or "") for value in values}


def _called(
    stack: Stack, count: int, own: tuple[set[str], set[str]], others: Sequence[tuple[set[str], set[str]]]
) -> str:
    """The name of a stack among those of several models.

    Args:
        stack: the stack.
        count: the number of stacks in its model.
        own: the names by which its model shares its inputs and its outputs.
        others: the same for the other models.
    """
    if count > 1:
        return stack.name
    inputs, outputs = own
    if any(not _is_cache(link) for reads, _ in others for link in outputs & reads - inputs):
        return "encoder"
    if any(not _is_cache(link) for _, makes in others for link in inputs & makes - outputs):
        return DECODER
    return stack.name


def _call_decoders(stacks: dict[Path, dict[str, Stack]], links: Mapping[Path, tuple[set[str], set[str]]]) -> None:
    """Call the only stack of a model "decoder" if the model shares a cache with a decoder.

    The later steps of a decoder are often a file of their own, which reads nothing of the encoder but the cache.
    """
    decoders = [model for model, of_model in stacks.items() if DECODER in of_model]
    caches = {link for model in decoders for side in links[model] for link in side if _is_cache(link)}
    for model, of_model in stacks.items():
        inputs, outputs = links[model]
        if len(of_model) == 1 and not caches.isdisjoint(inputs | outputs):
            stacks[model] = {DECODER: next(iter(of_model.values()))}


def _is_cache(link: str) -> bool:
    return link.startswith(CACHE)


def _data_of(path: Path) -> set[Path]:
    """The data files of a model, resolved."""
    return loading.source_files(path, loading.load(path)) - {path.resolve()}


def _data_of_models_left_out(source: Path, files: list[Path]) -> set[Path]:
    """The data files of models that are left out, as far as these can be read: they would be of no use to anybody."""
    data: set[Path] = set()
    for file in files:
        if file.suffix == ".onnx":
            with suppress(HypercloneError):
                data |= _data_of(source / file)
    return data


# -- do they fit together? --------------------------------------------------------------------------------

DECODER = "decoder"
"""The name of the layers of a decoder in a folder."""

CACHE = "cache"
"""The beginning of the names by which models share caches."""

Sizes = list[tuple[int | None, int | None]]
"""The size of each axis before and after, None where it is known only when running."""


def check_fit(source: Path, grown: Path, models: Sequence[Path]) -> None:
    """Check that a tensor which one model makes and another reads still has one size in both.

    Models that had the same caches must have the same ones still. An output and an input are the same tensor where
    exporters give them matching names: ``last_hidden_state`` of an encoder is ``encoder_hidden_states``, ``present`` is
    ``past_key_values``.

    Raises:
        Refused: two models would no longer fit.
    """
    caches: dict[frozenset[str], tuple[Path, frozenset[str]]] = {}
    seen: dict[str, tuple[Path, Sizes]] = {}
    for model in models:
        before, after = _caches(source / model), _caches(grown / model)
        first, wanted = caches.setdefault(before, (model, after))
        if wanted != after:
            raise Refused(
                f"{first} and {model} share a cache, and would have caches of different layers: the files would no "
                "longer fit together. Give both the same layers with --layers, or leave one out with --exclude"
            )
        for name, sizes in _interface(source / model, grown / model):
            link = _link(name)
            first, known = seen.setdefault(link, (model, sizes))
            for axis, ((size, other), (own_before, own_after)) in enumerate(zip(known, sizes, strict=False)):
                if size is not None and size == own_before and other != own_after:
                    raise Refused(
                        f"{first} would have {other} and {model} {own_after} along axis {axis} of {link}, where both "
                        f"have {size}: the files would no longer fit together. Grow their roles alike with --set"
                    )


def _link(name: str) -> str:
    """The name by which models share a tensor."""
    if name == "last_hidden_state":
        return "encoder_hidden_states"
    return re.sub(r"^(present|past)(_key_values|_keys|_values)?(?=[._])", CACHE, name)


def _caches(path: Path) -> frozenset[str]:
    """The names by which a model shares its caches."""
    graph = loading.load(path).graph
    return frozenset(link for link in _links((*graph.inputs, *graph.outputs)) if _is_cache(link))


def _interface(before: Path, after: Path) -> Iterator[tuple[str, Sizes]]:
    """The inputs and outputs of a model, each with the sizes of its axes."""
    graphs = [loading.load(path).graph for path in (before, after)]
    old, new = ({value.name or "": value for value in (*graph.inputs, *graph.outputs)} for graph in graphs)
    for name, value in old.items():
        yield name, list(zip(_sizes(value), _sizes(new[name]), strict=False))


def _sizes(value: ir.Value) -> list[int | None]:
    dims = value.shape.dims if value.shape is not None else ()
    return [dim if isinstance(dim, int) else None for dim in dims]
