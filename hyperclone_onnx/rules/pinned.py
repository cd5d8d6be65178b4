"""Operators of which no axis can grow by its nature: reason, then operators."""

from __future__ import annotations

from hyperclone_onnx.rules.registry import pinned

STANDARD = {
    "what it draws is not repeated when its axes are": (
        "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
    ),
    "a loss takes a share of each class": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "it numbers or compares what it is given": "MaxUnpool NonMaxSuppression Unique",
    "it makes the places of a grid": "AffineGrid",
    "it makes a signal of a length of its own": "BlackmanWindow HammingWindow HannWindow MelWeightMatrix",
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
