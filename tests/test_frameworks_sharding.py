"""Loading in shards: each process reads its shard, from the grown file, or from the small file and a plan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperclone_onnx import BadModel, BadRequest, analyse, expand, plan_expansion
from tests.conftest import ROOT

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("array_api_compat", "torch", "jax"):
    pytest.importorskip(_needed)

Zoo = Callable[[str], Path]


def grown(zoo: Zoo, family: str, folder: Path) -> tuple[Path, Path, Path]:
    """(small file, plan, grown file)"""
    small = zoo(f"{family}.distinct")
    expand(small, folder / "big.onnx", 2, check=False, plan_out=folder / "plan.json")
    return small, folder / "plan.json", folder / "big.onnx"


def run(*command: Any, **environment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_processes_load_their_own_shards_and_lose_alike(family: str, zoo: Zoo, tmp_path: Path) -> None:
    paths = grown(zoo, family, tmp_path)
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    run(*command, ROOT / "tests" / "sharded_worker.py", *paths, tmp_path)
    assert (tmp_path / "losses").exists()


JAX_SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from hyperclone_onnx.frameworks.jax import load
import orbax.checkpoint as ocp

small, plan, big, folder = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 2
apply, whole = load(big)
ids = np.arange(28).reshape(2, 14) % 90 + 3
mask = np.ones_like(ids)

def loss(apply, params):
    chances = jax.nn.log_softmax(apply(params, ids, mask)[:, :-1])
    return -jax.numpy.take_along_axis(chances, ids[:, 1:, None], axis=-1).mean()

for shard in (mesh, lambda path, shape: NamedSharding(mesh, P())):
    sharded, params = load(small, plan=plan, shard=shard)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), params, whole)
    assert all(jax.tree.leaves(same)), same
    want, gradient = jax.jit(jax.value_and_grad(lambda p: loss(apply, p)))(whole)
    got, other = jax.jit(jax.value_and_grad(lambda p: loss(sharded, p)))(params)
    assert abs(want - got) < 1e-6 * want
    close = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), gradient, other)
    assert all(jax.tree.leaves(close)), close
sharded, params = load(small, plan=plan, shard=mesh)
parts = [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(params) if x.ndim == 2]
assert max(parts) == 0.5, parts
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder + "/orbax", params)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(folder + "/orbax", jax.tree.map(ocp.utils.to_shape_dtype_struct, params))
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()) and a.sharding == b.sharding, params, back)))
"""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_jax_arrays_come_in_parts(family: str, zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    paths = grown(zoo, family, tmp_path)
    run(sys.executable, "-c", JAX_SCRIPT, *paths, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_a_meta_module_is_materialized_once(zoo: Zoo, tmp_path: Path) -> None:
    import torch

    from hyperclone_onnx.frameworks.torch import load

    small, plan, big = grown(zoo, "llama", tmp_path)
    model = load(small, plan=plan, device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.materialize() is model
    for one, other in zip(model.parameters(), load(big).parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(BadRequest, match="materialized already"):
        model.materialize()


WRONG_PLANS: dict[str, tuple[Callable[[Zoo, Path], Any], type[Exception], str]] = {
    "a plan of another model": (
        lambda zoo, folder: plan_expansion(analyse(zoo("gpt2.distinct")), 2),
        BadRequest,
        "the plan is for another model: this one has no tensor",
    ),
    "a plan of the same model in other sizes": (
        lambda zoo, folder: plan_expansion(analyse(zoo("llama.collide")), 2),
        BadRequest,
        "the plan is for another model: .* has the shape",
    ),
    "no plan at all": (lambda zoo, folder: folder / "none.json", BadModel, "none.json: not a readable plan"),
}


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("case", WRONG_PLANS)
def test_wrong_plans_are_told(case: str, framework: str, zoo: Zoo, tmp_path: Path) -> None:
    from importlib import import_module

    make, error, message = WRONG_PLANS[case]
    load = import_module(f"hyperclone_onnx.frameworks.{framework}").load
    with pytest.raises(error, match=message):
        load(zoo("llama.distinct"), plan=make(zoo, tmp_path))


def test_slices_read_the_windows_alone(zoo: Zoo, tmp_path: Path) -> None:
    import onnx
    import onnx_ir as ir

    from hyperclone_onnx.frameworks.slices import blocks, read_slice

    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    proto = onnx.load(zoo("llama.distinct"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "extra"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    tensor = ir.load(tmp_path / "m.onnx").graph.initializers["extra"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    windows = (slice(1, 4), slice(2, 4), slice(0, 2))
    assert np.array_equal(read_slice(tensor, windows), array[windows])
    assert [w[0] for w in blocks((5, 1 << 20), 4)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(blocks((), 4)) == [()] and list(blocks((0, 3), 4)) == []
