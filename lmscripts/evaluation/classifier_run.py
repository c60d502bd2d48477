"""A run of the classifier beside its steps: the best epoch, its entry in the database, and all that it leaves."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from transformers import PreTrainedModel

from lmscripts.data.labelled_rows import Part
from lmscripts.data.labelled_store import Database, RunKey
from lmscripts.errors import UserError, naming
from lmscripts.evaluation.judging import (
    LAST_EPOCH,
    Judged,
    RowAnswers,
    answer_rows,
    best_shares,
    calibrate,
    decided,
    judge,
    names_of,
    told_apart,
)
from lmscripts.evaluation.metrics import plain
from lmscripts.evaluation.report import csv_text, visible
from lmscripts.files import command, replaced_folder, write_text
from lmscripts.models.classifier import KEY, ClassifierSettings, label_names, merge_lora
from lmscripts.objectives.module import Objective
from lmscripts.training.card import About, fenced, model_card, named
from lmscripts.training.checkpoint import load_weights
from lmscripts.training.folder import Beside, write_weights
from lmscripts.training.state import of_process

if TYPE_CHECKING:
    from lmscripts.evaluation.further import FurtherMetrics

_USE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
model = AutoModelForSequenceClassification.from_pretrained("PATH/TO/THIS/FOLDER")"""
_USED = f"""`scripts/predict_classifier.py --model_dir PATH/TO/THIS/FOLDER` folds long texts, combines the answers of
their rows and applies the temperature as config.json says under `{KEY}`. Without it, and for texts of one row:

{fenced(_USE, "python")}"""
_LIMITS = """It knows the labels above and no others, and gives one to any text. The test documents come from the same
table as the training documents: how well it does on other text was not measured."""

__all__ = ["answer_rows"]


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

    def open_epoch(self, process: int) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts of the epoch to go on with, see `TrainingState.open_window`."""
        return of_process(self.epoch_sums, process), dict(self.epoch_counts)

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


# ---- metrics, and the one that chooses -------------------------------------------------------------------------------


def further_metrics(names: Sequence[str]) -> FurtherMetrics | None:
    """Metrics beside those that are always there, loaded; none on other processes than the main one, which judges.

    Raises:
        UserError: one of them is not there.
    """
    if not names or os.environ.get("RANK", "0") != "0":
        return None
    from lmscripts.evaluation.further import FurtherMetrics  # needs `evaluate`, which takes seconds

    return FurtherMetrics(names)


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
    further: FurtherMetrics | None = None,
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
        judged = judge(answers, validation, settings, further).document
    record: dict[str, Any] = plain({"epoch": epoch, "step": step, "train": dict(trained), "validation": judged})
    _write_epoch(database, run, record)
    return record


def _write_epoch(database: Database, run: RunKey, record: Mapping[str, Any]) -> None:
    for part in ("train", "validation"):
        known = {name: value for name, value in record[part].items() if value is not None}
        database.write_epoch(run, record["epoch"], record["step"], part, known)


def epoch_in_words(
    record: Mapping[str, Any], metric: str, say: Callable[[Mapping[str, float]], str], further: FurtherMetrics | None
) -> str:
    """A line on an epoch: training, validation, the metric by which the best epoch is found, and further ones."""
    words = f"epoch {record['epoch']}: training {say(record['train'])}"
    if found := record["validation"]:
        shown = {name: found[name] for name in ("loss", "accuracy", "subset_accuracy") if name in found}
        words += f"; validation {say(shown)}"
        if metric not in shown and found.get(metric) is not None:
            words += f", {metric.replace('_', ' ')} {found[metric]:.4f}"
        for name in further.names if further else ():
            words += f", {name} " + ("undefined" if found[name] is None else f"{found[name]:.4f}")
    return words


# ---- the folder --------------------------------------------------------------------------------------------------


class ResultFiles:
    """What a run leaves, all with one beginning of their names; tables are written as `csv_text` says."""

    def __init__(self, folder: Path, name: str, spreadsheet_safe: bool = False) -> None:
        self.name, self.spreadsheet_safe = name, spreadsheet_safe
        self.training = folder / f"{name}_training"  # folder of checkpoints, log and options
        self.model = folder / f"{name}_trained_model"
        self.predictions = folder / f"{name}_testset_predictions.csv"
        self.fragments = folder / f"{name}_testset_fragments.csv"  # the rows of the same documents
        self.weights = folder / f"{name}_trained_model.sav"  # where they were asked for
        self.statistics = folder / f"{name}_train_test_stats.json"  # numbers of every epoch and of the test part

    def from_there(self, path: Path) -> str:
        """A path as seen from the folder of the statistics."""
        return os.path.relpath(path.resolve(), self.statistics.parent.resolve())

    def check_free(self, do_continue: bool) -> None:
        """Refuse to write over another run's results.

        Raises:
            UserError: there are some, and this run does not continue it.
        """
        there = [path for path in (self.model, self.predictions, self.statistics) if path.exists()]
        if there and not (do_continue and self.training.is_dir()):
            raise UserError(
                f"{there[0]} is there already: give another --run_name or --output_dir, or --do_continue to go on "
                "with the run that wrote it"
            )

    def write_weights(self, model: PreTrainedModel) -> Path:
        """Write the weights for `torch.load`, aside first; an older tool left them so."""
        aside = self.weights.with_name(f".{self.weights.name}.part")
        with naming(aside):
            torch.save(model.state_dict(), aside)
            aside.replace(self.weights)
        return self.weights

    def remove_leftovers(self) -> None:
        """Remove what `write_text` of an earlier, killed process of this run left beside the files."""
        for path in (self.predictions, self.fragments, self.statistics):
            beginning = f".{path.name[:40]}."
            for other in path.parent.glob(f"{glob.escape(beginning)}*"):
                is_aside = re.fullmatch("[0-9a-f]{8}", other.name.removeprefix(beginning))
                # A name that is cut off may be of another run, which is writing it for the moment.
                if is_aside and (len(path.name) <= 40 or time.time() - other.stat().st_mtime > 60):
                    other.unlink(missing_ok=True)


# ---- tables and numbers ------------------------------------------------------------------------------------------


def write_tables(
    files: ResultFiles,
    places: Mapping[int, tuple[int, str]],
    part: Part,
    judged: Judged,
    labels: list[str],
    settings: ClassifierSettings,
) -> None:
    """Predictions of a part's documents, every one of them once and in order, and of their rows.

    `places` are line and name of every document; the settings are those after calibration.
    """
    head = ["document", "line", "name", "true_label", "prediction", *(f"probability of {each}" for each in labels)]
    doc_ids, between = part.doc_ids.tolist(), settings.separator
    truth = list(map(between.join, names_of(part.truth, labels)))

    def write(file: Path, documents: Iterable[int], probabilities: Any, **more: Sequence[int]) -> None:
        rows: list[list[Any]] = [[*head, *more]]
        named = names_of(decided(probabilities, settings), labels)
        for place, found, values, *others in zip(documents, named, probabilities, *more.values(), strict=True):
            shown = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
            rows.append([doc_ids[place], *places[doc_ids[place]], truth[place], between.join(found), *shown, *others])
        write_text(file, csv_text(rows, files.spreadsheet_safe))

    everywhere = np.full(part.truth.shape, np.nan)
    everywhere[judged.places] = judged.probabilities
    counts = np.bincount(part.owners, minlength=len(doc_ids)).tolist()
    write(files.predictions, range(len(doc_ids)), everywhere, fragments=counts)
    columns = {"fragment": part.folds.idx, "char_start": part.folds.char_start, "char_end": part.folds.char_end}
    more = {name: column.tolist() for name, column in columns.items()}
    write(files.fragments, part.owners, judged.fragment_probabilities, **more)


def statistics_text(facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]], tested: Judged | None) -> str:
    """JSON of every epoch and of the test part; a number that is none is null.

    The keys "Training", "Testing" and the names with capitals are those of an older tool whose readers expect them.
    """
    testing, epochs = dict[str, Any](), []
    if tested is not None:
        older = {"Test Loss": "loss", "Test Accuracy": "accuracy", "Matthews corrcoef": "mcc"}
        testing = {old: tested.document[new] for old, new in older.items() if new in tested.document}
        testing |= {"document": tested.document, "fragment": tested.fragment}
    for record in history:
        trained, found = record["train"], record["validation"]
        shown = {"Training Loss": trained.get("loss"), "Training Accuracy": trained.get("accuracy")}
        if found:
            shown |= {"Validation Loss": found["loss"], "Validation Accuracy": value_of(found, "accuracy")}
        epochs.append({"epoch": record["epoch"], **shown, **record})
    values = plain({"format": 1, **facts, "Training": epochs, "Testing": testing})
    return json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def card_text(
    title: str,
    rows: Mapping[str, Any],
    options_yaml: str,
    about: About,
    model_dir: Path,
    model: PreTrainedModel,
    began_with: str,
    results: Mapping[str, Any],
) -> str:
    """Model card: what it was made from and how right it is, in the words of this run."""
    return model_card(
        visible(title),
        {name: visible(str(value)) for name, value in rows.items()},
        options_yaml,
        began="Trained to give texts the labels below.",
        use=_USED,
        limits=_LIMITS,
        about=about,
        model_dir=model_dir,
        task="text-classification",
        tags=[model.config.model_type],
        began_with=[began_with],
        results=results,
        measured_on=f"test documents of {title}",
    )


# ---- the end of a run --------------------------------------------------------------------------------------------


def finish(
    files: ResultFiles,
    database: Database,
    progress: ClassifierProgress,
    settings: ClassifierSettings,
    model: PreTrainedModel,
    beside: Beside,
    facts: Mapping[str, Any],
    began_with: str,
    options_yaml: str,
    parts: Mapping[str, tuple[Part, RowAnswers | None]],
    about: About,
    further: FurtherMetrics | None = None,
) -> list[str]:
    """Calibrate, judge, write everything; called by the main process.

    The settings are those before calibration. The model is the best one, made from that which `began_with` names;
    `beside` writes the tokenizer beside it. `parts` are "validation" and "test", and what the model answers. Returned
    are sentences for the user.

    Raises:
        UserError: the database does not hold the run any more; nothing is written then.
    """
    run, labels, places = progress.entry, label_names(model.config), database.read_places(progress.entry)
    files.remove_leftovers()
    if (answers := parts["validation"][1]) is not None:
        settings, said = calibrate(answers, parts["validation"][0], settings)
    else:
        said = ["there is no validation part: the model is not calibrated"]
        settings = replace(settings, thresholds=(0.5,) * len(labels) if settings.multi_label else None)
    notices = [LAST_EPOCH] if 0 < progress.best_epoch == len(progress.history) else []
    if (tested := _judged(database, run, parts, settings, further).get("test")) is not None:
        part = parts["test"][0]
        notices += told_apart(part.truth[tested.places], decided(tested.probabilities, settings), labels)
        write_tables(files, places, part, tested, labels, settings)
    notices += further.sentences() if further else []
    facts = {**facts, "temperature": settings.temperature, "thresholds": settings.thresholds}
    facts |= {"best_epoch": progress.best_epoch, "notices": notices}
    said += [f"beware: {notice}" for notice in notices]
    known = {"run": run.run_id, "database": files.from_there(database.path), **facts}
    write_text(files.statistics, statistics_text(known, progress.history, tested))
    merge_lora(model)
    setattr(model.config, KEY, settings.as_json())
    numbers = plain({} if tested is None else tested.document)
    shown = {name.replace("_", " "): "undefined" if v is None else f"{v:.4f}" for name, v in numbers.items()}
    told = {"labels": ", ".join(labels), "began with": named(began_with), "architecture": model.config.model_type}
    told |= _learnt(settings, progress, notices) | {f"test documents: {name}": value for name, value in shown.items()}
    with replaced_folder(files.model) as aside:
        beside(aside)
        write_weights(aside, model)
        card = (files.name, told, options_yaml, about, aside, model, began_with, numbers)
        write_text(aside / "README.md", card_text(*card))
    database.end_run(run, "done", facts)
    where = f"the model is in {files.model}"
    if tested is None:
        return [*said, "there is no test part: nothing is said about other texts, nor is there a report", where]
    said += [where, f"the predictions are in {files.predictions}"]
    said += ["test documents: " + ", ".join(f"{name} {value}" for name, value in shown.items())]
    return [*said, f"for a report: {command('analyze_results')} {database.path} --run {run.run_id}"]


def _learnt(settings: ClassifierSettings, progress: ClassifierProgress, notices: list[str]) -> dict[str, Any]:
    """Rows of the card."""
    return {
        "best epoch": progress.best_epoch or "the last",
        "temperature": f"{settings.temperature:.4f}",
        "rows": f"at most {settings.folds.max_length} tokens, combined by {settings.aggregate}",
        **{f"beware ({number})": notice for number, notice in enumerate(notices, 1)},
    }


def _judged(
    database: Database,
    run: RunKey,
    parts: Mapping[str, tuple[Part, RowAnswers | None]],
    settings: ClassifierSettings,
    further: FurtherMetrics | None,
) -> dict[str, Judged]:
    """Parts that were answered, judged; with their predictions, and metrics of the test part, in the database."""
    judged = dict[str, Judged]()
    for name, (part, answers) in parts.items():
        if answers is not None:
            found = judged[name] = judge(answers, part, settings, further)
            documents, rows = part.doc_ids[found.places], (part.folds.doc_ids, part.folds.idx)
            database.write_predictions(run, name, "document", documents, None, found.probabilities, found.logits)
            database.write_predictions(run, name, "fragment", *rows, found.fragment_probabilities, answers.logits)
            if name == "test":
                database.write_test_metrics(run, "document", found.document)
                database.write_test_metrics(run, "fragment", found.fragment)
    return judged
