"""What a run of the classifier leaves: the model, tables of predictions, numbers, a card, an entry in the database."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lmscripts.data.labelled_rows import Part
from lmscripts.data.labelled_store import Database, RunKey
from lmscripts.errors import UserError
from lmscripts.evaluation.aggregate import names_of
from lmscripts.evaluation.judging import Judged, RowAnswers, calibrate, judge
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
    """What a run leaves, all with one beginning of their names.

    Attributes:
        name: that beginning.
        training: folder of checkpoints, log and options.
        model: folder of the trained model.
        predictions, fragments: tables of the test documents and of their rows.
        statistics: numbers of every epoch and of the test part.
        spreadsheet_safe: how tables are written, see `csv_text`.
    """

    def __init__(self, folder: Path, name: str, spreadsheet_safe: bool = False) -> None:
        self.name, self.spreadsheet_safe = name, spreadsheet_safe
        self.training, self.model = (folder / f"{name}_{what}" for what in ("training", "trained_model"))
        tables = (folder / f"{name}_testset_{what}.csv" for what in ("predictions", "fragments"))
        self.predictions, self.fragments = tables
        self.statistics = folder / f"{name}_train_test_stats.json"

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

    Args:
        files: what is written.
        places: line and name of every document.
        part: the documents.
        judged: what the model says of them.
        labels: names of the K labels.
        settings: of the classifier, after calibration.
    """
    thresholds = None if settings.thresholds is None else np.array(settings.thresholds)
    head = ["document", "line", "name", "true_label", "predicted_label", *(f"probability of {each}" for each in labels)]
    doc_ids, between = part.doc_ids.tolist(), settings.separator
    truth = [between.join(labels[place] for place in np.flatnonzero(row)) for row in part.truth]

    def rows(documents: Iterable[int], probabilities: Any, *others: Any) -> Iterator[list[Any]]:
        named = names_of(probabilities, labels, thresholds)
        for place, found, values, *more in zip(documents, named, probabilities, *others, strict=True):
            shown = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
            yield [doc_ids[place], *places[doc_ids[place]], truth[place], between.join(found), *shown, *more]

    everywhere = np.full(part.truth.shape, np.nan)
    everywhere[judged.places] = judged.probabilities
    counts = np.bincount(part.owners, minlength=len(doc_ids)).tolist()
    table = [[*head, "fragments"], *rows(range(len(doc_ids)), everywhere, counts)]
    write_text(files.predictions, csv_text(table, files.spreadsheet_safe))
    spans = (each.tolist() for each in (part.folds.idx, part.folds.char_start, part.folds.char_end))
    pieces = rows(part.owners, judged.fragment_probabilities, *spans)
    table = [[*head, "fragment", "char_start", "char_end"], *pieces]
    write_text(files.fragments, csv_text(table, files.spreadsheet_safe))


def statistics_text(facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]], tested: Judged | None) -> str:
    """JSON of every epoch and of the test part; a number that is none is null.

    The keys "Training", "Testing" and the names with capitals are those of an older tool whose readers expect them.
    """
    testing: dict[str, Any] = {}
    if tested is not None:
        older = {"Test Loss": "loss", "Test Accuracy": "accuracy", "Matthews corrcoef": "mcc"}
        testing = {old: tested.document[new] for old, new in older.items() if new in tested.document}
        testing |= {"document": tested.document, "fragment": tested.fragment}
    epochs = []
    for record in history:
        older = {"Training Loss": record["train"].get("loss"), "Training Accuracy": record["train"].get("accuracy")}
        found = record["validation"]
        if found:
            older["Validation Loss"] = found["loss"]
            older["Validation Accuracy"] = value_of(found, "accuracy")
        epochs.append({"epoch": record["epoch"], **older, **record})
    values = plain({"format": 1, **facts, "Training": epochs, "Testing": testing})
    return json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def card_text(title: str, rows: Mapping[str, Any], tested: Judged | None, options_yaml: str) -> str:
    """Model card: what it was made from and how right it is, in the words of this run."""
    measured = {} if tested is None else {name: _shown(value) for name, value in tested.document.items()}
    measured = {f"test documents: {name.replace('_', ' ')}": value for name, value in measured.items()}
    return model_card(
        visible(title),
        {name: visible(str(value)) for name, value in {**rows, **measured}.items()},
        options_yaml,
        began="Trained to give texts the labels below.",
        use=_USED,
        limits=_LIMITS,
        task="text-classification",
    )


def _shown(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "undefined"


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

    Args:
        files: what is written.
        database: likewise.
        progress: of the run at its end.
        settings: of the classifier, before calibration.
        model: the best one.
        beside: writes the tokenizer beside it.
        facts: of the run, for the database.
        began_with: name of the model that it was made from.
        options_yaml: the options that repeat the run.
        parts: "validation" and "test", and what the model answers.

    Returns:
        Sentences for the user.

    Raises:
        UserError: the database does not hold the run any more; nothing is written then.
    """
    run, labels = progress.entry, label_names(model.config)
    places = database.read_places(run)
    files.remove_leftovers()
    settings, said = _calibrated(*parts["validation"], settings, len(labels))
    answered = [(name, part, found) for name, (part, found) in parts.items() if found is not None]
    tested = {name: _judged(database, run, name, part, found, settings) for name, part, found in answered}.get("test")
    if tested is not None:
        for level in ("document", "fragment"):
            database.write_test_metrics(run, level, getattr(tested, level))
        write_tables(files, places, parts["test"][0], tested, labels, settings)
    facts = {**facts, "temperature": settings.temperature, "thresholds": settings.thresholds}
    facts["best_epoch"] = progress.best_epoch
    place = os.path.relpath(database.path.resolve(), files.statistics.parent.resolve())
    about = {"run": run.run_id, "database": place, **facts}
    write_text(files.statistics, statistics_text(about, progress.history, tested))
    rows: dict[str, Any] = {"labels": ", ".join(labels), "began with": began_with}
    rows |= {"architecture": model.config.model_type, "best epoch": progress.best_epoch or "the last"}
    rows |= {"temperature": f"{settings.temperature:.4f}"}
    rows["rows"] = f"at most {settings.folds.max_length} tokens, combined by {settings.aggregate}"
    merge_lora(model)
    setattr(model.config, KEY, settings.as_json())
    with replaced_folder(files.model) as aside:
        beside(aside)
        write_weights(aside, model)
        (aside / "README.md").write_text(card_text(files.name, rows, tested, options_yaml), encoding="utf-8")
    database.end_run(run, "done", facts)
    return [*said, *_told(files, database.path, run, tested)]


def _calibrated(
    part: Part, answers: RowAnswers | None, settings: ClassifierSettings, num_labels: int
) -> tuple[ClassifierSettings, list[str]]:
    """Settings as the model is exported with, and a sentence where they are not fitted."""
    if answers is not None:
        return calibrate(answers, part, settings)
    settings = replace(settings, thresholds=(0.5,) * num_labels if settings.multi_label else None)
    return settings, ["there is no validation part: the model is not calibrated"]


def _told(files: ResultFiles, database: Path, run: RunKey, tested: Judged | None) -> list[str]:
    """Where everything is."""
    model = f"the model is in {files.model}"
    if tested is None:
        return ["there is no test part: nothing is said about other texts, and there is nothing to report", model]
    numbers = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in tested.document.items())
    report = f"for a report: python scripts/analyze_results.py {database} --run {run.run_id}"
    return [model, f"the predictions are in {files.predictions}", f"test documents: {numbers}", report]


def _judged(
    database: Database, run: RunKey, name: str, part: Part, answers: RowAnswers, settings: ClassifierSettings
) -> Judged:
    """A part judged, with its predictions in the database, those of documents and those of rows."""
    found = judge(answers, part, settings)
    documents, fragments = part.doc_ids[found.places], (part.folds.doc_ids, part.folds.idx)
    database.write_predictions(run, name, "document", documents, None, found.probabilities, found.logits)
    database.write_predictions(run, name, "fragment", *fragments, found.fragment_probabilities, answers.logits)
    return found
