"""Measures how far the clones of a grown model differ: in its weights and in its activations, layer by layer.

In: a grown file, perhaps trained after growth, and its plan. Out: distances and ranks by tensor, layer and role, and a
verdict.

>>> from hyperclone_onnx.diagnosis import diagnose
>>> diagnose("trained.onnx").stuck  # doctest: +SKIP
False
"""

from hyperclone_onnx.diagnosis.diagnosing import diagnose
from hyperclone_onnx.diagnosis.model import Diagnosis, PartDiagnosis, Rank, TensorDiagnosis, ValueDiagnosis

__all__ = ["Diagnosis", "PartDiagnosis", "Rank", "TensorDiagnosis", "ValueDiagnosis", "diagnose"]
