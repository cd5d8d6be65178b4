"""The processes that share one piece of work, on one machine or on several: who they are, and how they wait.

torchrun and other launchers tell each process its number and how many there are, in the environment: RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT. Without these there is one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from hyperclone_onnx.errors import BadRequest, CannotWrite, HypercloneError, first_line

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=2)
"""How long a process waits for the others. One that ended is noticed at once: its connections are closed."""

MESSAGE = 2048
"""The most bytes of a text that processes of JAX give each other."""


@dataclass(frozen=True)
class Processes:
    """This process and the others."""

    rank: int
    """The number of this process, from 0 on."""
    count: int
    gather: Callable[[str], list[str]]
    """Every process gives a text, and gets the texts of all, in the order of their numbers. It waits for all."""

    def together(self, step: Callable[[], T]) -> T:
        """Run a step in every process, and wait for all. Where it fails in one, it fails in all.

        Raises:
            HypercloneError: the step failed here, or in another process.
        """
        problem: HypercloneError | OSError | None = None
        result: T | None = None
        try:
            result = step()
        except OSError as failure:
            problem = CannotWrite(f"{failure.filename or 'a file'}: {failure.strerror or failure}")
        except HypercloneError as failure:
            problem = failure
        texts = self.texts("" if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        for rank, text in enumerate(texts):
            if text:
                raise CannotWrite(f"process {rank} could not go on ({text})")
        return result  # type: ignore[return-value]

    def on_first(self, step: Callable[[], str]) -> str:
        """Run a step in process 0 alone, and give its text to all. Where it fails, it fails in all.

        Raises:
            HypercloneError: the step failed.
        """
        texts: list[str] = []
        self.together(lambda: texts.append(step() if self.rank == 0 else ""))
        return self.texts(texts[0])[0]

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, one from each.

        Raises:
            CannotWrite: another process has ended.
        """
        try:
            return self.gather(text)
        except HypercloneError:
            raise
        except Exception as problem:  # what a framework raises when a connection breaks has many classes
            raise CannotWrite(
                f"another process of this run has ended ({first_line(problem, 80)}): start the same command again"
            ) from problem


def alone() -> Processes:
    """One process."""
    return Processes(0, 1, lambda text: [text])


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdigit():
        raise BadRequest(f"the environment variable {name} is {text!r}: torchrun sets it to a whole number")
    return int(text)


def place() -> tuple[int, int]:
    """The number of this process and the number of processes, as the launcher says.

    Raises:
        BadRequest: the launcher's variables are no numbers, or contradict each other.
    """
    rank, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not rank < count:
        raise BadRequest(f"the environment says RANK={rank} and WORLD_SIZE={count}: ranks begin at 0")
    return rank, count


@contextmanager
def _connected(
    rank: int,
    count: int,
    gather: Callable[[str], list[str]],
    connect: Callable[[], object] | None,
    close: Callable[[], object],
) -> Iterator[Processes]:
    """Processes that a framework connects. None for `connect`: they are connected already, and stay so.

    Raises:
        CannotWrite: the processes cannot be connected.
    """
    if connect is not None:
        try:
            connect()
        except (RuntimeError, ValueError) as problem:
            raise CannotWrite(f"the {count} processes cannot be connected ({first_line(problem)})") from problem
    try:
        yield Processes(rank, count, gather)
    finally:
        if connect is not None:
            close()


@contextmanager
def torch_processes() -> Iterator[Processes]:
    """The processes that torchrun started, connected by gloo. A process group that exists already is used.

    Raises:
        BadRequest: the launcher's variables are wrong.
        CannotWrite: the processes cannot be connected.
    """
    rank, count = place()
    if count == 1:
        yield alone()
        return
    import torch.distributed as dist

    def gather(text: str) -> list[str]:
        texts: list[str] = [""] * count
        dist.all_gather_object(texts, text)
        return texts

    def connect() -> None:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)

    new = None if dist.is_initialized() else connect
    with _connected(rank, count, gather, new, dist.destroy_process_group) as processes:
        yield processes


@contextmanager
def jax_processes() -> Iterator[Processes]:
    """The processes of a launcher, connected by JAX. A connection that exists already is used.

    The coordinator of JAX needs a port of its own where torchrun listens on MASTER_PORT itself: then the next one is
    taken. JAX_COORDINATOR_ADDRESS (host:port) names another.

    Raises:
        BadRequest: the launcher's variables are wrong.
        CannotWrite: the processes cannot be connected.
    """
    rank, count = place()
    if count == 1:
        yield alone()
        return
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    def connect() -> None:
        taken = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        port = _number("MASTER_PORT", 29500) + taken
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{port}")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, rank, cluster_detection_method="deactivate")

    def gather(text: str) -> list[str]:
        given = np.zeros(MESSAGE, np.uint8)
        data = text.encode()[:MESSAGE]
        given[: len(data)] = list(data)
        rows = np.asarray(multihost_utils.process_allgather(given)).reshape(count, MESSAGE)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]

    new = None if jax.distributed.is_initialized() else connect
    with _connected(rank, count, gather, new, jax.distributed.shutdown) as processes:
        yield processes
