"""The loss of a student beside its teacher, in the terms of an array namespace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.checkpoints.manifest import NAME, Manifest
from hyperclone_onnx.frameworks.pairing import Channels, Pairing, PathLike, pair


def find_teacher(teacher: PathLike | None, student: PathLike) -> tuple[Path, Pairing]:
    """Find the teacher's file, and pair its values with those of the student.

    Args:
        teacher: the teacher's ONNX file. None: the one that the folder of the student names.
        student: the student's ONNX file, or a folder that ``handoff --teacher`` wrote.

    Raises:
        BadModel: a file cannot be read.
        BadRequest: the folder names no teacher, or the two models have nothing in common.
    """
    folder = Path(student)
    if not folder.is_dir():
        if teacher is None:
            raise BadRequest(f"{student}: name the teacher's file too: only a folder of `handoff --teacher` names one")
        return Path(teacher), pair(student, teacher)
    noted = Manifest.read(folder).teacher
    if noted is None:
        raise BadRequest(f"{folder / NAME} names no teacher: write the folder with `handoff --teacher BIG`")
    return Path(noted["model"] if teacher is None else teacher), Pairing.from_json(noted)


class AnyTeacher:
    """What the teachers of all frameworks have in common.

    Args:
        pairing: what is compared.
        xp: the array namespace of the framework.
    """

    def __init__(self, pairing: Pairing, xp: Any) -> None:
        self.pairing = pairing
        self._xp = xp

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the student's hidden values that are compared: for ``load(student, values=...)``."""
        return self.pairing.names("student")

    def loss(
        self,
        outputs: Any,
        targets: Mapping[str, Any],
        *,
        temperature: float = 2.0,
        hidden: float = 0.0,
        mask: Any = None,
    ) -> Any:
        """The distance of a student from this teacher, as a pure function.

        For logits it is KL(teacher || student) at a temperature, times its square. For hidden values it is the squared
        distance divided by the square of the teacher's, as the mean over all pairs.

        Args:
            outputs: what the student gives.
            targets: what the teacher gives on the same inputs.
            temperature: divides the logits of both.
            hidden: the weight of hidden values. They need a student that was loaded with ``values=teacher.values``.
            mask: weights of positions, such as an attention mask. They stand in the first axes of what is compared.

        Raises:
            BadRequest: the student gives no such output, or the mask has another shape.
        """
        how = {"temperature": temperature, "hidden": hidden, "mask": mask}
        return distillation_loss(self._xp, outputs, targets, self.pairing, **how)


def distillation_loss(
    xp: Any,
    outputs: Any,
    targets: Mapping[str, Any],
    pairing: Pairing,
    *,
    temperature: float,
    hidden: float,
    mask: Any,
) -> Any:
    """The loss of a student.

    Args:
        xp: the array namespace.
        outputs: what the student gave: its outputs by name, or its only output.
        targets: what the teacher gave, by name.
        pairing: what is compared.
        temperature: divides the logits of both. The divergence is multiplied by its square, so that gradients keep
            their size (Hinton et al., arXiv 1503.02531).
        hidden: the weight of the hidden values.
        mask: weights of positions, which stand in the first axes of logits and hidden values; None for equal ones.

    Raises:
        BadRequest: an output is missing, or nothing is compared.
    """
    parts = []
    for one in pairing.logits:
        wanted, got = _wide(xp, targets[one.teacher]), _wide(xp, _value(outputs, one.student, pairing))
        log_p, log_q = (_log_softmax(xp, logits / temperature) for logits in (wanted, got))
        divergence = xp.sum(xp.exp(log_p) * (log_p - log_q), axis=-1)
        parts.append(_mean(xp, divergence, mask) * temperature**2)
    if hidden and pairing.hidden:
        distances = []
        for one in pairing.hidden:
            wanted, got = _wide(xp, targets[one.teacher]), _wide(xp, _value(outputs, one.student, pairing))
            if one.channels is not None and one.channels.of == "teacher":
                wanted, got = _beside(xp, wanted, got, one.channels, one.axis)
            elif one.channels is not None:
                got, wanted = _beside(xp, got, wanted, one.channels, one.axis)
            error = xp.mean((got - wanted) ** 2, axis=one.axis)
            size = xp.mean(wanted**2, axis=one.axis)
            distances.append(_mean(xp, error, mask) / _mean(xp, size, mask))
        parts.append(hidden * sum(distances) / len(distances))
    if not parts:
        raise BadRequest("no outputs of student and teacher are compared: give hidden values a weight, hidden=1.0")
    return sum(parts[1:], parts[0])


def _value(outputs: Any, name: str, pairing: Pairing) -> Any:
    if not isinstance(outputs, Mapping):
        if len(pairing.logits) == 1 and pairing.logits[0].student == name:
            return outputs  # the only output of a student that was loaded without hidden values
        raise BadRequest("the student gives no hidden values: load it with values=teacher.values, or leave out hidden=")
    if name not in outputs:
        raise BadRequest(f"the student gives no {name!r}: load it with values=teacher.values, or leave out hidden=")
    return outputs[name]


def _wide(xp: Any, array: Any) -> Any:
    """An array in a type that is wide enough for a softmax."""
    return array if str(array.dtype).endswith("64") else xp.astype(array, xp.float32)


def _log_softmax(xp: Any, logits: Any) -> Any:
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def _beside(xp: Any, own: Any, other: Any, channels: Channels, axis: int) -> tuple[Any, Any]:
    """The values of both sides with one channel of the one beside each channel of the other."""
    where = {"device": own.device} if xp.NAME == "torch" else {}  # JAX places constants itself, also in a trace
    axis %= own.ndim
    taken = xp.take(own, xp.asarray(channels.index, **where), axis=axis)
    if channels.factors:
        shape = [1] * own.ndim
        shape[axis] = len(channels.factors)
        taken = taken * xp.reshape(xp.asarray(channels.factors, dtype=own.dtype, **where), tuple(shape))
    if channels.places:
        other = xp.take(other, xp.asarray(channels.places, **where), axis=axis)
    return taken, other


def _mean(xp: Any, positions: Any, mask: Any) -> Any:
    """The mean over positions, by their weights."""
    if mask is None:
        return xp.mean(positions)
    if tuple(mask.shape) != tuple(positions.shape[: mask.ndim]):
        raise BadRequest(f"the mask has the shape {tuple(mask.shape)}, and the positions {tuple(positions.shape)}")
    weights = xp.astype(mask, positions.dtype)
    weights = xp.reshape(weights, (*mask.shape, *([1] * (positions.ndim - mask.ndim))))
    return xp.sum(positions * weights) / xp.sum(xp.broadcast_to(weights, positions.shape))
