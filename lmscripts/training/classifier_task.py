"""From the options of finetune_classifier.py to the database, the model to begin with, and the rows of every part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lmscripts.data.folding import FoldSettings
from lmscripts.data.labelled_build import DATABASE_SUFFIXES, Progress, database_of, open_or_build
from lmscripts.data.labelled_rows import Floats, Part, balanced_weights, num_batches, read_part
from lmscripts.data.labelled_store import Database
from lmscripts.data.splits import SplitSettings, in_words
from lmscripts.errors import UserError
from lmscripts.models.classifier import Source, find_source, fold_settings
from lmscripts.text.records import TableOptions
from lmscripts.text.tables import PARTS
from lmscripts.training.classifier_checks import check_metric, check_shares

_NOT_TO_CHANGE: tuple[str, ...] = (
    "model_name_or_path",
    "from_scratch",
    "lora_rank",
    "dropout",
    "aggregate",
    "count_documents_once",
)
_NOT_TO_CHANGE += ("class_weights", "label_smoothing", "metric", "epochs", "batch_size", "learning_rate")
_NOT_TO_CHANGE += ("warmup_share", "weight_decay", "max_grad_norm", "seed")
_FOLDING = ("max_words", "overlap", "balance", "policy", "most_folds")


@dataclass(frozen=True)
class Task:
    """What is to be learnt, and from what.

    Attributes:
        source: the model to begin with.
        folds: how texts become rows.
        split: which documents are for what, as the database has it.
        database: the file with all of them.
        labels: names of the K labels.
        multi_label: whether a document may have several.
        sources: hashes of the tables.
        origin: what all of this was made from, see `Database.origin`.
    """

    source: Source
    folds: FoldSettings
    split: SplitSettings
    database: Database
    labels: list[str]
    multi_label: bool
    sources: Any
    origin: str

    def sentences(self) -> list[str]:
        """What was read, and how it was split; nothing of it is longer than a person would read."""
        database = self.database
        lines = [*database.done, *database.reading_sentences(), f"{len(self.labels)} labels: {in_words(self.labels)}"]
        if self.split.method == "given":
            lines.append("the documents were given their parts by the table or its files")
        lines += database.split_sentences()
        if without := len(database.documents_without_rows()):
            lines.append(f"beware: {without:,} documents give no row; they are neither trained nor judged")
        return [*lines, *self.source.notices]


def open_task(options: Any, progress: Progress) -> Task:
    """Open or build the database and find the model; called by every process before they join.

    Args:
        options: of the script.
        progress: called with the number of documents that were tokenised.

    Raises:
        UserError: a table, split, model or folding that cannot be used.
    """
    if not Path(options.input_file).exists():  # said before the Hub is asked for a model
        raise UserError(f"the table {options.input_file} does not exist (seen from {Path.cwd()})")
    check_logfile(options)
    source = find_source(options.model_name_or_path, options.tokenizer_dir)
    others = {name: getattr(options, name) for name in _FOLDING}
    folds = fold_settings(source, options.max_length, unit=options.fold_unit, **others)
    files = {"validation": options.validation_file, "test": options.test_file}
    files = {part: file for part, file in files.items() if file}
    shares = (options.train_share, options.validation_share, options.test_share)
    method: Literal["given", "stratified"] = "given" if files or options.split_column else "stratified"
    split = SplitSettings(method, options.split_seed, *shares)
    names = {"id": options.id_column, "group": options.group_column, "split": options.split_column}
    names |= {name: getattr(options, name) for name in ("separator", "delimiter", "encoding")}
    given: dict[str, Any] = {name: value or "" for name, value in names.items()}
    given |= {name: getattr(options, name) for name in ("labels", "quotes", "on_bad_row")}
    table = TableOptions(options.text, options.label, **given)
    database = open_or_build(
        options.input_file,
        source.encoder,
        folds,
        split,
        table,
        database=options.database,
        part_files=files,
        overwrite=options.overwrite,
        num_workers=options.num_workers,
        progress=progress,
    )
    origin = database.origin()  # first: what is read later is compared with it
    meta = database.meta()
    multi_label = bool(meta["multi_label"])
    check_metric(options.metric, multi_label)  # once more, as now an SQLite file has said what it holds
    if database.split.method == "given":
        check_shares(vars(options))
    return Task(source, folds, database.split, database, database.labels(), multi_label, meta["sha256"], origin)


def check_logfile(options: Any) -> None:
    """Refuse a log file that cannot be, or that would be written into what is read.

    Raises:
        UserError: naming it.
    """
    if not options.logfile:
        return
    log = Path(options.logfile)
    if log.is_dir() or not log.parent.is_dir():
        what = "is a folder" if log.is_dir() else f"cannot be written, as there is no folder {log.parent}"
        raise UserError(f"--logfile {log} {what} (seen from {Path.cwd()})")
    others = [options.input_file, options.validation_file, options.test_file, options.database]
    others.append(database_of(options.input_file))
    if log.resolve() in [Path(other).resolve() for other in others if other] or log.suffix in DATABASE_SUFFIXES:
        raise UserError(f"--logfile {log} is a table or database of this run: the log needs a file of its own")


def fixed_settings(options: Any, task: Task) -> dict[str, Any]:
    """What must stay as it was when a run is continued, and is the same on all processes."""
    fixed = {name: getattr(options, name) for name in _NOT_TO_CHANGE} | {"tables": task.sources, "labels": task.labels}
    fixed |= {"folds": asdict(task.folds), "split": asdict(task.split)}
    return fixed | {"tokenizer": task.source.encoder.fingerprint}


def read_parts(options: Any, task: Task) -> tuple[Part, Part, Part, Floats | None]:
    """Rows for training, validation and testing, and for several labels the weight of having each.

    Raises:
        UserError: nothing to train on, or nothing to be patient about.
    """

    def read(class_weights: Floats | None) -> list[Part]:
        return [
            read_part(
                task.database,
                part,
                class_weights=class_weights,
                count_documents_once=options.count_documents_once,
            )
            for part in PARTS
        ]

    train, validation, test = read(None)
    if not train.num_rows:
        raise UserError(f"no document for training in {task.database.path} gives a row")
    if options.patience and not validation.num_rows:
        raise UserError("--patience needs a validation part: give --validation_share or --validation_file")
    if options.class_weights == "none":
        return train, validation, test, None
    weights = balanced_weights(train.truth, task.multi_label)
    if task.multi_label:
        return train, validation, test, weights
    train, validation, test = read(weights)
    return train, validation, test, None


def plan_text(
    options: Any, task: Task, parts: tuple[Part, Part, Part], model: Any, shares: list[int], warmup_steps: int
) -> list[str]:
    """What is going to happen, for people."""
    train, validation, test = parts
    tokens = int(train.lengths.sum())
    per_epoch = num_batches(train.num_rows, options.batch_size)
    return [
        f"model: {task.source.name}, {model.config.model_type}, {model.num_parameters():,} parameters",
        f"rows of at most {task.folds.max_length} tokens: {train.num_rows:,} for training ({tokens:,} tokens), "
        f"{validation.num_rows:,} for validation, {test.num_rows:,} for testing",
        f"{options.epochs} epochs of {per_epoch:,} steps of {options.batch_size} rows; rows of each process: {shares}",
        f"learning rate {options.learning_rate:g} after {warmup_steps} steps of warmup, then linear to 0",
    ]
