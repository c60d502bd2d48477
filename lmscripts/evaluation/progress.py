"""Where a run of the classifier stands: its state, the best weights so far, and what the database says of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import broadcast
from transformers import PreTrainedModel

from lmscripts.data.labelled_rows import Part
from lmscripts.data.labelled_store import Database, RunKey
from lmscripts.errors import UserError
from lmscripts.evaluation.judging import RowAnswers, best_shares, calibrate, judge
from lmscripts.evaluation.metrics import plain
from lmscripts.files import new_folder, remove_leftovers
from lmscripts.models.classifier import ClassifierSettings
from lmscripts.objectives.labels import ClassifierObjective
from lmscripts.training import checkpoint as checkpoints
from lmscripts.training.folder import TrainingState, read_state
from lmscripts.training.resume import load_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class ClassifierState(TrainingState):
    """Where a run stands.

    Attributes:
        run_id: its number in the database.
        key: drawn at random when it was entered there; another run may have its number in another database.
        best_epoch: the epoch with the best validation metric, from 1; 0 before there is one.
        best_value: that metric.
        history: a record for each epoch, for the statistics.
        epoch_sums, epoch_counts: of the objective since the epoch began, over all processes.
    """

    run_id: int = 0
    key: str = ""
    best_epoch: int = 0
    best_value: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_counts: dict[str, float] = field(default_factory=dict)

    @property
    def entry(self) -> RunKey:
        """What it writes into the database by."""
        return RunKey(self.run_id, self.key)

    def open_epoch(self, process: int) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts of the epoch to go on with; the sums belong to the first process."""
        return {name: value * (process == 0) for name, value in self.epoch_sums.items()}, dict(self.epoch_counts)

    def is_better(self, metric: str, value: float | None) -> bool:
        """Whether an epoch's value is better than the best before; of equal ones the first is kept, None never is."""
        if value is None or not np.isfinite(value):
            return False
        if self.best_value is None:
            return True
        return value < self.best_value if metric == "loss" else value > self.best_value

    def is_stale(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs were no better than the best before them; never without a best one."""
        return patience is not None and self.best_epoch > 0 and len(self.history) - self.best_epoch >= patience


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


# ---- the metric that chooses -------------------------------------------------------------------------------------


def check_metric(metric: str, default: str, validation: Part, multi_label: bool) -> list[str]:
    """Whether the validation part can say which epoch is the best; asked before training.

    Args:
        metric: that is to say it.
        default: the metric that is taken when none is asked for.
        validation: the validation part.
        multi_label: a document may have several labels.

    Returns:
        A sentence where it cannot, so that the last weights will be taken.

    Raises:
        UserError: another metric than the default was asked for and there is no validation part, or the metric does
            not exist.
    """
    if not validation.num_rows:
        if metric != default:
            raise UserError(
                f"--metric {metric} chooses the best epoch on the validation part, and there is none: give "
                "--validation_share or --validation_file, or leave out --metric"
            )
        return ["there is no validation part: the last weights will be taken"]
    found = {"loss": 0.0} | best_shares(validation, multi_label)
    if np.isfinite(found[_known(found, metric, multi_label)]):
        return []
    truth = validation.truth[np.unique(validation.owners)]
    return [
        f"beware: {metric} cannot be computed on the validation part, whose {len(truth):,} documents have "
        f"{int(truth.any(0).sum())} of the {truth.shape[1]} labels: no epoch will be the best, the last weights are "
        "taken, and --patience has no effect"
    ]


def chosen_value(record: Mapping[str, Any], metric: str, multi_label: bool) -> float | None:
    """What says how good an epoch is; None without a validation part, or where it is undefined there."""
    found = record["validation"]
    value: float | None = found[_known(found, metric, multi_label)] if found else None
    return value


def _known(found: Mapping[str, Any], metric: str, multi_label: bool) -> str:
    """The name of a metric among those that were computed."""
    name = "subset_accuracy" if multi_label and metric == "accuracy" else metric
    if name not in found:
        which = "several labels a row" if multi_label else "one label a row"
        raise UserError(f"--metric {metric} does not exist for {which}: choose among {', '.join(found)}")
    return name


# ---- the database ------------------------------------------------------------------------------------------------


def open_run(
    database: Database,
    state: ClassifierState,
    name: str,
    model_dir: Path,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    origin: str,
) -> RunKey:
    """Enter a run into the database, or find it there when it is continued.

    A row with the number of the run may be another's, where the database was built anew since: the key tells.

    Args:
        database: the file of the task.
        state: of the run, from its checkpoint if there is one.
        name: of the run.
        model_dir: folder of its model, which no other process may be writing.
        options: of the script.
        facts: whatever else is known of it.
        origin: what the task was made from when it was opened.

    Returns:
        Its number and its key.

    Raises:
        UserError: the database was built anew from something else since.
    """
    if state.run_id and state.key and database.go_on_with_run(state.entry):
        return state.entry
    run = database.start_run(name, options, facts, model_dir=model_dir, origin=origin)
    for record in state.history:  # what the other database knew
        _write_epoch(database, run, record["step"], record)
    return run


@contextmanager
def failing(database: Database, state: ClassifierState, is_main: bool) -> Iterator[None]:
    """Write "failed" into the database if the block ends with an error; the end of the process is none."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException:
        if is_main:
            with suppress(UserError, OSError):  # the error itself is what has to be shown
                database.end_run(state.entry, "failed")
        raise


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

    Where a document may have several labels it is judged with temperature and thresholds fitted on the validation
    part, as the model would be exported after this epoch: with others, another epoch would be the best.

    Args:
        database: the file of the task.
        state: of the run.
        epoch: its number, from 1.
        trained: metrics of its training rows, as they were met.
        validation: the validation part.
        answers: the model's answers to it; None without one.
        settings: of the classifier, before calibration.

    Returns:
        Its record for the statistics: "epoch", "step", "train" and "validation" metrics.

    Raises:
        UserError: the database does not hold the run any more.
    """
    judged: dict[str, float] = {}
    if answers is not None:
        if settings.multi_label:
            temperature, thresholds, _ = calibrate(answers, validation, settings)
            settings = replace(settings, temperature=temperature, thresholds=thresholds)
        judged = judge(answers, validation, settings).document
    record: dict[str, Any] = plain({"epoch": epoch, "step": state.step, "train": dict(trained), "validation": judged})
    _write_epoch(database, state.entry, state.step, record)
    return record


def _write_epoch(database: Database, run: RunKey, step: int, record: Mapping[str, Any]) -> None:
    for part in ("train", "validation"):
        known = {name: value for name, value in record[part].items() if value is not None}
        database.write_epoch(run, record["epoch"], step, part, known)


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
