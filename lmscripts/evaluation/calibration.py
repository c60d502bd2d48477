"""Probabilities that mean what they say: temperature, reliability, thresholds, and when to abstain.

Labels are numbers (N,) where a row has one label, and flags (N, K) where it may have several. In the first case the
probabilities are a softmax over the labels and the confidence is the largest; in the second they are sigmoids, and
every pair of row and label is a statement of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.errors import UserError
from lmscripts.evaluation.metrics import Flags, Floats, one_hot, plain

TEMPERATURE_BOUNDS = 0.05, 20.0  # when every label is right with room to spare, the optimum would be 0
_USUAL = 0.5  # the threshold where nothing says another
_BINS = 15


def probabilities_of(logits: NDArray[Any], multi_label: bool, temperature: float = 1.0) -> Floats:
    """(N, K) softmax, or sigmoid when a row may have several labels, of (N, K) logits over the temperature."""
    from scipy.special import expit, softmax

    scaled = np.asarray(logits, dtype=np.float64) / temperature
    return np.asarray(expit(scaled) if multi_label else softmax(scaled, axis=1))


def fit_temperature(logits: NDArray[Any], labels: NDArray[Any]) -> float:
    """The temperature T > 0 for which the probabilities of (N, K) logits have the least negative log-likelihood.

    arXiv:1706.04599, section 4.2, with a bisection instead of L-BFGS: the likelihood is convex in 1/T, so the sign of
    its slope says on which side the optimum lies. It never changes which label is largest.

    Raises:
        UserError: no rows, other shapes, or logits that are not finite.
    """
    values = _checked(logits, labels, "logits")
    labels = np.asarray(labels)
    wanted = (labels if labels.ndim == 2 else one_hot(labels, values.shape[1])).astype(np.float64)

    def slope(inverse: float) -> float:
        """Derivative of the negative log-likelihood by 1/T, per row."""
        expected = probabilities_of(values, labels.ndim == 2, 1 / inverse)
        return float(((expected - wanted) * values).sum() / len(values))

    low, high = 1 / TEMPERATURE_BOUNDS[1], 1 / TEMPERATURE_BOUNDS[0]
    at_low, at_high = slope(low), slope(high)
    if at_low == at_high == 0.0:
        return 1.0  # the logits say nothing, so no temperature is better than another
    if at_high <= 0:
        return TEMPERATURE_BOUNDS[0]
    if at_low >= 0:
        return TEMPERATURE_BOUNDS[1]
    for _ in range(60):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(1 / np.sqrt(low * high))


def negative_log_likelihood(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Mean over rows, in nats; for sigmoids summed over labels. A probability under 1e-12 counts as that."""
    values = np.clip(_checked(probabilities, labels, "probabilities"), 1e-12, 1.0)
    labels = np.asarray(labels)
    if labels.ndim == 1:
        return float(-np.log(values[np.arange(len(labels)), labels]).mean())
    against = np.clip(1.0 - values, 1e-12, 1.0)
    return float(-np.where(labels, np.log(values), np.log(against)).sum(1).mean())


def judged(probabilities: NDArray[Any], labels: NDArray[Any]) -> dict[str, Any]:
    """Confidence against truth, in values for JSON.

    Of (N,) label numbers the statements are the N largest probabilities, of (N, K) flags all.

    Returns:
        What `reliability` says of the statements, and "nll", the `negative_log_likelihood`.

    Raises:
        UserError: no rows, other shapes, or probabilities that are not finite.
    """
    values, labels = _checked(probabilities, labels, "probabilities"), np.asarray(labels)
    if labels.ndim == 1:
        confidence, came_true = values.max(1), values.argmax(1) == labels
    else:
        confidence, came_true = values.ravel(), labels.astype(np.bool_).ravel()
    return {**reliability(in_bins(confidence, came_true)), "nll": negative_log_likelihood(values, labels)}


def in_bins(confidence: NDArray[Any], came_true: NDArray[Any]) -> Floats:
    """(3, 15) of N statements by how sure they were: how many, the sum of how sure, how many came true.

    The 15 bins have equal width; a bin has its upper limit, the first one also 0. Those of several parts may be added.
    """
    edges = np.linspace(0, 1, _BINS + 1)
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, _BINS - 1)
    summed = (np.ones(len(places)), confidence, came_true)
    return np.stack([np.bincount(places, weights=part, minlength=_BINS) for part in summed]).astype(np.float64)


def reliability(bins: Floats) -> dict[str, Any]:
    """How sure statements were against how many came true, of (3, 15) `in_bins` with at least one, for JSON.

    Returns:
        "ece", the expected calibration error, which is the mean gap between how sure and how right (arXiv:1706.04599,
        section 2); "bins", each with "low", "high", "count" of statements, and their mean "confidence" and "accuracy"
        (share that came true), None in an empty one.
    """
    count, edges = bins[0], np.linspace(0, 1, _BINS + 1)
    means = [np.divide(part, count, out=np.full(_BINS, np.nan), where=count > 0) for part in bins[1:]]
    error = np.nansum(np.abs(means[0] - means[1]) * count) / count.sum()
    names = ("low", "high", "count", "confidence", "accuracy")
    columns = (edges[:-1], edges[1:], count.astype(np.int64), *means)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return {"ece": float(error), "bins": plain(rows)}


def tune_thresholds(probabilities: NDArray[Any], labels: NDArray[Any]) -> Floats:
    """(K,) thresholds with the best F1 of each label; a row gets the label if its probability is at least that.

    A threshold lies midway between two neighbouring probabilities. Among equally good ones the nearest to one half is
    taken; a label that no row has keeps that, because nothing can be learnt about it.

    Raises:
        UserError: no rows, other shapes, or probabilities that are not finite.
    """
    flags = np.asarray(labels)
    if flags.ndim != 2:
        raise UserError(f"thresholds are for several labels a row: labels must be rows x labels, not {flags.shape}")
    values, flags = _checked(probabilities, flags, "probabilities"), flags.astype(np.bool_)
    found = np.full(values.shape[1], _USUAL)
    for label in np.flatnonzero(flags.any(0)):
        order = np.argsort(-values[:, label], kind="stable")
        falling, given = values[order, label], np.arange(1, len(values) + 1)
        scores = 2 * np.cumsum(flags[order, label]) / (given + flags[:, label].sum())
        # After the last of equal probabilities only: a threshold cannot stand between equals.
        ends = np.append(falling[1:] < falling[:-1], True)
        below = np.append(falling[1:], 0.0)
        # The interval (below, value] gives the same decisions; the usual threshold is best where it lies within.
        midway = np.where((below < _USUAL) & (falling >= _USUAL), _USUAL, (falling + below) / 2)
        best = midway[ends][scores[ends] >= scores[ends].max() - 1e-12]
        found[label] = best[np.abs(best - _USUAL).argmin()]
    return found


def choose_thresholds(recorded: Any, labels: Sequence[str], validation: tuple[Any, Any] | None) -> tuple[Floats, str]:
    """(K,) thresholds of a run, and a sentence where they are not its own.

    They are what it `recorded` (a list in the order of the labels, or {name: threshold}), else tuned on (N, K)
    probabilities and flags of its validation part, else one half.
    """
    own = [recorded.get(label) for label in labels] if isinstance(recorded, Mapping) else recorded
    if isinstance(own, list) and len(own) == len(labels) and all(isinstance(one, (int, float)) for one in own):
        return np.array(own, dtype=np.float64), ""
    if validation is None:
        text = "The run recorded neither thresholds nor validation predictions: 0.5 was taken for all labels."
        return np.full(len(labels), _USUAL), text
    return tune_thresholds(*validation), "The run recorded no thresholds: they were tuned on its validation documents."


def decisions(probabilities: NDArray[Any], thresholds: NDArray[Any] | None) -> Flags:
    """(N, K) labels given: all that reach their thresholds, or without thresholds the likeliest alone."""
    values = np.asarray(probabilities)
    return one_hot(values.argmax(1), values.shape[1]) if thresholds is None else np.asarray(values >= thresholds)


def coverage_accuracy(confidence: NDArray[Any], right: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """What is gained by leaving the least sure rows to a human.

    Rows of equal confidence are taken or left together, since no threshold tells them apart. Of the confidence of (N,)
    decisions, and whether each is right: the share of rows that are decided, rising; the share of those that is right;
    the confidence of the least sure of them.
    """
    order = np.argsort(-np.asarray(confidence), kind="stable")
    falling, number = np.asarray(confidence)[order], np.arange(1, len(order) + 1)
    ends = np.append(falling[1:] < falling[:-1], True)
    accuracy = np.cumsum(np.asarray(right, dtype=np.float64)[order]) / number
    return number[ends] / len(falling), accuracy[ends], falling[ends]


def coverage_points(probabilities: NDArray[Any], labels: NDArray[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Accuracy when at least all, 95, 90, 80, 70, 50 % of the rows are decided, and the curve, for JSON."""
    values = _checked(probabilities, labels, "probabilities")
    share, accuracy, confidence = coverage_accuracy(values.max(1), values.argmax(1) == labels)
    points = []
    for least in (1.0, 0.95, 0.9, 0.8, 0.7, 0.5):
        place = min(int(np.searchsorted(share, least - 1e-9)), len(share) - 1)
        point = {"coverage": share[place], "accuracy": accuracy[place], "confidence": confidence[place]}
        points.append(plain({**point, "rows": round(share[place] * len(values))}))
    kept = np.unique(np.linspace(0, len(share) - 1, 400).round().astype(int))  # enough for a line
    return points, {"coverage": plain(share[kept]), "accuracy": plain(accuracy[kept])}


def _checked(values: NDArray[Any], labels: NDArray[Any], what: str) -> Floats:
    numbers, flags = np.asarray(values, dtype=np.float64), np.asarray(labels)
    if numbers.ndim != 2 or flags.shape not in (numbers.shape[:1], numbers.shape) or not len(numbers):
        raise UserError(
            f"{what} of the shape {numbers.shape} and labels of the shape {flags.shape} give no calibration"
        )
    if not np.isfinite(numbers).all():
        raise UserError(f"{int((~np.isfinite(numbers)).sum())} of {numbers.size} {what} are not finite numbers")
    if flags.ndim == 1:
        one_hot(flags, numbers.shape[1])  # refuses numbers that are no labels
    return numbers
