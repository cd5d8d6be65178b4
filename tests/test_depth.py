"""Growth in depth: more layers, which add nothing at first, in every family of the zoo and for every follower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from test_layers import WITHOUT, blocks
from zoo_harness import Expected, Zoo, session

from hyperclone_onnx import BadModel, BadRequest, ModelsDiffer, Plan, Refused, Strategy, expand, validate_files
from hyperclone_onnx.commands.expand import expand as command
from hyperclone_onnx.diagnosis import diagnose
from hyperclone_onnx.expansion.expanding import plan_file
from hyperclone_onnx.plan.plans import TransformStep
from hyperclone_onnx.transforms import layers as layers_transform
from hyperclone_onnx.transforms.identity_blocks import Identity
from hyperclone_onnx.transforms.interface import original_names, places_of
from hyperclone_onnx.transforms.layers import DEPTHS, LayersRequest, stacks_of, step_for
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation import validating
from models import zoo_store

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("depth") / "small.onnx"
    onnx.save(blocks("aaaa"), path)
    return path


def stored(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def step_of(path: Path, wanted: LayersRequest, **how: Any) -> TransformStep:
    step = step_for(source_of(path).model, wanted, **how)
    assert step is not None
    return step


# -- one layer after the other ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "sources"),
    [
        ({"wanted": 5}, [0, 1, 2, 3, 3]),
        ({"wanted": 6}, [0, 1, 1, 2, 3, 3]),
        ({"wanted": 8}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"wanted": 9}, [0, 0, 0, 1, 1, 2, 2, 3, 3]),
        ({"wanted": 6, "at": "end"}, [0, 1, 2, 3, 3, 3]),
        ({"wanted": 6, "at": [0, 2]}, [0, 0, 1, 2, 2, 3]),
        ({"wanted": 6, "depth": "stack"}, [0, 1, 2, 3, 0, 1]),
        ({"wanted": 6, "depth": "interpose"}, [0, 0, 1, 2, 2, 3]),
        ({"wanted": {"layers": 5}}, [0, 1, 2, 3, 3]),
    ],
)
def test_where_new_layers_stand(how: Mapping[str, Any], sources: list[int], small: Path) -> None:
    options = dict(how)
    (stack,) = step_of(small, options.pop("wanted"), **options).options["stacks"]
    assert stack["sources"] == sources
    repeated = [place for place in range(1, len(sources)) if sources[place] == sources[place - 1]]
    assert stack["identity"] == ([] if "depth" in how else repeated)


def test_a_copy_has_weights_of_its_own_and_zero_writers(small: Path, tmp_path: Path) -> None:
    expand(small, tmp_path / "big.onnx", layers=6, layers_at=[1, 3])
    before, after = stored(small), stored(tmp_path / "big.onnx")
    for part in ("up", "down", "gain", "shift"):
        for place, source in enumerate([0, 1, 1, 2, 3, 3]):
            want = before[f"h.{source}.{part}"]
            is_zero = part == "down" and place in (2, 5)
            np.testing.assert_array_equal(after[f"h.{place}.{part}"], 0 * want if is_zero else want)
    np.testing.assert_array_equal(after["table"], before["table"])


@pytest.mark.parametrize("workers", [1, 2])
def test_deep_and_wide_at_once(workers: int, small: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "big.onnx", tmp_path / "again.onnx"
    result = expand(small, out, 2, layers=7, precision="float64", workers=workers, plan_out=tmp_path / "plan.json")
    expand(small, again, 2, layers=7, check=False)
    assert out.read_bytes() == again.read_bytes()
    assert result.validation is not None and result.validation.equal and result.validation.double
    assert all(report.max_relative <= 1e-12 for report in result.validation.double)
    assert result.to_json()["layers"] == {"layers": (4, 7)}
    assert result.parameters_before == sum(array.size for array in stored(small).values() if array.dtype.kind == "f")
    assert Plan.read(tmp_path / "plan.json").transforms == (step_of(small, 7),)
    assert validate_files(small, out).equal


def test_noise_of_a_copy_is_its_own(small: Path, tmp_path: Path) -> None:
    expand(small, tmp_path / "big.onnx", 2, layers=5, check=False, strategy=Strategy("noisy-symmetric", 10.0, 1))
    after = stored(tmp_path / "big.onnx")
    assert not np.array_equal(after["h.3.up"], after["h.4.up"])
    assert not after["h.4.down"].any()


def test_as_many_layers_as_there_are_change_nothing(small: Path) -> None:
    assert step_for(source_of(small).model, 4) is None
    assert plan_file(small, 2, layers=4).plan.to_json() == plan_file(small, 2).plan.to_json()


def test_a_copy_that_adds_something_is_not_published(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deep model is compared with the file, so a transform that is wrong shows."""
    monkeypatch.setattr(layers_transform, "identity_block", lambda stack, number: Identity())
    with pytest.raises(ModelsDiffer, match="output y: relative error"):
        expand(small, tmp_path / "big.onnx", layers=5)
    assert not (tmp_path / "big.onnx").exists()


def test_first_layers_are_compared_with_the_file_too(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, a wrong copy shows in the layers behind it."""
    monkeypatch.setattr(validating, "free_memory", lambda: 0)
    report = expand(small, tmp_path / "right.onnx", 2, layers=7).validation
    assert report is not None and report.equal and report.mode == "first layers"
    monkeypatch.setattr(layers_transform, "identity_block", lambda stack, number: Identity())
    with pytest.raises(ModelsDiffer, match="relative error"):
        expand(small, tmp_path / "wrong.onnx", 2, layers=7)


@pytest.mark.parametrize("depth", ["stack", "interpose"])
def test_plain_copies_are_allowed_and_reported(depth: Any, small: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"not identity blocks change what the model computes.*--allow-change"):
        expand(small, tmp_path / "big.onnx", layers=6, depth=depth)
    assert not list(tmp_path.iterdir())
    result = expand(small, tmp_path / "big.onnx", layers=6, depth=depth, allow_change=True)
    assert result.validation is not None and result.validation.problems == []
    assert not result.validation.preserves and not result.validation.equal
    assert result.validation.largest_change > 1e-3


# -- the zoo ----------------------------------------------------------------------------------------------

GROWTHS = {
    "llama.cached": {"layers": 3},
    "llama.fused": {"layers": 3},
    "llama_runtime.built": {"layers": 4},
    "gpt2.distinct": {"layers": 4},
    "gptj.fused": {"layers": 3},
    "phi.distinct": {"layers": 3},
    "falcon_new.distinct": {"layers": 3},
    "t5_decoder.cached": {"layers": 3},
    "whisper.distinct": {"encoder": 3, "decoder": 4},
    "vit.distinct": {"layers": 3},
    "convnext.distinct": {"stack0": 3},
    "granite.distinct": {"layers": 3},
}


QUICK = ("gpt2.distinct", "phi.distinct", "vit.distinct", "t5_decoder.cached")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in GROWTHS]
)
def test_deeper_models_of_the_zoo_compute_the_same(name: str, zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    result = expand(zoo(name), out, layers=GROWTHS[name], device="cpu")
    assert result.validation is not None and result.validation.equal
    deep = source_of(zoo(name), result.plan.transforms).model.graph
    inputs, outputs = original_names(deep.inputs), original_names(deep.outputs)
    grown = session(out)
    given = [value.name for value in session(zoo(name)).get_outputs()]
    for feeds, wanted in expected(name):
        fed = {new: feeds[old] if old is not None else some_cache(new, feeds) for new, old in inputs.items()}
        got = dict(zip([value.name for value in grown.get_outputs()], grown.run(None, fed), strict=True))
        for new, old in outputs.items():
            if old is None:
                assert np.isfinite(got[new]).all()
            else:
                want = wanted[given.index(old)]
                assert np.abs(got[new] - want).max(initial=0) <= 1e-5 * np.abs(want).max(initial=1e-9)


NOT_DEEPER = {
    "deberta.distinct": "Mul .* changes the stream itself",
}
"""The graphs whose layers are found and have no identity copies, with a part of the message."""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "factor"), [("one more", None), ("twice", None), ("one more", 1.5)])
@pytest.mark.parametrize("name", [n for n in zoo_store.names() if n not in WITHOUT and n.split(".")[0] not in WITHOUT])
def test_every_graph_with_layers_grows_deeper(
    name: str, how: str, factor: float | None, zoo: Zoo, tmp_path: Path
) -> None:
    stacks = {
        stack.name: stack.layers + (stack.period if how == "one more" else stack.layers)
        for stack in stacks_of(source_of(zoo(name)).model)
    }
    if name in NOT_DEEPER:
        with pytest.raises(Refused, match=NOT_DEEPER[name]):
            expand(zoo(name), tmp_path / "big.onnx", factor, layers=stacks, device="cpu")
        return
    result = expand(zoo(name), tmp_path / "big.onnx", factor, layers=stacks, device="cpu", check="full")
    assert result.validation is not None and result.validation.equal


def some_cache(name: str, feeds: Mapping[str, Array]) -> Array:
    """A filled cache, of the shape of another layer's."""
    kind = name.split(".")[-2:] if not name.split(".")[-2].isdigit() else name.split(".")[-1:]
    like = next(array for other, array in feeds.items() if other.split(".")[-len(kind) :] == kind)
    return np.random.default_rng(7).standard_normal(like.shape).astype(like.dtype)


def test_caches_are_ordered_and_numbered_as_an_export_of_the_deeper_model_would(zoo: Zoo) -> None:
    path = zoo("llama.cached")
    graph = source_of(path, [step_of(path, 3, at=[0])]).model.graph
    assert [value.name for value in graph.inputs if "past" in str(value.name)] == [
        f"past_key_values.{layer}.{kind}" for layer in range(3) for kind in ("key", "value")
    ]
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(f"present.{layer}.{kind}" for layer in range(3) for kind in ("key", "value")),
    ]
    assert original_names(graph.inputs)["past_key_values.2.key"] == "past_key_values.1.key"
    assert original_names(graph.outputs)["present.1.value"] is None


@pytest.mark.parametrize(
    ("name", "epsilon"), [("bert.fused", 1e-12), ("bart.distinct", 1e-5), ("olmo2.distinct", None)]
)
def test_post_norm_models_hand_the_last_gain_on(name: str, epsilon: float | None, zoo: Zoo, tmp_path: Path) -> None:
    """The norm in front of a new layer becomes plain, and the new layer ends with its gain and bias."""
    stacks = {stack.name: stack.layers + 2 for stack in stacks_of(source_of(zoo(name)).model)}
    result = expand(zoo(name), tmp_path / "big.onnx", layers=stacks, layers_at="end", device="cpu")
    assert result.validation is not None and result.validation.equal
    if epsilon is None:  # the norms of OLMo 2 stand before the sum, so that their gains can be zero
        assert not result.notes
        return
    assert len(result.notes) == len(stacks) and all(f"epsilon of {epsilon:g}" in note for note in result.notes)
    assert result.to_json()["notes"] == list(result.notes)
    placed = places_of(source_of(zoo(name), result.plan.transforms).model.graph).values()
    kept = [place for place in placed if not place.is_new]
    assert len({place.source for place in kept}) == len(kept)
    assert {place.unit for place in kept} == {0, 1, 3}, "the last gain and bias belong to the last layer now"


def test_norms_that_a_copy_leaves_as_they_are_are_noticed(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layers_transform.identity_block
    monkeypatch.setattr(layers_transform, "identity_block", lambda *of: replace(whole(*of), last=()))
    with pytest.raises(ModelsDiffer, match="last_hidden_state: relative error"):
        expand(zoo("bert.distinct"), tmp_path / "big.onnx", layers=3, device="cpu")


def test_post_norm_models_without_identity_blocks(zoo: Zoo, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    model = onnx.load(zoo("bert.distinct"))
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    model.graph.output.append(onnx.helper.make_tensor_value_info(norms[2].output[0], 1, ["batch", "sequence", 48]))
    onnx.save(model, path)
    for at in (0, 1):  # the last layer has an output, too, so that each layer has one
        with pytest.raises(Refused, match="an output of the graph reads the end of a layer of a post-norm model"):
            plan_file(path, layers=3, layers_at=[at])
    for norm in norms:
        (epsilon,) = [attribute for attribute in norm.attribute if attribute.name == "epsilon"]
        epsilon.f = 1e-3
    onnx.save(model, path)
    with pytest.raises(Refused, match=r"the norm .* \(post-norm\), and its epsilon of 0.001 changes"):
        plan_file(path, layers=3)


# -- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"layers": 3}, "3 layers were asked for, and the stack 'layers' has 4.* ask for at least 4"),
        ({"layers": {"decoder": 6}}, r"no stack of layers 'decoder'. It has layers \(4 layers\)"),
        ({"layers": 6, "layers_at": [1]}, "lists 1 layers, but 2 new ones were asked for"),
        ({"layers": 5, "layers_at": [4]}, "names layer 4; the layers of 'layers' are 0 to 3"),
        ({"layers": 6, "depth": "stack", "layers_at": "end", "allow_change": True}, "depth stack has its own places"),
    ],
)
def test_requests_that_do_not_fit_are_refused(how: dict[str, Any], why: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=why):
        expand(small, tmp_path / "big.onnx", **how)
    assert not list(tmp_path.iterdir())


def test_layers_that_alternate_come_in_groups(tmp_path: Path) -> None:
    onnx.save(blocks("abab"), tmp_path / "small.onnx")
    with pytest.raises(BadRequest, match="repeat in groups of 2: ask for a multiple of 2"):
        expand(tmp_path / "small.onnx", tmp_path / "big.onnx", layers=5)
    result = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", layers=6)
    assert result.validation is not None and result.validation.equal
    assert {f"h.{number}.up" for number in range(6)} <= stored(tmp_path / "big.onnx").keys()


@pytest.mark.parametrize("name", ["smollm3.cached", "olmoe.built"])
def test_layers_of_other_nodes_are_numbered_too(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """One layer of SmolLM 3 rotates, the other one does not; the experts of OLMoE are in the body of a Loop."""
    result = expand(zoo(name), tmp_path / "big.onnx", layers=3, layers_at=[0], device="cpu")
    assert result.validation is not None and result.validation.equal
    graph = source_of(zoo(name), result.plan.transforms).model.graph
    names = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
    numbers = {number for name in names for number in name.split(".") if number.isdecimal()}
    assert numbers >= ({"0", "1", "2"} if name == "smollm3.cached" else set())
    every = [node.name for node in graph.all_nodes()]
    assert len(every) == len(set(every)), "nodes in copied bodies have names of their own"


@pytest.mark.parametrize("name", ["gemma2.distinct", "gemma3.cached"])
def test_a_copy_of_layers_of_two_kinds_has_the_kind_of_its_source(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """Local and global attention read masks and angles of their own."""
    result = expand(zoo(name), tmp_path / "big.onnx", layers=3, layers_at=[0], device="cpu")
    assert result.validation is not None and result.validation.equal
    (stack,) = stacks_of(source_of(zoo(name), result.plan.transforms).model)

    def beside(number: int) -> set[str | None]:
        unit = stack.units[number]
        read = {
            value for node in unit.nodes for value in node.inputs if value is not None and value.const_value is None
        }
        made = {value for node in unit.nodes for value in node.outputs}
        return {value.name for value in read - made - set(unit.enters) - set(unit.inputs)}

    assert beside(0) == beside(1) != beside(2)


def test_a_graph_without_layers_is_refused(tmp_path: Path) -> None:
    onnx.save(blocks("a"), tmp_path / "small.onnx")
    with pytest.raises(BadRequest, match="no layers were found in this graph"):
        expand(tmp_path / "small.onnx", tmp_path / "big.onnx", layers=2)


def test_several_stacks_must_be_named(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match=r"several stacks: encoder \(2 layers\), decoder \(2 layers\).*encoder=3,decoder=3"
    ):
        expand(zoo("whisper.distinct"), tmp_path / "big.onnx", layers=3)


def test_a_plan_for_another_graph_is_refused(small: Path) -> None:
    step = TransformStep("layers", {"stacks": [{**step_of(small, 5).options["stacks"][0], "units": 9}]})
    with pytest.raises(BadModel, match="this graph has no such"):
        source_of(small, [step])


# -- the command and the followers ------------------------------------------------------------------------


def test_the_command_offers_what_the_function_does() -> None:
    (option,) = [option for option in command.params if option.name == "depth"]
    assert tuple(option.type.choices) == DEPTHS  # type: ignore[attr-defined]


def test_the_command_grows_layers(small: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "big.onnx"
    done = cli("expand", small, "-o", out, "--layers", "6", "--layers-at", "0,2", "--json")
    assert done.code == 0 and json.loads(done.stdout)["layers"] == {"layers": [4, 6]}
    shown = cli("expand", small, "--layers", "layers=5", "--plan-only")
    assert "layers 4 -> 5" in shown.stdout
    assert "layers: 4" in cli("inspect", small).stdout
    usage = (
        ["--layers", "x"],
        ["--layers", "a=1,a=2"],
        ["--layers", "5", "--layers-at", "x"],
        ["--depth", "stack"],
    )
    for wrong in usage:
        assert cli("expand", small, "-o", tmp_path / "no.onnx", *wrong).code == 2
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.frameworks
def test_followers_take_a_deeper_model(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from hyperclone_onnx.frameworks.absorb import absorb
    from hyperclone_onnx.frameworks.hugging_face.sources import read_grown
    from hyperclone_onnx.frameworks.torch import load

    out = tmp_path / "big.onnx"
    expand(small, out, 2, layers=5, plan_out=tmp_path / "plan.json")
    assert diagnose(out, small).notes is not None
    from_file, from_plan = load(out), load(small, plan=tmp_path / "plan.json")
    ours, theirs = (dict(module.named_parameters()) for module in (from_file, from_plan))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    absorb(out, {name: parameter.detach() + 1 for name, parameter in ours.items()}, tmp_path / "trained.onnx")
    before, after = stored(out), stored(tmp_path / "trained.onnx")
    np.testing.assert_array_equal(after["h.4.down"], before["h.4.down"] + 1)
    assert read_grown(out).plan.transforms


@pytest.mark.frameworks
@pytest.mark.parametrize("depth", ["identity", "interpose"])
@pytest.mark.parametrize("kind", ["pytorch", "jax"])
def test_the_optimizer_of_a_deeper_model(depth: Any, kind: Any, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from hyperclone_onnx.frameworks.optimizer.growing import write_optimizer
    from hyperclone_onnx.frameworks.optimizer.saved_state import read_state
    from hyperclone_onnx.frameworks.torch import load
    from hyperclone_onnx.writing.safetensors_files import write_safetensors

    rng = np.random.default_rng(0)
    first = {name: rng.standard_normal(array.shape, np.float32) for name, array in stored(small).items() if array.ndim}
    state = {f"exp_avg.{name}": array for name, array in first.items()}
    state |= {f"exp_avg_sq.{name}": array**2 for name, array in first.items()}
    write_safetensors({**state, "step": np.asarray(7.0, np.float32)}, tmp_path, name="state.safetensors")
    saved, big = tmp_path / "state.safetensors", tmp_path / "big.onnx"
    expand(small, big, layers=6, depth=depth, allow_change=True, check=False)
    with pytest.raises(BadRequest, match=r"more layers than its source \(layers 4 -> 6\).*--source"):
        write_optimizer(big, saved, tmp_path, kind)
    report = write_optimizer(big, saved, tmp_path, kind, source=small)
    grown = read_state(report.file)
    path_of = {name: path for path, name in load(big).initializers.items()}
    sources, new = ([0, 1, 1, 2, 3, 3], {2, 5}) if depth == "identity" else ([0, 0, 1, 2, 2, 3], set())
    for layer, source in enumerate(sources):
        for part in ("up", "down", "gain", "shift"):
            path, want = path_of[f"h.{layer}.{part}"], first[f"h.{source}.{part}"]
            is_new = layer in new
            np.testing.assert_array_equal(grown.first[path](), 0 * want if is_new else want)
            np.testing.assert_array_equal(grown.second[path](), 0 * want if is_new else want**2)
            step = grown.steps.get(path, grown.steps.get(""))
            assert step == (0 if is_new and kind == "pytorch" else 7)
    np.testing.assert_array_equal(grown.first[path_of["table"]](), first["table"])
    assert {name.split(".")[1] for name in report.new} == set(map(str, new))
    assert report.exact == (depth == "identity")


@pytest.mark.frameworks
def test_identity_blocks_learn_from_the_first_step(small: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from hyperclone_onnx.frameworks.torch import load

    expand(small, tmp_path / "big.onnx", layers=5, check=False)
    module = load(tmp_path / "big.onnx")
    names = module.initializers
    (path,) = [path for path, name in names.items() if name == "h.4.down"]
    result = module(torch.tensor([1, 2, 3]), torch.ones(3, 6))
    result.pow(2).sum().backward()
    assert float(dict(module.named_parameters())[path].grad.abs().max()) > 0


def test_nothing_is_read_to_plan_a_deeper_model(small: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(small), tmp_path / "small.onnx", save_as_external_data=True, location="w", size_threshold=0)
    graph = source_of(tmp_path / "small.onnx", [step_of(tmp_path / "small.onnx", 5)]).model.graph
    copied = graph.initializers["h.4.up"].const_value
    assert isinstance(copied, ir.ExternalTensor)
    original = graph.initializers["h.3.up"].const_value
    assert isinstance(original, ir.ExternalTensor) and copied.offset == original.offset
