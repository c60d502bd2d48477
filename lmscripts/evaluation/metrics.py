"""How right a classifier is, with intervals: every number here is made of the counts in a `Tally`.

One label a row and several labels a row are the same thing: truth and decision are (N, K) boolean arrays over N rows
and K labels. Where a number has no meaning (the precision of a label that nobody predicted) it is NaN in arrays and
None in what `plain` makes of them, never 0 and never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Measured = tuple[dict[str, Any], dict[str, Floats]]  # see `measured`

_CELLS_AT_ONCE = 4_000_000  # counts of resamples times units that are in memory at once: 32 MB


@dataclass(frozen=True)
class Tally:
    """Counts of some rows, or with a leading axis of R resamples of them."""

    support: Floats  # (..., K) rows that have the label
    predicted: Floats  # (..., K) rows that were given it
    hits: Floats  # (..., K) rows of which both is true
    exact: Floats  # (...,) rows whose labels are all right
    rows: Floats  # (...,) rows


def one_hot(labels: NDArray[Any], num_labels: int) -> Flags:
    """(N, K) flags of (N,) label numbers.

    Raises:
        UserError: a number is not one of the labels.
    """
    labels = np.asarray(labels)
    if labels.size and not (labels.min() >= 0 and labels.max() < num_labels):
        raise UserError(f"label numbers run from {labels.min()} to {labels.max()}, but there are {num_labels} labels")
    flags = np.zeros((labels.size, num_labels), dtype=np.bool_)
    flags[np.arange(labels.size), labels] = True
    return flags


def tally(truth: Flags, decided: Flags) -> Tally:
    """Counts of all rows, of which (N, K) says what labels they have and what labels they were given."""
    return _as_tally(np.asarray(_contributions(truth, decided).sum(axis=0), dtype=np.float64).reshape(-1))


def resampled_tally(truth: Flags, decided: Flags, units: NDArray[Any], resamples: int = 2000, seed: int = 0) -> Tally:
    """Counts of resamples of as many of the (N,) units of the rows, drawn with replacement (Efron's bootstrap).

    Rows of one unit (a document, or what the split kept together with it) are drawn together: the fragments of a text
    are alike, and so are the texts of an author, and intervals that took them for independent would be too narrow.
    Which units are drawn depends on seed and number of units alone, so that two classifiers on the same units (numbered
    alike) are compared on the same samples.
    """
    from scipy.sparse import csr_matrix

    _, owners = np.unique(units, return_inverse=True)
    rows, count = len(owners), int(owners.max()) + 1 if len(owners) else 0
    if count == 0:
        raise UserError("there are no documents to draw samples from")
    grouping = csr_matrix((np.ones(rows), (owners, np.arange(rows))), shape=(count, rows))
    features = (grouping @ _contributions(truth, decided)).T.tocsr()
    random, parts = np.random.default_rng(seed), []
    at_once = max(1, _CELLS_AT_ONCE // count)
    for first in range(0, resamples, at_once):
        number = min(at_once, resamples - first)
        drawn = random.integers(0, count, (number, count)) + count * np.arange(number)[:, None]
        times = np.bincount(drawn.ravel(), minlength=number * count).reshape(number, count)
        parts.append(np.asarray(features @ times.T.astype(np.float64)).T)
    return _as_tally(np.concatenate(parts))


def overall(counts: Tally, multi_label: bool) -> dict[str, Floats]:
    """Numbers for all labels together, each of shape (...,).

    One label a row: accuracy, balanced accuracy (mean recall of the labels that occur), macro F1 and Matthews'
    correlation (Gorodkin 2004, for K labels; 0 where all rows were given one label). Several: subset accuracy (all
    labels of the row right), micro F1, macro F1. Macro F1 is the mean over labels that occur or were given, so a label
    that is absent from truth and decisions does not count. Rows that all have one label cannot show whether labels are
    told apart: balanced accuracy and Matthews' correlation are NaN then.
    """
    each = per_label(counts)
    macro_f1 = _mean_of_defined(each["f1"])
    if multi_label:
        micro = _ratio(2 * counts.hits.sum(-1), counts.support.sum(-1) + counts.predicted.sum(-1))
        return {"subset_accuracy": _ratio(counts.exact, counts.rows), "micro_f1": micro, "macro_f1": macro_f1}
    rows, right = counts.rows, counts.hits.sum(-1)
    together = right * rows - (counts.support * counts.predicted).sum(-1)
    spread = (rows**2 - (counts.predicted**2).sum(-1)) * (rows**2 - (counts.support**2).sum(-1))
    correlation = np.where(spread > 0, together / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)
    is_mixed = (counts.support > 0).sum(-1) > 1
    return {
        "accuracy": _ratio(right, rows),
        "balanced_accuracy": np.where(is_mixed, _mean_of_defined(each["recall"]), np.nan),
        "macro_f1": macro_f1,
        "mcc": np.where(is_mixed, correlation, np.nan),
    }


def per_label(counts: Tally) -> dict[str, Floats]:
    """Precision, recall and F1 of each label, (..., K).

    NaN: the precision of a label that was never given, the recall of one that never occurs, the F1 of one that does
    neither.
    """
    return {
        "precision": _ratio(counts.hits, counts.predicted),
        "recall": _ratio(counts.hits, counts.support),
        "f1": _ratio(2 * counts.hits, counts.support + counts.predicted),
    }


def interval(values: Floats) -> list[float] | None:
    """The middle 95 % of (R,) resampled values that are defined: percentile interval; None where none is."""
    defined, tail = values[~np.isnan(values)], 50 * (1 - 0.95)
    return [float(bound) for bound in np.percentile(defined, [tail, 100 - tail])] if len(defined) else None


def confusion_matrix(truth: NDArray[Any], decided: NDArray[Any], num_labels: int) -> Integers:
    """(K, K) rows by true label (line) and decided label (column), of (N,) label numbers each."""
    return np.bincount(truth * num_labels + decided, minlength=num_labels**2).reshape(num_labels, num_labels)


def by_row(matrix: Integers) -> Floats:
    """(K, K) shares of each line of a confusion matrix; NaN in the line of a label that never occurs."""
    return _ratio(matrix, matrix.sum(1, keepdims=True))


def plain(value: Any) -> Any:
    """The same in values that JSON knows: no array, and None for a number that is none."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def measured(
    truth: Flags, decided: Flags, units: NDArray[Any], multi_label: bool, resamples: int = 2000, seed: int = 0
) -> Measured:
    """Everything about some decisions in values for JSON, and the resampled values of the overall numbers.

    Truth, decisions, units and samples of units are those of `resampled_tally`.

    Returns:
        {"units", "rows", "metrics": {name: {"value", "interval"}}, "per_label": [...]} and {name: (R,)}. Intervals
        are None when there is one unit: it says nothing about others.
    """
    counts, number = tally(truth, decided), len(np.unique(units))
    drawn = resampled_tally(truth, decided, units, resamples, seed)
    samples, each, each_sample = overall(drawn, multi_label), per_label(counts), per_label(drawn)

    def pair(value: Any, sample: Floats) -> dict[str, Any]:
        return {"value": plain(value), "interval": interval(sample) if number > 1 else None}

    labels = [
        {
            **{name: int(getattr(counts, name)[label]) for name in ("support", "predicted", "hits")},
            **{name: pair(each[name][label], each_sample[name][:, label]) for name in each},
        }
        for label in range(truth.shape[1])
    ]
    metrics = {name: pair(value, samples[name]) for name, value in overall(counts, multi_label).items()}
    return {"units": number, "rows": len(truth), "metrics": metrics, "per_label": labels}, samples


def differences(first: Measured, second: Measured) -> dict[str, Any]:
    """First minus second of overall numbers, with paired intervals: both sides on the same samples of units.

    Both have been `measured` on units numbered alike, with the same seed and number of samples.
    """
    found = {}
    for name, own in first[0]["metrics"].items():
        values = own["value"], second[0]["metrics"][name]["value"]
        bounds = own["interval"] and interval(first[1][name] - second[1][name])
        found[name] = {"value": None if None in values else values[0] - values[1], "interval": bounds}
    return found


def surest_mistakes(probabilities: Floats, truth: Flags, decided: Flags, multi_label: bool) -> list[tuple[int, int]]:
    """(row, label) of the rows whose labels are not all right, the surest mistake first.

    With one label a row, the label that was wrongly given. With several, the label about which the classifier was
    surest and wrong: given with a high probability, or missed (the row has it) with a low one. All are (N, K).
    """
    sure = np.where(decided & ~truth, probabilities, -1.0)
    if multi_label:
        sure = np.where(truth & ~decided, 1.0 - probabilities, sure)
    labels = sure.argmax(1)
    top = sure[np.arange(len(sure)), labels]
    return [(int(row), int(labels[row])) for row in np.argsort(-top, kind="stable") if top[row] >= 0]


def _contributions(truth: Flags, decided: Flags) -> Any:
    """(N, 3K + 2) sparse: what each row adds to support, predicted, hits, exact and rows."""
    from scipy.sparse import csr_matrix, hstack

    truth, decided = np.asarray(truth, dtype=np.bool_), np.asarray(decided, dtype=np.bool_)
    if truth.shape != decided.shape or truth.ndim != 2:
        raise UserError(f"truth has the shape {truth.shape}, the decisions {decided.shape}; both must be rows x labels")
    exact = (truth == decided).all(1, keepdims=True)
    parts = (truth, decided, truth & decided, exact, np.ones_like(exact))
    return hstack([csr_matrix(part.astype(np.float64)) for part in parts], format="csr")


def _as_tally(sums: Floats) -> Tally:
    labels = (sums.shape[-1] - 2) // 3
    support, predicted, hits = np.split(sums[..., : 3 * labels], 3, axis=-1)
    return Tally(support, predicted, hits, sums[..., -2], sums[..., -1])


def _ratio(over: NDArray[Any], under: NDArray[Any]) -> Floats:
    over, under = np.broadcast_arrays(np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64))
    return np.asarray(np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0))


def _mean_of_defined(values: Floats) -> Floats:
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(-1), defined.sum(-1))
