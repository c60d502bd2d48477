"""Where a run of the classifier stands: its state, the best weights so far, and what the database says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast
from transformers import PreTrainedModel

from lmscripts import checkpoint as checkpoints
from lmscripts.classification.batches import Part
from lmscripts.classification.classifier import ClassifierObjective, ClassifierSettings
from lmscripts.classification.database import Database
from lmscripts.classification.judging import RowAnswers, judge
from lmscripts.classification.metrics import plain
from lmscripts.errors import UserError
from lmscripts.files import new_folder, remove_leftovers
from lmscripts.resume import load_weights
from lmscripts.run_folder import TrainingState, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class ClassifierState(TrainingState):
    """Where a run stands.

    Attributes:
        run_id: its number in the database.
        best_epoch: the epoch with the best validation metric, from 1; 0 before there is one.
        best_value: that metric.
        history: a record for each epoch, for the statistics.
        epoch_sums, epoch_counts: of the objective since the epoch began, over all processes.
    """

    run_id: int = 0
    best_epoch: int = 0
    best_value: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_counts: dict[str, float] = field(default_factory=dict)

    def open_epoch(self, process: int) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts of the epoch to go on with; the sums belong to the first process."""
        return {name: value * (process == 0) for name, value in self.epoch_sums.items()}, dict(self.epoch_counts)

    def is_better(self, metric: str, value: float) -> bool:
        """Whether an epoch's value is better than the best before; of equal ones the first is kept."""
        if not np.isfinite(value):
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if metric == "loss" else value > self.best_value

    def is_stale(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs were no better than the best before them."""
        return patience is not None and len(self.history) - self.best_epoch >= patience


def restore(
    accelerator: Accelerator, objective: ClassifierObjective, optimizer: Any, source: Path | None
) -> ClassifierState:
    """Put optimizer, loss scaler and progress back; the weights are loaded before the model is prepared."""
    if source is None:
        return ClassifierState()
    facts = read_state(source)
    checkpoints.load_optimizer_state(optimizer, objective, source / "optimizer.safetensors", facts["groups"])
    if accelerator.scaler is not None and facts["scaler"] is not None:
        accelerator.scaler.load_state_dict(facts["scaler"])
    return ClassifierState(**facts["progress"])


# ---- the best weights so far -------------------------------------------------------------------------------------


def keep_best(run_dir: Path, epoch: int, model: PreTrainedModel) -> None:
    """Write the weights of an epoch aside; earlier ones stay until no checkpoint names them."""
    folder = run_dir / f"best-{epoch}"
    shutil.rmtree(folder, ignore_errors=True)  # of an epoch that was repeated after a stop
    remove_leftovers(folder)
    with new_folder(folder) as aside:
        model.save_pretrained(aside)


def prune_best(run_dir: Path) -> None:
    """Remove best weights that no checkpoint names any more."""
    named = {read_state(folder)["progress"]["best_epoch"] for folder in checkpoints.list_checkpoints(run_dir)}
    for folder in run_dir.glob("best-*"):
        if folder.name.removeprefix("best-") not in map(str, named):
            shutil.rmtree(folder, ignore_errors=True)


def load_best(accelerator: Accelerator, objective: ClassifierObjective, run_dir: Path, epoch: int) -> None:
    """Load the weights of the best epoch on the main process and hand them to the others.

    Raises:
        UserError: on the main process, they are not there.
    """
    if accelerator.is_main_process:
        load_weights(objective.models, run_dir / f"best-{epoch}")
    if accelerator.num_processes > 1:
        for tensor in objective.classifier.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))


# ---- the database ------------------------------------------------------------------------------------------------


def open_run(
    database: Database,
    run_id: int,
    name: str,
    model_dir: Path,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> int:
    """Enter a run into the database, or find it there when it is continued; returns its number."""
    if run_id:
        try:
            database.end_run(run_id, "running")
            return run_id
        except UserError:
            pass  # the database was built anew since
    ids = {"tok_id": database.tok_id, "split_id": database.split_id}
    return database.start_run(name, options, facts, **ids, model_dir=model_dir)


def close_epoch(
    database: Database,
    state: ClassifierState,
    epoch: int,
    trained: Mapping[str, float],
    validation: Part,
    answers: RowAnswers | None,
    settings: ClassifierSettings,
) -> dict[str, Any]:
    """Write an epoch into the database; called by the main process.

    Args:
        database: the file of the task.
        state: of the run.
        epoch: its number, from 1.
        trained: metrics of its training rows, as they were met.
        validation: the validation part.
        answers: the model's answers to it; None without one.
        settings: of the classifier.

    Returns:
        Its record for the statistics: "epoch", "step", "train" and "validation" metrics.
    """
    judged = {} if answers is None else judge(answers, validation, settings).document
    found = {"train": dict(trained), "validation": judged}
    for part, metrics in found.items():
        known = {name: value for name, value in metrics.items() if np.isfinite(value)}
        database.write_epoch(state.run_id, epoch, state.step, part, known)
    record: dict[str, Any] = plain({"epoch": epoch, "step": state.step, **found})
    return record


def epoch_in_words(record: Mapping[str, Any], metric: str, say: Callable[[Mapping[str, float]], str]) -> str:
    """A line on an epoch: training, validation, and the metric by which the best epoch is found."""
    words = [f"epoch {record['epoch']}: training {say(record['train'])}"]
    if found := record["validation"]:
        shown = {name: found[name] for name in ("loss", "accuracy", "subset_accuracy") if name in found}
        chosen = (
            "" if metric in shown or found.get(metric) is None else f", {metric.replace('_', ' ')} {found[metric]:.4f}"
        )
        words.append(f"validation {say(shown)}{chosen}")
    return "; ".join(words)
