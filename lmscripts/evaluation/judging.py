"""Judging a classifier on a part of a split: logits of every row from all processes, then metrics of its documents.

Batches are the same for any number of processes, and batch n is computed by process n % world. A process puts what it
computed in its places of an array of zeros, and the arrays are added: every process has the logits of all rows then,
with the same bits as if one had computed them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmscripts.data.labelled_rows import Part, by_length, collate
from lmscripts.data.loader import to_device
from lmscripts.errors import UserError
from lmscripts.evaluation import aggregate, calibration, metrics
from lmscripts.models.classifier import ClassifierSettings
from lmscripts.objectives.labels import ClassifierObjective
from lmscripts.training.processes import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    objective: ClassifierObjective,
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
    world, rank = accelerator.num_processes, accelerator.process_index
    batches, num_labels = by_length(part.lengths, batch_size), part.truth.shape[1]
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    answers = torch.zeros(part.num_rows, num_labels + 1, dtype=dtype, device=accelerator.device)
    was_training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(batches), world):
                if first + rank < len(batches):
                    rows = batches[first + rank]
                    batch = to_device(collate(part, rows, pad_id), accelerator.device)
                    with accelerator.autocast():
                        logits = objective.logits(batch)
                    losses, _ = objective.row_losses(logits, batch["truth"])
                    found = torch.cat([logits, losses[:, None]], 1).to(dtype)
                    answers[torch.from_numpy(rows).to(accelerator.device)] = found
                if sum_over_processes(accelerator, [float(stop_requested())])[0]:
                    return None
            summed: Any = accelerator.reduce(answers, "sum")
    finally:
        objective.train(was_training)
    values = summed.double().cpu().numpy()
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


def calibrate(
    answers: RowAnswers, part: Part, settings: ClassifierSettings
) -> tuple[float, tuple[float, ...] | None, list[str]]:
    """Temperature, and thresholds where a document may have several labels, fitted on the documents of a part.

    A temperature at the end of its range says that the part is too small to tell (all of it right, as a rule): 1 is
    kept then, as the fit would make the probabilities all or nothing.

    Returns:
        Temperature, thresholds, and a sentence where the temperature could not be fitted.
    """
    places, logits = logits_of_documents(answers, part, settings)
    truth, said = part.truth[places], list[str]()
    temperature = calibration.fit_temperature(logits, truth if settings.multi_label else truth.argmax(1))
    if temperature in calibration.TEMPERATURE_BOUNDS:
        said = [f"{len(places):,} validation documents do not tell how sure the model may be: temperature 1 is kept"]
        temperature = 1.0
    if not settings.multi_label:
        return temperature, None, said
    probabilities = aggregate.calibrated(logits, True, temperature)
    return temperature, tuple(map(float, calibration.tune_thresholds(probabilities, truth))), said


def best_shares(part: Part, multi_label: bool) -> dict[str, float]:
    """What the shares among a part's metrics are when all its documents are right; NaN for what it cannot tell."""
    truth = part.truth[np.unique(part.owners)]
    thresholds = np.full(truth.shape[1], 0.5) if multi_label else None
    return _shares(truth, truth.astype(np.float64), thresholds)


def _likelihood(probabilities: Floats, truth: NDArray[np.bool_], multi_label: bool) -> float:
    """In nats; of several labels the mean over them, as they are trained."""
    labels = truth if multi_label else truth.argmax(1)
    total = calibration.negative_log_likelihood(probabilities, labels)
    return total / truth.shape[1] if multi_label else total


def _shares(truth: NDArray[np.bool_], probabilities: Floats, thresholds: Floats | None) -> dict[str, float]:
    decided = calibration.decisions(probabilities, thresholds)
    found = metrics.overall(metrics.tally(truth, decided), thresholds is not None)
    return {name: float(value) for name, value in found.items()}
