"""What a run of the classifier leaves: the model, tables of predictions, numbers, a card, an entry in the database."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lmscripts.classification.aggregate import names_of
from lmscripts.classification.batches import Part
from lmscripts.classification.classifier import KEY, ClassifierSettings, Source
from lmscripts.classification.database import Database
from lmscripts.classification.judging import Judged, RowAnswers, calibrate, judge
from lmscripts.classification.lora import merge_lora
from lmscripts.classification.metrics import plain
from lmscripts.classification.progress import ClassifierState
from lmscripts.classification.report import safe_cell
from lmscripts.classification.sqlite_file import opened
from lmscripts.classification.stored import Stored
from lmscripts.errors import UserError
from lmscripts.files import new_folder, remove_leftovers, write_text
from lmscripts.tokenizer_folder import copy_tokenizer
from lmscripts.tracking import versions

_USE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
model = AutoModelForSequenceClassification.from_pretrained("PATH/TO/THIS/FOLDER")"""


# ---- the folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultFiles:
    """What a run leaves beside its training folder, all with one beginning of their names."""

    folder: Path
    name: str

    @property
    def training(self) -> Path:
        """Checkpoints, log and options."""
        return self.folder / f"{self.name}_training"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.folder / f"{self.name}_trained_model"

    @property
    def predictions(self) -> Path:
        """Predictions of the test documents."""
        return self.folder / f"{self.name}_testset_predictions.csv"

    @property
    def fragments(self) -> Path:
        """Predictions of the rows of the test documents."""
        return self.folder / f"{self.name}_testset_fragments.csv"

    @property
    def statistics(self) -> Path:
        """Numbers of every epoch and of the test part."""
        return self.folder / f"{self.name}_train_test_stats.json"

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


def check_run_name(name: str | None) -> None:
    """Keep all files of a run in one folder.

    Raises:
        UserError: the name cannot begin the name of a file.
    """
    if name is not None and (not name or Path(name).name != name or "\0" in name):
        raise UserError(f"--run_name {name!r} cannot begin the name of a file: put folders into --output_dir")


def export_model(
    target: Path, model: PreTrainedModel, tokenizer_dir: Path, settings: ClassifierSettings, card: str
) -> None:
    """Write model, tokenizer and card as the Auto classes load them; an earlier folder is replaced by a whole one."""
    setattr(model.config, KEY, settings.as_json())
    new, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    remove_leftovers(new)
    with new_folder(new) as aside:
        copy_tokenizer(tokenizer_dir, aside)
        model.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# ---- tables and numbers ------------------------------------------------------------------------------------------


def write_tables(
    files: ResultFiles, database: Stored, part: Part, judged: Judged, labels: list[str], settings: ClassifierSettings
) -> None:
    """Predictions of a part's documents, every one of them once and in order, and of their rows."""
    sql = "SELECT doc_id, line, name FROM documents ORDER BY doc_id"
    with opened(database.path) as connection:
        places = {doc_id: (line, name) for doc_id, line, name in connection.execute(sql)}
    thresholds = None if settings.thresholds is None else np.array(settings.thresholds)
    all_probabilities = np.full(part.truth.shape, np.nan)
    all_probabilities[judged.places] = judged.probabilities
    counts = np.bincount(part.owners, minlength=len(part.doc_ids))
    truth = [settings.separator.join(labels[place] for place in np.flatnonzero(row)) for row in part.truth]
    head = ["document", "line", "name", "true_label", "predicted_label"]
    shares = [f"probability of {label}" for label in labels]
    predicted = [settings.separator.join(found) for found in names_of(all_probabilities, labels, thresholds)]
    rows = [
        [int(doc_id), *places[doc_id], true, found, *_rounded(values), int(count)]
        for doc_id, true, found, values, count in zip(
            part.doc_ids.tolist(), truth, predicted, all_probabilities, counts, strict=True
        )
    ]
    write_text(files.predictions, _csv([*head, *shares, "fragments"], rows))
    folds, named = part.folds, names_of(judged.fragment_probabilities, labels, thresholds)
    pieces = [
        [doc_id, *places[doc_id], truth[owner], settings.separator.join(found), *_rounded(values), *span]
        for doc_id, owner, found, values, *span in zip(
            folds.doc_ids.tolist(),
            part.owners,
            named,
            judged.fragment_probabilities,
            folds.idx.tolist(),
            folds.char_start.tolist(),
            folds.char_end.tolist(),
            strict=True,
        )
    ]
    write_text(files.fragments, _csv([*head, *shares, "fragment", "char_start", "char_end"], pieces))


def _rounded(values: Any) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.6f}" for value in values]


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([safe_cell(cell) for cell in row] for row in (head, *rows))
    return f"\ufeff{text.getvalue()}"  # by which spreadsheets know UTF-8


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
            older["Validation Accuracy"] = found.get("accuracy", found.get("subset_accuracy"))
        epochs.append({"epoch": record["epoch"], **older, **record})
    values = plain({"format": 1, **facts, "Training": epochs, "Testing": testing})
    return json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def card_text(title: str, rows: Mapping[str, Any], tested: Judged | None, options_yaml: str) -> str:
    """Model card: what it was made from and how right it is, in the words of this run."""
    measured = {} if tested is None else {name: _shown(value) for name, value in tested.document.items()}
    cells = {name: " ".join(str(value).split()).replace("|", "\\|") for name, value in rows.items()}
    lines = [f"| {name} | {cell} |" for name, cell in cells.items()]
    lines += [f"| test documents: {name.replace('_', ' ')} | {value} |" for name, value in measured.items()]
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---

# {title}

Every number below was measured in this run.

| what | value |
|---|---|
{chr(10).join(lines)}

## Use

`scripts/predict_classifier.py --model_dir PATH/TO/THIS/FOLDER` folds long texts, combines the answers of their rows
and applies the temperature as config.json says under `{KEY}`. Without it, and for texts of one row:

```python
{_USE}
```

## Limits

It knows the labels above and no others, and gives one to any text. The test documents come from the same table as the
training documents: how well it does on other text was not measured.

## How it was made

{used}; {sys.platform}

```yaml
{options_yaml.strip()}
```
"""


def _shown(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else "undefined"


# ---- the end of a run --------------------------------------------------------------------------------------------


def finish(
    files: ResultFiles,
    database: Database,
    state: ClassifierState,
    settings: ClassifierSettings,
    source: Source,
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    options_yaml: str,
    parts: Mapping[str, tuple[Part, RowAnswers | None]],
) -> list[str]:
    """Calibrate, judge, write everything; called by the main process.

    Args:
        files: what is written.
        database: likewise.
        state: of the run at its end.
        settings: of the classifier, before calibration.
        source: the model that it began with.
        model: the best one.
        facts: of the run, for the database.
        options_yaml: the options that repeat it.
        parts: "validation" and "test", and what the model answers.

    Returns:
        Sentences for the user.
    """
    labels, said = database.labels(), list[str]()
    validation, answers = parts["validation"]
    if answers is not None:
        temperature, thresholds, said = calibrate(answers, validation, settings)
        settings = replace(settings, temperature=temperature, thresholds=thresholds)
    else:
        settings = replace(settings, thresholds=(0.5,) * len(labels) if settings.multi_label else None)
        said.append("there is no validation part: the model is not calibrated")
    judged = {name: judge(found, part, settings) for name, (part, found) in parts.items() if found is not None}
    for name, result in judged.items():
        _store(database, state.run_id, name, parts[name], result)
    tested = judged.get("test")
    if tested is not None:
        for level in ("document", "fragment"):
            database.write_test_metrics(state.run_id, level, getattr(tested, level))
        write_tables(files, database, parts["test"][0], tested, labels, settings)
    else:
        said.append("there is no test part: nothing is said about other texts, and there is nothing to report")
    calibration = {"temperature": settings.temperature, "thresholds": settings.thresholds}
    facts = {**facts, **calibration, "best_epoch": state.best_epoch, "steps": state.step}
    place = os.path.relpath(database.path.resolve(), files.statistics.parent.resolve())
    about = {"run": state.run_id, "database": place, **facts}
    write_text(files.statistics, statistics_text(about, state.history, tested))
    rows = {"labels": ", ".join(labels), "began with": source.name, "architecture": model.config.model_type}
    rows |= {"best epoch": str(state.best_epoch or "the last"), "temperature": f"{settings.temperature:.4f}"}
    rows |= {"rows": f"at most {settings.folds.max_length} tokens, combined by {settings.aggregate}"}
    merge_lora(model)
    export_model(files.model, model, source.encoder.folder, settings, card_text(files.name, rows, tested, options_yaml))
    database.end_run(state.run_id, "done", facts)
    said.append(f"the model is in {files.model}")
    return said if tested is None else [*said, *_told(files, database, state, tested)]


def _told(files: ResultFiles, database: Database, state: ClassifierState, tested: Judged) -> list[str]:
    shown = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in tested.document.items())
    report = f"for a report: python scripts/analyze_results.py {database.path} --run {state.run_id}"
    return [f"the predictions are in {files.predictions}", f"test documents: {shown}", report]


def _store(database: Database, run_id: int, name: str, part: tuple[Part, RowAnswers | None], judged: Judged) -> None:
    """Predictions of a part into the database, of documents and of rows."""
    rows, answers = part
    if answers is None:
        return
    documents = rows.doc_ids[judged.places]
    database.write_predictions(run_id, name, "document", documents, None, judged.probabilities, judged.logits)
    places = (rows.folds.doc_ids, rows.folds.idx)
    database.write_predictions(run_id, name, "fragment", *places, judged.fragment_probabilities, answers.logits)
