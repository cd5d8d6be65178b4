"""Measures the peak memory of processes that load a grown model, whole or in shards, and compares their losses.

    python benchmarks/sharding.py [SMALL.onnx] [--factor 2] [--framework torch|jax]

It grows SMALL (default: a Llama of 175 M parameters with random weights) to BIG, and loads it in three ways in new
processes: one process loads BIG; two processes load one shard of BIG each; two processes load one shard each from SMALL
and a plan, so that BIG need not exist. Prints a Markdown table. Peak memory is the whole resident set (VmHWM), with the
interpreter, the framework and file pages. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MiB = 1 << 20


def peak() -> int:
    """The largest resident set that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def report(loaded: int, loss: float, seconds: float) -> None:
    print(json.dumps({"load": loaded, "step": peak(), "loss": loss, "seconds": seconds}), flush=True)


def feeds(program: Any) -> dict[str, Any]:
    """The inputs: tokens, and a mask if the model has one."""
    import numpy as np

    ids = np.arange(64).reshape(2, 32) * 7 % 90 + 3
    return {value.name: np.ones_like(ids) if "mask" in value.name else ids for value in program.inputs}


def with_torch(model: str, plan: str, processes: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from hyperclone_onnx.frameworks.torch import load

    torch.set_num_threads(1)
    options: dict[str, Any] = {"plan": plan} if plan else {}
    if processes > 1:
        dist.init_process_group("gloo")
        options["shard"] = init_device_mesh("cpu", (processes,))
    begin = time.perf_counter()
    module = load(model, **options)
    seconds, loaded = time.perf_counter() - begin, peak()
    inputs = {name: torch.from_numpy(array) for name, array in feeds(module.program).items()}
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits = module(**inputs)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    report(loaded, loss.item(), seconds)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def with_jax(model: str, plan: str, processes: int) -> None:
    import jax
    import numpy as np

    options: dict[str, Any] = {"plan": plan} if plan else {}
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        jax.distributed.initialize(address, processes, int(os.environ["RANK"]))
        options["shard"] = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    from hyperclone_onnx.frameworks.jax import load

    begin = time.perf_counter()
    apply, params = load(model, **options)
    jax.block_until_ready(params)
    seconds, loaded = time.perf_counter() - begin, peak()
    inputs = feeds(apply.program)
    ids = inputs["input_ids"]

    @jax.jit
    def loss_of(params: Any) -> Any:
        chances = jax.nn.log_softmax(apply(params, **inputs)[:, :-1])
        return -jax.numpy.take_along_axis(chances, ids[:, 1:, None], axis=-1).mean()

    report(loaded, float(loss_of(params)), seconds)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def run(framework: str, model: Path, plan: Path | None, processes: int) -> list[dict[str, Any]]:
    """Load a model in some processes, and return the report of each."""
    port = free_port()
    command = [sys.executable, __file__, "--worker", framework, str(model), str(plan or ""), str(processes)]
    workers = []
    for rank in range(processes):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": processes}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a process of {framework} ended with an error")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", nargs="?", type=Path)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--framework", choices=("torch", "jax"), action="append")
    arguments = parser.parse_args()
    from hyperclone_onnx import expand

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        small = arguments.small or build(Path(folder) / "small.onnx")
        big, plan = Path(folder) / "big.onnx", Path(folder) / "plan.json"
        grown = expand(small, big, arguments.factor, check=False, plan_out=plan)
        size = sum(file.stat().st_size for file in Path(folder).glob("big.onnx*"))
        print(f"{grown.parameters_before:,} -> {grown.parameters_after:,} parameters, {size / MiB:,.0f} MiB\n")
        print("| | seconds | peak after loading, MiB | of the whole's | peak after a loss, MiB | loss |")
        print("|---|---|---|---|---|---|")
        for framework in arguments.framework or ("torch", "jax"):
            whole = run(framework, big, None, 1)
            rows = {
                f"{framework}, one process": whole,
                f"{framework}, a shard of BIG": run(framework, big, None, 2),
                f"{framework}, a shard from SMALL and the plan": run(framework, small, plan, 2),
            }
            for name, ranks in rows.items():
                for rank, measured in enumerate(ranks):
                    label = name if len(ranks) == 1 else f"{name}, rank {rank}"
                    ratio = measured["load"] / whole[0]["load"]
                    print(
                        f"| {label} | {measured['seconds']:.1f} | {measured['load'] / MiB:,.0f} | {ratio:.0%} "
                        f"| {measured['step'] / MiB:,.0f} | {measured['loss']:.6f} |",
                        flush=True,
                    )


def build(path: Path) -> Path:
    """A Llama-shaped model with random weights."""
    sys.path.insert(0, str(ROOT))
    from models.large import Sizes, write

    write(Sizes(hidden=1024, layers=12, heads=16, kv_heads=8, ffn=2816, vocab=16384), path)
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path.insert(0, str(ROOT))
        {"torch": with_torch, "jax": with_jax}[sys.argv[2]](sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
