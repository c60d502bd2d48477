"""Judging a classifier: logits of rows from all processes, then one answer for each document, then metrics.

Probabilities are a softmax where a document has one label and sigmoids where it may have several. What is combined as
probabilities is given back as logits (their logarithm, or log odds), so that a temperature can be applied to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lmscripts.data.labelled_rows import Part, by_length, collate
from lmscripts.data.steps import to_device
from lmscripts.errors import UserError
from lmscripts.evaluation import calibration, metrics
from lmscripts.evaluation.metrics import Flags, Floats, Integers
from lmscripts.evaluation.sums import judging, measure_batches
from lmscripts.models.classifier import ClassifierSettings
from lmscripts.objectives import labels
from lmscripts.objectives.module import Objective

if TYPE_CHECKING:
    from lmscripts.evaluation.further import FurtherMetrics

_LEAST = 1e-9


@dataclass(frozen=True)
class RowAnswers:
    """What a model says of the rows of a part: logits (R, K), and (R,) the loss of each row as it is trained."""

    logits: Floats
    losses: Floats


@dataclass(frozen=True)
class Judged:
    """What a model says of the documents of a part, F of which have rows, and its metrics of documents and of rows."""

    places: Integers  # (F,) of the documents that have rows, in the part's `doc_ids`
    logits: Floats  # (F, K), before the temperature
    probabilities: Floats  # (F, K), after it
    fragment_probabilities: Floats  # (R, K), after it
    document: dict[str, float]
    fragment: dict[str, float]


# ---- from rows to documents --------------------------------------------------------------------------------------


def document_logits(
    logits: NDArray[Any], owners: Integers, num_documents: int, num_tokens: NDArray[Any], settings: ClassifierSettings
) -> Floats:
    """(D, K) logits of documents from the (R, K) of their rows; NaN for a document without rows.

    Combined as `settings.aggregate` says:

    - "mean_probabilities": the mean of the rows' probabilities.
    - "mean_logits": the mean of the rows' logits.
    - "max": for each label the highest probability of any row; with one label each, divided by their sum.
    - "token_weighted": the mean of the probabilities, a row counting by the tokens that the model read in it: those
      of an overlap, which it read twice, count in both rows, and the special ones count too.

    `owners` are (R,) the document of each row, `num_tokens` (R,) its tokens.
    """
    values, how = np.asarray(logits, dtype=np.float64), settings.aggregate
    weights = np.asarray(num_tokens, np.float64) if how == "token_weighted" else np.ones(len(values))
    combined = values if how == "mean_logits" else calibration.probabilities_of(values, settings.multi_label)
    shape = num_documents, values.shape[1]
    if how == "max":
        found = np.full(shape, -np.inf)
        np.maximum.at(found, owners, combined)
        found[np.isneginf(found)] = np.nan
    else:
        sums, totals = np.zeros(shape), np.zeros(num_documents)
        np.add.at(sums, owners, combined * weights[:, None])
        np.add.at(totals, owners, weights)
        found = np.divide(sums, totals[:, None], out=np.full(shape, np.nan), where=totals[:, None] > 0)
    if how == "mean_logits":
        return np.asarray(found)
    if settings.multi_label:
        bounded = np.clip(found, _LEAST, 1 - _LEAST)
        return np.asarray(np.log(bounded) - np.log1p(-bounded))
    bounded = np.maximum(found, _LEAST)
    return np.asarray(np.log(bounded / bounded.sum(1, keepdims=True)))


def calibrated(logits: Floats, settings: ClassifierSettings) -> Floats:
    """(N, K) probabilities after the temperature, as precise as they are stored (float32); NaN stays NaN."""
    found = calibration.probabilities_of(logits, settings.multi_label, settings.temperature)
    return found.astype(np.float32).astype(np.float64)


def decided(probabilities: Floats, settings: ClassifierSettings) -> Flags:
    """(N, K) labels given; none where the probabilities are NaN."""
    thresholds = np.array(settings.thresholds or (0.5,) * probabilities.shape[1]) if settings.multi_label else None
    return calibration.decisions(probabilities, thresholds) & ~np.isnan(probabilities).any(1, keepdims=True)


def names_of(flags: Flags, labels: list[str]) -> list[list[str]]:
    """Names of the labels of each of (N, K) rows."""
    return [[labels[place] for place in np.flatnonzero(row)] for row in flags]


LAST_EPOCH = "The best epoch was the last one: more epochs may make it better."


def told_apart(truth: Flags, given: Flags, labels: list[str]) -> list[str]:
    """A sentence where (N, K) documents of several labels are all given the same one, or none."""
    if truth.any(0).sum() < 2 or given.any(0).sum() > 1:
        return []
    said = f"another label than {labels[given.any(0).argmax()]!r:.60}" if given.any() else "any label"
    return [f"The run gives no test document {said}: it does not tell them apart."]


# ---- a part of a split -------------------------------------------------------------------------------------------


def answer_rows(
    accelerator: Accelerator,
    objective: Objective,
    part: Part,
    batch_size: int,
    pad_id: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RowAnswers | None:
    """The model's answers to all rows of a part; every process calls it and gets the same.

    `objective` may be in any mode and is left in it. None when a process was asked to stop before the end.

    Raises:
        UserError: logits that are not finite numbers.
    """
    batches, num_labels = by_length(part.lengths, batch_size), part.truth.shape[1]

    def measure(number: int) -> torch.Tensor:
        batch = to_device(collate(part, batches[number], pad_id), accelerator.device)
        with accelerator.autocast():
            logits = labels.logits(objective, batch)
        losses, _ = labels.row_losses(objective, logits, batch["truth"])
        found = logits.new_zeros(batch_size, num_labels + 1)  # the last batch may have fewer rows
        found[: len(logits)] = torch.cat([logits, losses[:, None]], 1)
        return found.flatten()

    with judging(objective):
        measured = measure_batches(accelerator, len(batches), measure, stop_requested)
    if measured is None:
        return None
    values = np.empty((part.num_rows, num_labels + 1))
    values[np.concatenate(batches)] = measured.view(-1, num_labels + 1)[: part.num_rows].cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            f"the model gives logits that are not finite numbers for {int((~np.isfinite(values)).any(1).sum())} of "
            f"{len(values)} rows: lower the learning rate or look at its weights"
        )
    return RowAnswers(values[:, :-1], values[:, -1])


def _documents(answers: RowAnswers, part: Part, settings: ClassifierSettings) -> tuple[Integers, Floats]:
    """(F,) places of the documents that have rows, and (F, K) their logits."""
    found = document_logits(answers.logits, part.owners, len(part.doc_ids), part.lengths, settings)
    places = np.unique(part.owners)
    return places, found[places]


def judge(
    answers: RowAnswers, part: Part, settings: ClassifierSettings, further: FurtherMetrics | None = None
) -> Judged:
    """Documents and rows of a part by the answers of a model.

    Metrics are "loss" (as trained: weights and smoothing included, over rows), "unweighted_loss" (negative
    log-likelihood of the rows), and those of `lmscripts.evaluation.metrics.overall`; of documents also
    "document_loss", the negative log-likelihood of their probabilities after the temperature, and `further` ones.
    """
    places, logits = _documents(answers, part, settings)
    probabilities, of_rows = calibrated(logits, settings), calibrated(answers.logits, settings)
    truth, truth_of_rows = part.truth[places], part.truth[part.owners]
    uncalibrated = calibration.probabilities_of(answers.logits, settings.multi_label)
    losses = {
        "loss": float((answers.losses * part.weights).sum() / part.weights.sum(dtype=np.float64)),
        "unweighted_loss": _likelihood(uncalibrated, truth_of_rows, settings),
    }
    document = losses | {"document_loss": _likelihood(probabilities, truth, settings)}
    given = decided(probabilities, settings)
    document |= _shares(truth, given, settings.multi_label)
    document |= further(truth, given, probabilities) if further is not None else {}
    fragment = losses | _shares(truth_of_rows, decided(of_rows, settings), settings.multi_label)
    return Judged(places, logits, probabilities, of_rows, document, fragment)


def calibrate(answers: RowAnswers, part: Part, settings: ClassifierSettings) -> tuple[ClassifierSettings, list[str]]:
    """The settings with what is fitted on the documents of a part: temperature, and thresholds for several labels.

    A temperature at the end of its range says that the part is too small to tell (all of it right, as a rule): 1 is
    kept then, as the fit would make the probabilities all or nothing.

    Returns:
        The settings, and a sentence where the temperature could not be fitted.
    """
    places, logits = _documents(answers, part, settings)
    truth, said = part.truth[places], list[str]()
    temperature = calibration.fit_temperature(logits, truth if settings.multi_label else truth.argmax(1))
    if temperature in calibration.TEMPERATURE_BOUNDS:
        said = [f"{len(places):,} validation documents do not tell how sure the model may be: temperature 1 is kept"]
        temperature = 1.0
    settings = replace(settings, temperature=temperature, thresholds=None)
    if settings.multi_label:
        tuned = calibration.tune_thresholds(calibrated(logits, settings), truth)
        settings = replace(settings, thresholds=tuple(map(float, tuned)))
    return settings, said


def best_shares(part: Part, multi_label: bool) -> dict[str, float]:
    """What the shares among a part's metrics are when all its documents are right; NaN for what it cannot tell."""
    truth = part.truth[np.unique(part.owners)]
    return _shares(truth, truth, multi_label)


def _likelihood(probabilities: Floats, truth: Flags, settings: ClassifierSettings) -> float:
    """In nats; of several labels the mean over them, as they are trained."""
    if settings.multi_label:
        return calibration.negative_log_likelihood(probabilities, truth) / int(truth.shape[1])
    return calibration.negative_log_likelihood(probabilities, truth.argmax(1))


def _shares(truth: Flags, given: Flags, multi_label: bool) -> dict[str, float]:
    found = metrics.overall(metrics.tally(truth, given), multi_label)
    return {name: float(value) for name, value in found.items()}
