"""Judging a classifier on a part of a split: logits of every row from all processes, then metrics of its documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmscripts.data.labelled_rows import Part, by_length, collate
from lmscripts.data.steps import to_device
from lmscripts.errors import UserError
from lmscripts.evaluation import aggregate, calibration, metrics
from lmscripts.evaluation.sums import judging, measure_batches
from lmscripts.models.classifier import ClassifierSettings
from lmscripts.objectives import labels

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.objectives.module import Objective

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowAnswers:
    """What a model says of the rows of a part: logits (R, K), and (R,) the loss of each row as it is trained."""

    logits: Floats
    losses: Floats


@dataclass(frozen=True)
class Judged:
    """What a model says of the documents of a part. D documents, F of which have rows.

    Attributes:
        places: (F,) places of the documents that have rows in the part's `doc_ids`.
        logits: (F, K), before the temperature.
        probabilities: (F, K), after it.
        fragment_probabilities: (R, K), after it.
        document, fragment: metrics of the documents and of the rows.
    """

    places: NDArray[np.int64]
    logits: Floats
    probabilities: Floats
    fragment_probabilities: Floats
    document: dict[str, float]
    fragment: dict[str, float]


def answer_rows(
    accelerator: Accelerator,
    objective: Objective,
    part: Part,
    batch_size: int,
    pad_id: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RowAnswers | None:
    """The model's answers to all rows of a part; every process calls it and gets the same.

    Args:
        accelerator: the running processes.
        objective: with the model, in any mode; it is left in the mode it had.
        part: the rows.
        batch_size: rows of a forward pass.
        pad_id: the padding token.
        stop_requested: asked on each process after each pass.

    Returns:
        None when a process was asked to stop before the end.

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


def logits_of_documents(answers: RowAnswers, part: Part, settings: ClassifierSettings) -> tuple[Any, Floats]:
    """(F,) places of the documents that have rows, and (F, K) their logits."""
    found = aggregate.document_logits(
        answers.logits,
        part.owners,
        len(part.doc_ids),
        settings.aggregate,
        settings.multi_label,
        part.lengths,
    )
    places = np.unique(part.owners)
    return places, found[places]


def judge(answers: RowAnswers, part: Part, settings: ClassifierSettings) -> Judged:
    """Documents and rows of a part by the answers of a model.

    Metrics are "loss" (as trained: weights and smoothing included, over rows), "unweighted_loss" (negative
    log-likelihood of the rows), and those of `lmscripts.evaluation.metrics.overall`; of documents also
    "document_loss", the negative log-likelihood of their probabilities after the temperature.
    """
    multi_label = settings.multi_label
    places, logits = logits_of_documents(answers, part, settings)
    thresholds = None
    if multi_label:
        thresholds = np.array(settings.thresholds or (0.5,) * logits.shape[1])
    probabilities = aggregate.calibrated(logits, multi_label, settings.temperature)
    of_rows = aggregate.calibrated(answers.logits, multi_label, settings.temperature)
    losses = {
        "loss": float((answers.losses * part.weights).sum() / part.weights.sum(dtype=np.float64)),
        "unweighted_loss": _likelihood(
            calibration.probabilities_of(answers.logits, multi_label), part.truth[part.owners], multi_label
        ),
    }
    truth = part.truth[places]
    document_loss = _likelihood(probabilities, truth, multi_label)
    return Judged(
        places,
        logits,
        probabilities,
        of_rows,
        losses | {"document_loss": document_loss} | _shares(truth, probabilities, thresholds),
        losses | _shares(part.truth[part.owners], of_rows, thresholds),
    )


def calibrate(answers: RowAnswers, part: Part, settings: ClassifierSettings) -> tuple[ClassifierSettings, list[str]]:
    """The settings with what is fitted on the documents of a part: temperature, and thresholds for several labels.

    A temperature at the end of its range says that the part is too small to tell (all of it right, as a rule): 1 is
    kept then, as the fit would make the probabilities all or nothing.

    Returns:
        The settings, and a sentence where the temperature could not be fitted.
    """
    places, logits = logits_of_documents(answers, part, settings)
    truth, said = part.truth[places], list[str]()
    temperature = calibration.fit_temperature(logits, truth if settings.multi_label else truth.argmax(1))
    if temperature in calibration.TEMPERATURE_BOUNDS:
        said = [f"{len(places):,} validation documents do not tell how sure the model may be: temperature 1 is kept"]
        temperature = 1.0
    thresholds = None
    if settings.multi_label:
        probabilities = aggregate.calibrated(logits, True, temperature)
        thresholds = tuple(map(float, calibration.tune_thresholds(probabilities, truth)))
    return replace(settings, temperature=temperature, thresholds=thresholds), said


def best_shares(part: Part, multi_label: bool) -> dict[str, float]:
    """What the shares among a part's metrics are when all its documents are right; NaN for what it cannot tell."""
    truth = part.truth[np.unique(part.owners)]
    thresholds = np.full(truth.shape[1], 0.5) if multi_label else None
    return _shares(truth, truth.astype(np.float64), thresholds)


def _likelihood(probabilities: Floats, truth: NDArray[np.bool_], multi_label: bool) -> float:
    """In nats; of several labels the mean over them, as they are trained."""
    total = calibration.negative_log_likelihood(probabilities, truth if multi_label else truth.argmax(1))
    return total / truth.shape[1] if multi_label else total


def _shares(truth: NDArray[np.bool_], probabilities: Floats, thresholds: Floats | None) -> dict[str, float]:
    decided = calibration.decisions(probabilities, thresholds)
    found = metrics.overall(metrics.tally(truth, decided), thresholds is not None)
    return {name: float(value) for name, value in found.items()}
