"""The zoo's graphs: committed without their parameters, filled again from a seed.

A stripped graph keeps everything about a model but the values of its parameters. Which tensors those are, and
the mean and standard deviation of each, is a metadata entry of the file: a seed alone gives the same model
everywhere.

    python models/zoo_store.py write DIR [NAME...]     writes filled graphs, ready to run, into DIR
    python models/zoo_store.py list                    prints the names
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

FOLDER = Path(__file__).resolve().parent / "zoo"
METADATA_KEY = "zoo.random"

Distribution = tuple[float, float]
"""Mean and standard deviation of a normal distribution."""


def names() -> list[str]:
    """Every committed graph, as `family.variant`, sorted."""
    return sorted(path.name.removesuffix(".onnx") for path in FOLDER.glob("*.onnx"))


def families() -> list[str]:
    """Every committed family, sorted."""
    return sorted({name.split(".")[0] for name in names()})


def path_of(name: str) -> Path:
    """The path of the stripped graph of that name."""
    return FOLDER / f"{name}.onnx"


def select(words: Sequence[str]) -> list[str]:
    """Names and families as names: a family stands for all its variants, and no name at all stands for all.

    Raises:
        ValueError: there is no such name or family.
    """
    known = names()
    if not words:
        return known
    chosen: list[str] = []
    for word in words:
        matching = [name for name in known if word in (name, name.split(".")[0])]
        if not matching:
            near = difflib.get_close_matches(word, [*known, *families()], n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"the zoo has no {word!r}{hint}")
        chosen += [name for name in matching if name not in chosen]
    return chosen


def load(name: str, seed: int = 0) -> onnx.ModelProto:
    """The graph of that name (`family.variant`) with all its parameters drawn from the seed.

    Raises:
        ValueError: the zoo has no graph of that name.
    """
    if select([name]) != [name]:
        raise ValueError(f"{name!r} is a family; name one of {', '.join(select([name]))}")
    return fill(onnx.load(path_of(name)), seed)


def distributions(model: onnx.ModelProto) -> dict[str, Distribution]:
    """The random tensors of a zoo graph, by name."""
    entries = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    if not entries:
        raise ValueError(f"no {METADATA_KEY!r} metadata: not a graph of the zoo")
    return {name: (float(mean), float(std)) for name, (mean, std) in json.loads(entries[0]).items()}


def fill(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Give every random tensor of the model its values, in place, by its name and the seed alone."""
    random = distributions(model)
    for tensor in model.graph.initializer:
        if tensor.name in random:
            mean, std = random[tensor.name]
            values = mean + std * _generator(seed, tensor.name).standard_normal(tuple(tensor.dims))
            filled = onnx.numpy_helper.from_array(
                np.asarray(values).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), tensor.name
            )
            tensor.CopyFrom(filled)
    return model


def strip(model: onnx.ModelProto, random: Mapping[str, Distribution]) -> onnx.ModelProto:
    """A copy of the model without the values of the tensors in `random` and without mere descriptions.

    Kept are names, shapes (those of inner values too) and dtypes, and the values of every other tensor.

    Raises:
        ValueError: a tensor in `random` is not an initializer of the model.
    """
    missing = random.keys() - {tensor.name for tensor in model.graph.initializer}
    if missing:
        raise ValueError(f"not among the initializers: {', '.join(sorted(missing))}")
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    for message in _messages(stripped):
        for field in ("doc_string", "metadata_props"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)
    for tensor in stripped.graph.initializer:
        if tensor.name in random:
            bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(bare)
    ordered = {tensor.name: random[tensor.name] for tensor in model.graph.initializer if tensor.name in random}
    stripped.metadata_props.add(key=METADATA_KEY, value=json.dumps(ordered, separators=(",", ":")))
    return stripped


def strip_alike(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    """Strip the values in which two graphs of one model with different parameters differ.

    So parameters are found whatever was done to them: transposed, joined, folded into one another. What is
    stripped is shortened, too.

    Raises:
        ValueError: the graphs differ in more than values.
    """
    firsts, seconds = ({tensor.name: tensor for tensor in model.graph.initializer} for model in (first, second))
    if firsts.keys() != seconds.keys():
        raise ValueError(f"initializers of one alone: {', '.join(sorted(firsts.keys() ^ seconds.keys()))}")
    random = {}
    for name in firsts:
        one, other = (onnx.numpy_helper.to_array(tensors[name]) for tensors in (firsts, seconds))
        if one.dtype.kind == "f" and not np.array_equal(one, other):
            random[name] = (float(one.mean().round()) + 0.0, float(f"{one.std():.2g}"))
    return strip(shorten(first), random)


def shorten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rename the inner values after their operators and drop the nodes' names, in place.

    The names of modules, in every value's name, are most of such a file.
    """
    used = {name for message in _messages(model.graph) for name in _names(message)}
    numbers = itertools.count()

    def rename(graph: onnx.GraphProto, outer: Mapping[str, str]) -> None:
        keep = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        new = {old: name for old, name in outer.items() if old not in keep}
        for node in graph.node:
            node.ClearField("name")
            node.input[:] = [new.get(name, name) for name in node.input]
            for index, name in enumerate(node.output):
                if name and name not in keep:
                    new[name] = next(name for name in (f"{node.op_type}_{n}" for n in numbers) if name not in used)
                    node.output[index] = new[name]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    rename(attribute.g, new)
        for value in graph.value_info:
            value.name = new.get(value.name, value.name)

    rename(model.graph, {})
    return model


def _names(message: Any) -> Sequence[str]:
    """The names of values that the protobuf message itself holds."""
    if isinstance(message, onnx.NodeProto):
        return [*message.input, *message.output]
    return [message.name] if isinstance(message, onnx.ValueInfoProto | onnx.TensorProto) else []


def write(folder: Path, words: Sequence[str] = (), seed: int = 0) -> list[Path]:
    """Write the filled graphs of the wanted names or families (all when empty) into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in select(words):
        written.append(folder / f"{name}.onnx")
        onnx.save(load(name, seed), written[-1])
    return written


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def _messages(message: Any) -> Iterator[Any]:
    """The protobuf message and every message inside it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) or hasattr(value, "add") else [value]:
                yield from _messages(inner)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fill the zoo's stripped graphs with random parameters.")
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write filled graphs into a folder")
    writing.add_argument("folder", type=Path, metavar="DIR")
    writing.add_argument("names", nargs="*", metavar="NAME", help="family.variant, or a family; default all")
    writing.add_argument("--seed", type=int, default=0)
    commands.add_parser("list", help="print the names")
    options = parser.parse_args(arguments)
    if options.command == "list":
        print("\n".join(names()))
        return
    try:
        written = write(options.folder, options.names, options.seed)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
