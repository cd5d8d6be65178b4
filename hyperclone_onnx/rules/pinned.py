"""Operators that can let no axis grow: a reason, then the operators."""

from __future__ import annotations

from hyperclone_onnx.graphs import RANDOM
from hyperclone_onnx.rules.registry import pinned

STANDARD = {
    "its random numbers would differ between the repeats of an axis": " ".join(sorted(RANDOM)),
    "it is a loss, and its targets are numbers of classes": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "it numbers or compares the elements of its inputs": "MaxUnpool NonMaxSuppression Unique",
    "it makes the coordinates of a grid": "AffineGrid",
    "it makes a signal whose values depend on its length": "BlackmanWindow HammingWindow HannWindow MelWeightMatrix",
    "it reads an image": "ImageDecoder",
    "it reads text": "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
}

FITTED = {
    "its attributes were fitted to these features": (
        "Imputer LinearClassifier LinearRegressor Normalizer SVMClassifier SVMRegressor Scaler TreeEnsemble "
        "TreeEnsembleClassifier TreeEnsembleRegressor"
    ),
    "it picks, joins or encodes features": (
        "ArrayFeatureExtractor Binarizer CategoryMapper DictVectorizer FeatureVectorizer LabelEncoder OneHotEncoder"
    ),
    "it converts from or to a map": "CastMap ZipMap",
}

TRAINING = {"it trains the model": "Adagrad Adam Gradient Momentum"}

for _domain, _table in (("", STANDARD), ("ai.onnx.ml", FITTED), ("ai.onnx.preview.training", TRAINING)):
    for _reason, _operators in _table.items():
        pinned(_reason, *_operators.split(), domain=_domain)
