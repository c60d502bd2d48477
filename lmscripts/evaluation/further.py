"""Further metrics of a classifier, by name: metrics of `evaluate`, asked about its documents.

A name is that of a scorer of scikit-learn (`NAMES`; larger is better), of which `Scorer` makes such a metric; or the
path of a metric's script, or a name on the Hub, either with `:CONFIG` behind it where it has several.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from huggingface_hub import constants
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import get_scorer

from lmscripts.errors import UserError, shortened
from lmscripts.evaluation.metrics import Flags, Floats
from lmscripts.text.labels import nearest

_AVERAGED = [
    f"{name}_{how}" for name in ("f1", "jaccard", "precision", "recall") for how in ("macro", "micro", "weighted")
]
NAMES = (
    *_AVERAGED, "average_precision", "f1", "jaccard", "neg_brier_score", "neg_log_loss", "precision", "recall",
    "roc_auc", "roc_auc_ovo", "roc_auc_ovr", "roc_auc_ovr_weighted", "top_k_accuracy",
)  # fmt: skip
_ALWAYS = ("macro_f1", "accuracy", "balanced_accuracy", "loss", "mcc")  # are there, by other ways
_ALSO = ("subset_accuracy", "micro_f1", "unweighted_loss", "document_loss")


class Scorer(evaluate.Metric):  # type: ignore[misc]
    """The scorer of scikit-learn that the configuration names."""

    def _info(self) -> Any:
        from datasets import Features, List, Value

        flags, numbers = List(Value("int32")), List(Value("float64"))
        features = Features({"predictions": flags, "references": flags, "probabilities": numbers})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any, probabilities: Any) -> dict[str, Any]:
        given, truth, values = map(np.array, (predictions, references, probabilities))
        if self.several and self.config_name.startswith("neg_"):
            raise UserError("it is for one label a document")  # scikit-learn takes the labels of a row for shares
        classes: Any = [np.arange(2)] * values.shape[1]
        if not self.several:
            given, truth, classes = given.argmax(1), truth.argmax(1), np.arange(values.shape[1])
        return {self.config_name: get_scorer(self.config_name)(_Answers(given, values, classes), None, truth)}


class _Answers(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What a scorer asks: a trained classifier, whose answers are known."""

    def __init__(self, given: Any, probabilities: Any, classes: Any) -> None:
        self.given, self.probabilities, self.classes_ = given, probabilities, classes

    def predict(self, _: Any) -> Any:
        """Labels given."""
        return self.given

    def predict_proba(self, _: Any) -> Any:
        """Probabilities of all labels."""
        return self.probabilities


class FurtherMetrics:
    """Metrics by the names that were `asked`.

    Attributes:
        names: name of each number that they give -> that of the metric; known when they were tried on a table.
        problems: name of a metric -> why it could not be computed, the first time.
    """

    def __init__(self, asked: Sequence[str]) -> None:
        """Load them.

        Raises:
            UserError: one is not there.
        """
        self.names, self.problems = dict[str, str](), dict[str, str]()
        self._metrics = {name: _loaded(name) for name in dict.fromkeys(asked)}

    def suit(self, labels: Sequence[str], several: bool) -> None:
        """Try them on made-up documents with these labels, `several` of them each or one.

        Raises:
            UserError: one cannot judge such a table, or its number would have the name of another.
        """
        self._labels, self._several = labels, several
        eye = np.eye(len(labels), dtype=np.bool_)
        truth = np.concatenate([eye, ~eye if several else eye])
        for name in self._metrics:
            try:
                found = self._values(name, truth, truth, (truth + 1) / (3 if several else len(labels) + 1))
            except Exception as error:
                kind = f"{len(labels)} labels, {'any number' if several else 'one'} a document"
                raise UserError(f"--metric {name} is not for this table ({kind}): {shortened(error)}") from error
            if not found or {*_ALWAYS, *_ALSO, *self.names} & {*found}:
                raise UserError(f"--metric {name} gives {', '.join(found) or 'no number'}, which is there without it")
            self.names |= dict.fromkeys(found, name)

    def __call__(self, truth: Flags, given: Flags, probabilities: Floats) -> dict[str, float]:
        """What they say of (N, K) documents: NaN, and a word in `problems`, where one fails, which ends nothing."""
        found = dict.fromkeys(self.names, np.nan)
        for name in self._metrics:
            try:
                found |= self._values(name, truth, given, probabilities)
            except Exception as error:
                self.problems.setdefault(name, shortened(error))
        return found

    def sentences(self) -> list[str]:
        """What could not be computed."""
        return [f"{name} could not be computed: {why}" for name, why in self.problems.items()]

    def _values(self, name: str, truth: Flags, given: Flags, probabilities: Floats) -> dict[str, float]:
        metric = self._metrics[name]
        metric.several, columns = self._several, dict[str, Any]()
        for column, feature in metric.features.items():
            columns[column] = self._column(column, feature, truth if column == "references" else given, probabilities)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that have no meaning: they are NaN or 0
            found: Any = {key: value for key, value in metric.compute(**columns).items() if np.isscalar(value)}
        path, _, config = name.partition(":")
        own = "_".join(filter(None, (Path(path).stem, config)))
        return {own if len(found) == 1 else f"{own}_{key}": float(value) for key, value in found.items()}

    def _column(self, name: str, feature: Any, flags: Flags, probabilities: Floats) -> Any:
        """What a metric asks for by a name and a type: numbers of labels or their names, flags, or probabilities."""
        one_each = not hasattr(feature, "feature")
        if name not in ("references", "predictions", "prediction_scores", "probabilities"):
            raise UserError(f"it asks for {name}, which a classifier does not have")
        if one_each and self._several:
            raise UserError(f"its {name} are one for each document")
        if name != "references" and "float" in (feature if one_each else feature.feature).dtype:
            if one_each and len(self._labels) != 2:
                raise UserError(f"its {name} are one for each document, which is that of the second of two labels")
            return probabilities[:, 1] if one_each else probabilities
        if not one_each:
            return flags.astype(np.int32)
        numbers = flags.argmax(1)
        return [self._labels[number] for number in numbers] if feature.dtype == "string" else numbers


def _loaded(name: str) -> Any:
    path, _, config = name.partition(":")
    if name in NAMES:
        return Scorer(name, keep_in_memory=True)
    evaluate.config.HF_EVALUATE_OFFLINE |= constants.HF_HUB_OFFLINE
    try:
        return evaluate.load(path, config or None, module_type="metric", keep_in_memory=True)
    except Exception as error:  # of many kinds
        known = (*_ALWAYS, *NAMES)
        raise UserError(
            f"--metric {name} cannot be loaded ({shortened(error)}){nearest(name, known) or ';'} --metric takes "
            f"{', '.join(known)}, the path of a metric's script, or a name on the Hub where that can be reached"
        ) from error
