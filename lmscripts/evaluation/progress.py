"""Where a run of the classifier stands beside its steps: the best epoch so far, and what the database says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast

from lmscripts.data.labelled_rows import Part
from lmscripts.data.labelled_store import Database, RunKey
from lmscripts.errors import UserError
from lmscripts.evaluation.judging import RowAnswers, best_shares, calibrate, judge
from lmscripts.evaluation.metrics import plain
from lmscripts.models.classifier import ClassifierSettings
from lmscripts.objectives.module import Objective
from lmscripts.training.checkpoint import load_weights


@dataclass
class ClassifierProgress:
    """The classifier's part of `lmscripts.training.state.TrainingState`."""

    run_id: int = 0  # its number in the database
    key: str = ""  # drawn at random when it was entered there; another run may have its number in another database
    best_epoch: int = 0  # the epoch with the best validation metric, from 1; 0 before there is one
    best_value: float | None = None  # that metric
    history: list[dict[str, Any]] = field(default_factory=list)  # a record for each epoch, for the statistics
    # Of the objective since the epoch began, over all processes.
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_counts: dict[str, float] = field(default_factory=dict)

    @property
    def entry(self) -> RunKey:
        """What it writes into the database by."""
        return RunKey(self.run_id, self.key)

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


def load_best(accelerator: Accelerator, objective: Objective, run_dir: Path, epoch: int) -> None:
    """Load the weights of the best epoch on the main process and hand them to the others.

    Raises:
        UserError: on the main process, they are not there.
    """
    if accelerator.is_main_process:
        load_weights(objective.models, run_dir / f"best-{epoch}")
    if accelerator.num_processes > 1:
        for tensor in objective.models[""].state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))


# ---- the metric that chooses -------------------------------------------------------------------------------------


def check_metric(metric: str, default: str, validation: Part, multi_label: bool) -> list[str]:
    """A sentence where the validation part cannot say by a metric which epoch is the best; asked before training.

    Raises:
        UserError: another metric than the default was asked for and there is no validation part.
    """
    if not validation.num_rows:
        if metric != default:
            raise UserError(
                f"--metric {metric} chooses the best epoch on the validation part, and there is none: give "
                "--validation_share or --validation_file, or leave out --metric"
            )
        return ["there is no validation part: the last weights will be taken"]
    if np.isfinite(value_of({"loss": 0.0} | best_shares(validation, multi_label), metric)):
        return []
    truth = validation.truth[np.unique(validation.owners)]
    return [
        f"beware: {metric} cannot be computed on the validation part, whose {len(truth):,} documents have "
        f"{int(truth.any(0).sum())} of the {truth.shape[1]} labels: no epoch will be the best, the last weights are "
        "taken, and --patience has no effect"
    ]


def value_of(found: Mapping[str, Any], metric: str) -> Any:
    """A metric by its name; of several labels a row, "accuracy" is the share of rows with all of them right."""
    return found.get("subset_accuracy" if metric == "accuracy" and "accuracy" not in found else metric)


# ---- the database ------------------------------------------------------------------------------------------------


def open_run(
    database: Database,
    progress: ClassifierProgress,
    name: str,
    model_dir: Path,
    asked: Mapping[str, Any],
    facts: Mapping[str, Any],
    origin: str,
) -> RunKey:
    """Enter a run into the database, or find it there when it is continued.

    A row with the number of the run may be another's, where the database was built anew since: the key tells. What is
    `asked` are the options; `origin` is what the task was made from when it was opened, see `Database.start_run`.

    Raises:
        UserError: the database was built anew from something else since.
    """
    if progress.run_id and progress.key and database.go_on_with_run(progress.entry):
        return progress.entry
    run = database.start_run(name, asked, facts, model_dir=model_dir, origin=origin)
    for record in progress.history:  # what the other database knew
        _write_epoch(database, run, record)
    return run


@contextmanager
def failing(database: Database, run: RunKey, is_main: bool) -> Iterator[None]:
    """Write "failed" into the database if the block ends with an error; the end of the process is none."""
    try:
        yield
    except BaseException as error:
        if is_main and not isinstance(error, SystemExit):
            with suppress(UserError, OSError):  # the error itself is what has to be shown
                database.end_run(run, "failed")
        raise


def close_epoch(
    database: Database,
    run: RunKey,
    epoch: int,
    step: int,
    trained: Mapping[str, float],
    validation: Part,
    answers: RowAnswers | None,
    settings: ClassifierSettings,
) -> dict[str, Any]:
    """Write an epoch, numbered from 1, into the database; called by the main process.

    Where a document may have several labels it is judged with temperature and thresholds fitted on the validation
    part, as the model would be exported after this epoch: with others, another epoch would be the best. `trained` are
    the metrics of its training rows, as they were met; the settings are those before calibration.

    Returns:
        Its record for the statistics: "epoch", "step", "train" and "validation" metrics.

    Raises:
        UserError: the database does not hold the run any more.
    """
    judged: dict[str, float] = {}
    if answers is not None:
        if settings.multi_label:
            settings, _ = calibrate(answers, validation, settings)
        judged = judge(answers, validation, settings).document
    record: dict[str, Any] = plain({"epoch": epoch, "step": step, "train": dict(trained), "validation": judged})
    _write_epoch(database, run, record)
    return record


def _write_epoch(database: Database, run: RunKey, record: Mapping[str, Any]) -> None:
    for part in ("train", "validation"):
        known = {name: value for name, value in record[part].items() if value is not None}
        database.write_epoch(run, record["epoch"], record["step"], part, known)


def epoch_in_words(record: Mapping[str, Any], metric: str, say: Callable[[Mapping[str, float]], str]) -> str:
    """A line on an epoch: training, validation, and the metric by which the best epoch is found."""
    words = f"epoch {record['epoch']}: training {say(record['train'])}"
    if found := record["validation"]:
        shown = {name: found[name] for name in ("loss", "accuracy", "subset_accuracy") if name in found}
        words += f"; validation {say(shown)}"
        if metric not in shown and found.get(metric) is not None:
            words += f", {metric.replace('_', ' ')} {found[metric]:.4f}"
    return words
