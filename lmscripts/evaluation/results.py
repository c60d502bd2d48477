"""What a run of the classifier leaves: the model, tables of predictions, numbers, a card, an entry in the database."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lmscripts.data.labelled_rows import Part
from lmscripts.data.labelled_store import Database, RunKey
from lmscripts.errors import UserError
from lmscripts.evaluation.judging import Judged, RowAnswers, calibrate, decided, judge, names_of
from lmscripts.evaluation.metrics import plain
from lmscripts.evaluation.progress import ClassifierProgress, value_of
from lmscripts.evaluation.report import csv_text, visible
from lmscripts.files import replaced_folder, write_text
from lmscripts.models.classifier import KEY, ClassifierSettings, label_names
from lmscripts.models.lora import merge_lora
from lmscripts.training.folder import Beside, write_weights
from lmscripts.training.log import fenced, model_card

_USE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
model = AutoModelForSequenceClassification.from_pretrained("PATH/TO/THIS/FOLDER")"""
_USED = f"""`scripts/predict_classifier.py --model_dir PATH/TO/THIS/FOLDER` folds long texts, combines the answers of
their rows and applies the temperature as config.json says under `{KEY}`. Without it, and for texts of one row:

{fenced(_USE, "python")}"""
_LIMITS = """It knows the labels above and no others, and gives one to any text. The test documents come from the same
table as the training documents: how well it does on other text was not measured."""


# ---- the folder --------------------------------------------------------------------------------------------------


class ResultFiles:
    """What a run leaves, all with one beginning of their names; tables are written as `csv_text` says."""

    def __init__(self, folder: Path, name: str, spreadsheet_safe: bool = False) -> None:
        self.name, self.spreadsheet_safe = name, spreadsheet_safe
        self.training = folder / f"{name}_training"  # folder of checkpoints, log and options
        self.model = folder / f"{name}_trained_model"
        self.predictions = folder / f"{name}_testset_predictions.csv"
        self.fragments = folder / f"{name}_testset_fragments.csv"  # the rows of the same documents
        self.statistics = folder / f"{name}_train_test_stats.json"  # numbers of every epoch and of the test part

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
    head = ["document", "line", "name", "true_label", "predicted_label", *(f"probability of {each}" for each in labels)]
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


def card_text(title: str, rows: Mapping[str, Any], options_yaml: str) -> str:
    """Model card: what it was made from and how right it is, in the words of this run."""
    return model_card(
        visible(title),
        {name: visible(str(value)) for name, value in rows.items()},
        options_yaml,
        began="Trained to give texts the labels below.",
        use=_USED,
        limits=_LIMITS,
        task="text-classification",
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
) -> list[str]:
    """Calibrate, judge, write everything; called by the main process.

    The settings are those before calibration. The model is the best one, made from that which `began_with` names;
    `beside` writes the tokenizer beside it. `parts` are "validation" and "test", and what the model answers.

    Returns:
        Sentences for the user.

    Raises:
        UserError: the database does not hold the run any more; nothing is written then.
    """
    run, labels = progress.entry, label_names(model.config)
    places = database.read_places(run)
    files.remove_leftovers()
    if (answers := parts["validation"][1]) is not None:
        settings, said = calibrate(answers, parts["validation"][0], settings)
    else:
        said = ["there is no validation part: the model is not calibrated"]
        settings = replace(settings, thresholds=(0.5,) * len(labels) if settings.multi_label else None)
    if (tested := _judged(database, run, parts, settings).get("test")) is not None:
        write_tables(files, places, parts["test"][0], tested, labels, settings)
    facts = {**facts, "temperature": settings.temperature, "thresholds": settings.thresholds}
    facts["best_epoch"] = progress.best_epoch
    place = os.path.relpath(database.path.resolve(), files.statistics.parent.resolve())
    about = {"run": run.run_id, "database": place, **facts}
    write_text(files.statistics, statistics_text(about, progress.history, tested))
    merge_lora(model)
    setattr(model.config, KEY, settings.as_json())
    told: dict[str, Any] = {"labels": ", ".join(labels), "began with": began_with}
    told |= {"architecture": model.config.model_type, "best epoch": progress.best_epoch or "the last"}
    told |= {"temperature": f"{settings.temperature:.4f}"}
    told["rows"] = f"at most {settings.folds.max_length} tokens, combined by {settings.aggregate}"
    numbers = plain({} if tested is None else tested.document)
    shown = {name.replace("_", " "): "undefined" if v is None else f"{v:.4f}" for name, v in numbers.items()}
    told |= {f"test documents: {name}": value for name, value in shown.items()}
    with replaced_folder(files.model) as aside:
        beside(aside)
        write_weights(aside, model)
        (aside / "README.md").write_text(card_text(files.name, told, options_yaml), encoding="utf-8")
    database.end_run(run, "done", facts)
    where = f"the model is in {files.model}"
    if tested is None:
        silent = "there is no test part: nothing is said about other texts, and there is nothing to report"
        return [*said, silent, where]
    said += [where, f"the predictions are in {files.predictions}"]
    said += ["test documents: " + ", ".join(f"{name} {value}" for name, value in shown.items())]
    return [*said, f"for a report: python scripts/analyze_results.py {database.path} --run {run.run_id}"]


def _judged(
    database: Database, run: RunKey, parts: Mapping[str, tuple[Part, RowAnswers | None]], settings: ClassifierSettings
) -> dict[str, Judged]:
    """Parts that were answered, judged; with their predictions, and metrics of the test part, in the database."""
    judged = dict[str, Judged]()
    for name, (part, answers) in parts.items():
        if answers is not None:
            found = judged[name] = judge(answers, part, settings)
            documents, rows = part.doc_ids[found.places], (part.folds.doc_ids, part.folds.idx)
            database.write_predictions(run, name, "document", documents, None, found.probabilities, found.logits)
            database.write_predictions(run, name, "fragment", *rows, found.fragment_probabilities, answers.logits)
            if name == "test":
                database.write_test_metrics(run, "document", found.document)
                database.write_test_metrics(run, "fragment", found.fragment)
    return judged
