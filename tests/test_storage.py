"""Files that are no model, or an incomplete one, are refused; and results are published completely or not at all."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, names_in, perceptron

from hyperclone_onnx import BadModel, expand
from hyperclone_onnx.publishing import publication
from hyperclone_onnx.writing import onnx_files, streaming

Array = np.ndarray[Any, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `model.onnx`, which tests may damage."""
    onnx.save(perceptron(), tmp_path / "model.onnx")
    return tmp_path


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder with `model.onnx`, whose weights are in `weights.bin`."""
    onnx.save(
        perceptron(), tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return tmp_path


def assert_refused(cli: Command, folder: Path, code: int, *texts: str, model: str = "model.onnx") -> None:
    """Both commands that read `model.onnx` end with `code` and the texts, and leave no files."""
    before = names_in(folder)
    for arguments in (
        ("inspect", folder / model),
        ("expand", folder / model, "--factor", "2", "-o", folder / "big.onnx"),
        ("expand", folder / model, "--factor", "2", "-o", folder / "big.onnx", "--no-validate"),
        ("validate", folder / model, folder / model),
    ):
        outcome = cli(*arguments)
        assert outcome.code == code, outcome.stderr
        assert outcome.stdout == ""
        assert outcome.error.startswith("error: ") and model in outcome.error
        for text in texts:
            assert text in outcome.error
        assert names_in(folder) == before


# -- not a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "no graph"),
        (b"this is a text and not a model\n", "not a readable ONNX model"),
        (np.random.default_rng(0).bytes(4096), "not a readable ONNX model"),
        (b"\x00" * 512, "not a readable ONNX model"),
        (b"PK\x03\x04" + bytes(64), "PyTorch"),
        (onnx.TensorProto(name="weight", dims=[2], data_type=1, float_data=[1, 2]).SerializeToString(), "ONNX model"),
    ],
    ids=["empty", "text", "random", "zeros", "zip", "another message"],
)
def test_files_that_are_not_onnx(cli: Command, tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert_refused(cli, tmp_path, 4, text)


def test_no_file_and_no_model_but_a_folder(cli: Command, tmp_path: Path) -> None:
    assert_refused(cli, tmp_path, 4, "no such file")
    (tmp_path / "model.onnx").mkdir()
    outcome = cli("inspect", tmp_path / "model.onnx")
    assert outcome.code == 4 and "a folder, not a model file" in outcome.error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")
def test_permissions(cli: Command, folder: Path) -> None:
    (folder / "model.onnx").chmod(0)
    assert_refused(cli, folder, 4, "cannot be read")
    (folder / "model.onnx").chmod(0o600)
    (folder / "closed").mkdir(mode=0o500)
    outcome = cli("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "closed" / "big.onnx")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "no permission to write" in outcome.error


@pytest.mark.parametrize("part", [0.0005, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_truncated(cli: Command, folder: Path, part: float) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: max(1, int(len(data) * part))])
    assert_refused(cli, folder, 4)


def test_truncated_behind_the_graph(cli: Command, folder: Path) -> None:
    """A protobuf that is cut between two fields can be read, but lacks the later fields."""
    model = onnx.load(folder / "model.onnx")
    model.ClearField("opset_import")
    onnx.save(model, folder / "model.onnx")
    assert_refused(cli, folder, 4, "opset")


# -- tensors of another length than their shape -----------------------------------------------------------


def shorten_raw(tensor: onnx.TensorProto) -> None:
    tensor.raw_data = tensor.raw_data[:-4]


def lengthen_raw(tensor: onnx.TensorProto) -> None:
    tensor.raw_data = tensor.raw_data + bytes(4)


def leave_out(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")


def shorten_floats(tensor: onnx.TensorProto) -> None:
    values = onnx.numpy_helper.to_array(tensor).ravel()
    tensor.ClearField("raw_data")
    tensor.float_data.extend(values[:-3].tolist())


@pytest.mark.parametrize(
    "spoil",
    [
        shorten_raw,
        lengthen_raw,
        leave_out,
        shorten_floats,
    ],
)
def test_tensors_of_another_length(cli: Command, folder: Path, spoil: Callable[[onnx.TensorProto], None]) -> None:
    model = onnx.load(folder / "model.onnx")
    spoil(next(tensor for tensor in model.graph.initializer if tensor.name == "up.0"))
    onnx.save(model, folder / "model.onnx")
    assert_refused(cli, folder, 4, "up.0")


def test_a_constant_node_of_another_length(cli: Command, folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "up.0")
    constant = onnx.helper.make_node("Constant", [], ["up.0"], value=tensor)
    shorten_raw(constant.attribute[0].t)
    model.graph.node.insert(0, constant)
    model.graph.initializer.remove(tensor)
    onnx.save(model, folder / "model.onnx")
    assert_refused(cli, folder, 4, "up.0")


# -- data files -------------------------------------------------------------------------------------------


def relocate(folder: Path, location: str) -> None:
    """Set `location` as the data file of every tensor of `model.onnx`."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_a_missing_data_file(cli: Command, split: Path) -> None:
    (split / "weights.bin").unlink()
    assert_refused(cli, split, 4, "weights.bin is missing")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_short_data_file(cli: Command, split: Path, keep: float) -> None:
    data = (split / "weights.bin").read_bytes()
    (split / "weights.bin").write_bytes(data[: int(len(data) * keep)])
    assert_refused(cli, split, 4, "weights.bin is too short", "bytes")


@pytest.mark.parametrize("kind", ["absolute", "..", "through a folder"])
def test_a_data_file_outside_the_folder(cli: Command, split: Path, tmp_path_factory: Any, kind: str) -> None:
    """A model from elsewhere must not read files outside its folder, whether they exist or not."""
    folder = split / "inner"
    folder.mkdir()
    (split / "model.onnx").rename(folder / "model.onnx")
    location = {
        "absolute": str(split / "weights.bin"),
        "..": "../weights.bin",
        "through a folder": "there/../../weights.bin",
    }[kind]
    (folder / "there").mkdir()
    relocate(folder, location)
    assert_refused(cli, folder, 4, "outside the model's folder", location)
    (split / "weights.bin").unlink()
    assert_refused(cli, folder, 4, "outside the model's folder", location)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_files_that_are_links(cli: Command, split: Path) -> None:
    """Download caches store files elsewhere and link to them: this works, or the error says what to do."""
    (split / "cache").mkdir()
    linked = split / "linked"
    linked.mkdir()
    for name in ("model.onnx", "weights.bin"):
        (split / name).rename(split / "cache" / name)
        (linked / name).symlink_to(split / "cache" / name)
    outcome = cli("expand", linked / "model.onnx", "--factor", "2", "-o", split / "big.onnx")
    assert outcome.code in (0, 4), outcome.error


def test_a_data_file_in_a_folder_below(cli: Command, split: Path) -> None:
    (split / "below").mkdir()
    (split / "weights.bin").rename(split / "below" / "weights.bin")
    relocate(split, "below/weights.bin")
    assert cli("expand", split / "model.onnx", "--factor", "2", "-o", split / "big.onnx").code == 0
    assert external_locations(split / "big.onnx") == {"big.onnx.data"}


# -- writing ----------------------------------------------------------------------------------------------


def external_locations(path: Path) -> set[str]:
    """The data files that a model refers to."""
    model = onnx.load(path, load_external_data=False)
    return {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }


def arrays(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_external_in_external_out(cli: Command, split: Path) -> None:
    (split / "out").mkdir()
    out = split / "out" / "big.onnx"
    assert cli("expand", split / "model.onnx", "--factor", "2", "-o", out).code == 0
    assert names_in(out.parent) == {"big.onnx", "big.onnx.data"}
    assert external_locations(out) == {"big.onnx.data"}
    assert cli("validate", split / "model.onnx", out).code == 0
    # The model and its data can be moved together: the model refers to the data by name only.
    (split / "moved").mkdir()
    for name in names_in(out.parent):
        (out.parent / name).rename(split / "moved" / name)
    assert cli("validate", split / "model.onnx", split / "moved" / "big.onnx").code == 0


def test_inline_in_inline_out(cli: Command, folder: Path) -> None:
    assert cli("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "big.onnx").code == 0
    assert names_in(folder) == {"model.onnx", "big.onnx"}
    assert external_locations(folder / "big.onnx") == set()


def test_weights_beyond_the_limit_get_a_data_file(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("expand", folder / "model.onnx", "--factor", "2", "-o")
    assert cli(*arguments, folder / "inline.onnx").code == 0
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT", 10_000)
    assert cli(*arguments, folder / "big.onnx", "--precision", "float64").code == 0
    assert names_in(folder) == {"model.onnx", "inline.onnx", "big.onnx", "big.onnx.data"}
    assert external_locations(folder / "big.onnx") == {"big.onnx.data"}
    inline, external = arrays(folder / "inline.onnx"), arrays(folder / "big.onnx")
    assert inline.keys() == external.keys()
    assert all(np.array_equal(inline[name], external[name]) for name in inline)


def test_the_source_s_data_file_is_not_overwritten(cli: Command, split: Path) -> None:
    (split / "weights.bin").rename(split / "big.onnx.data")
    relocate(split, "big.onnx.data")
    before = (split / "big.onnx.data").read_bytes()
    outcome = cli("expand", split / "model.onnx", "--factor", "2", "-o", split / "big.onnx")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "overwrite the source" in outcome.error
    assert names_in(split) == {"model.onnx", "big.onnx.data"}
    assert (split / "big.onnx.data").read_bytes() == before


# The ways to fail, by their effect on the command: (arguments, exit code).
def no_space(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    def reserve(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(streaming, "_reserve", reserve)
    return [], 2


def half_written(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """The disk fails after the first write."""
    write, calls = streaming.write_at, itertools.count()

    def failing(*arguments: Any) -> None:
        if next(calls):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(*arguments)

    monkeypatch.setattr(streaming, "write_at", failing)
    return [], 2


def models_differ(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    monkeypatch.setattr("hyperclone_onnx.validation.validating.tolerance_of", lambda *_: (0.0, "none at all"))
    monkeypatch.setattr("hyperclone_onnx.validation.noise.MULTIPLE", 0.0)
    return [], 1


def interrupted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    def validate(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperclone_onnx.expansion.making.validate_pair", validate)
    return [], 130


def a_defect(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    def validate(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a defect\nwith two lines")

    monkeypatch.setattr("hyperclone_onnx.expansion.making.validate_pair", validate)
    return [], 3


def plan_has_no_folder(_: pytest.MonkeyPatch) -> tuple[list[str], int]:
    return ["--plan-out", "no/such/folder/plan.json"], 2


def a_pinned_dimension(_: pytest.MonkeyPatch) -> tuple[list[str], int]:
    return ["--set", "vocab=2"], 3


def publishing_fails(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """The last rename fails. With a data file, the data file is already published then."""
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == "big.onnx" and Path(target).parent.name != ".big.onnx.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    return [], 2


FAILURES = (
    publishing_fails,
    no_space,
    half_written,
    models_differ,
    interrupted,
    a_defect,
    plan_has_no_folder,
    a_pinned_dimension,
)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("source", ["folder", "split"])
def test_a_failing_run_leaves_everything_as_it_was(
    cli: Command,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[pytest.MonkeyPatch], tuple[list[str], int]],
    existing: bool,
    source: str,
) -> None:
    folder: Path = request.getfixturevalue(source)
    if existing:
        for name in ("big.onnx", "big.onnx.data"):
            (folder / name).write_text("what was there before")
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    extra, code = failure(monkeypatch)
    outcome = cli("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "big.onnx", *extra)
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    assert outcome.error.startswith("error: ")
    assert "Traceback" not in outcome.stderr
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == before


def test_a_data_file_of_another_model_stays(cli: Command, split: Path) -> None:
    """A file is not OUT's data file merely because it has the right name."""
    (split / "model.onnx").rename(split / "other.onnx")
    (split / "weights.bin").rename(split / "big.onnx.data")
    onnx.save(perceptron(), split / "model.onnx")
    relocated = onnx.load(split / "other.onnx", load_external_data=False)
    for tensor in relocated.graph.initializer:
        tensor.external_data[0].value = "big.onnx.data"
    (split / "other.onnx").write_bytes(relocated.SerializeToString())
    (split / "big.onnx").write_bytes((split / "model.onnx").read_bytes())
    assert cli("inspect", split / "other.onnx").code == 0
    assert cli("expand", split / "model.onnx", "--factor", "2", "-o", split / "big.onnx").code == 0
    assert cli("inspect", split / "other.onnx").code == 0


@pytest.mark.parametrize("source", ["folder", "split"])
def test_a_good_run_replaces_old_files(cli: Command, request: pytest.FixtureRequest, source: str) -> None:
    folder: Path = request.getfixturevalue(source)
    out = folder / "big.onnx"
    out.write_text("what was there before")
    for factor in ("3", "2"):
        assert cli("expand", folder / "model.onnx", "--factor", factor, "-o", out).code == 0
    assert arrays(out)["up.0"].shape == (24, 40)
    assert cli("validate", folder / "model.onnx", out).code == 0


def test_a_good_run_leaves_no_stale_data_file(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "big.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_files, "INLINE_LIMIT", 0)
        assert cli(*arguments).code == 0
    assert cli(*arguments).code == 0
    assert names_in(folder) == {"model.onnx", "big.onnx"}


def test_a_folder_where_the_data_file_goes(cli: Command, split: Path) -> None:
    (split / "big.onnx.data").mkdir()
    outcome = cli("expand", split / "model.onnx", "--factor", "2", "-o", split / "big.onnx")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert "big.onnx.data" in outcome.error


def test_the_plan_is_not_written_over_a_model(cli: Command, folder: Path) -> None:
    before = (folder / "model.onnx").read_bytes()
    arguments = ("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "big.onnx", "--plan-out")
    for plan in ("model.onnx", "big.onnx", "big.onnx.data"):
        outcome = cli(*arguments, folder / plan)
        assert (folder / "model.onnx").read_bytes() == before, "the source is gone"
        assert (outcome.code, outcome.stdout) == (2, "")
        assert names_in(folder) == {"model.onnx"}


def test_a_link_at_out_is_replaced_not_followed(cli: Command, folder: Path) -> None:
    (folder / "elsewhere.txt").write_text("precious")
    try:
        (folder / "big.onnx").symlink_to(folder / "elsewhere.txt")
        (folder / "loop.onnx").symlink_to(folder / "model.onnx")
    except OSError:
        pytest.skip("no right to make links")
    assert cli("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "big.onnx").code == 0
    assert (folder / "elsewhere.txt").read_text() == "precious"
    assert not (folder / "big.onnx").is_symlink()
    outcome = cli("expand", folder / "model.onnx", "--factor", "2", "-o", folder / "loop.onnx")
    assert outcome.code == 2 and "overwrite the source" in outcome.error


def test_publication_leaves_nothing_on_any_exception(tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    with pytest.raises(KeyboardInterrupt), publication.publication(out) as written:
        assert written.name == out.name and written.parent.parent == tmp_path
        written.write_text("half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == set()


def test_errors_of_the_api_are_the_same(folder: Path) -> None:
    (folder / "model.onnx").write_text("no model")
    with pytest.raises(BadModel, match=r"model\.onnx: not a readable ONNX model"):
        expand(folder / "model.onnx", folder / "big.onnx", 2)


def test_a_folder_whose_names_cannot_be_secured_takes_nothing_back(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is there and complete: this counts as success."""
    out = tmp_path / "big.onnx"
    expand(small, out, 2)
    sync = publication._sync

    def failing(path: Path) -> None:
        if path.is_dir():
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        sync(path)

    monkeypatch.setattr(publication, "_sync", failing)
    before = out.read_bytes()
    expand(small, out, 3)
    assert out.read_bytes() != before
