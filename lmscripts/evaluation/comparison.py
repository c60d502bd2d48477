"""Runs as their database holds them, found by what they left, and compared with each other.

A database is only read here. What a run measured is not believed but computed again from its predictions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmscripts.data.labelled_store import Database, opened, read_split_documents
from lmscripts.data.splits import units_of_documents
from lmscripts.errors import UserError
from lmscripts.evaluation.metrics import Flags, Floats, Integers

RESULTS = ("_train_test_stats.json", "_testset_predictions.csv", "_testset_fragments.csv")
FINISHED = ("done", "finished")  # what the status of a run says when it came to its end
PARTS, LEVELS = ("train", "validation", "test"), ("document", "fragment")


@dataclass(frozen=True)
class Predictions:
    """What a run said about N documents or fragments of K labels."""

    doc_ids: Integers  # (N,) rising
    fold_idx: Integers  # (N,) number of the fragment in its document; -1 for documents
    probabilities: Floats  # (N, K) after the temperature
    logits: Floats | None  # (N, K) before it; None when they were not kept
    truth: Flags  # (N, K) labels of the documents


@dataclass(frozen=True)
class Run:
    """A run and its data: D documents of a part, K labels."""

    database: Database  # what it was read from, with its tokenization and split
    # Its row in `runs`, "options" and "facts" as dictionaries, and so "folding" and "split"; "tokenizer".
    record: dict[str, Any]
    meta: dict[str, Any]  # what the database says about the table it was made from
    labels: tuple[str, ...]  # their names
    multi_label: bool  # a document may have several labels, or none
    parts: dict[str, Integers]  # part -> (D,) documents
    part_truth: dict[str, Flags]  # part -> (D, K) their labels
    predictions: dict[tuple[str, str], Predictions]  # (part, level) -> predictions, where there are any
    epochs: list[dict[str, Any]]  # records with epoch, step, part, metric and value
    stored_metrics: dict[tuple[str, str], float]  # (level, metric) -> what the run itself wrote down

    def __str__(self) -> str:
        return f"run {self.record['run_id']} in {self.database.path}"


def read_results(path: Path, run_id: int | None = None, flag: str = "--run") -> Run:
    """The run that a file is about: a database, or statistics or predictions of a run, found by the statistics.

    Without a number it is the one that the statistics name, or the newest finished run of a database; `flag` is the
    option that gives the number.

    Raises:
        UserError: as `read_run`; or statistics that are not there, name no run, another one than is asked for, or one
            that is not in the database any more.
    """
    name = next((path.name.removesuffix(suffix) for suffix in RESULTS if path.name.endswith(suffix)), None)
    if name is None:
        if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
            raise UserError(f"{path} is no database of finetune_classifier.py; look for {path.with_suffix('.sqlite')}")
        return read_run(path, run_id)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    statistics = path.with_name(f"{name}{RESULTS[0]}")
    if not statistics.is_file():
        raise UserError(f"{statistics}, which says of which run {path.name} is, is not there: name the database")
    try:
        found = json.loads(statistics.read_text(encoding="utf-8"))
        number, place, key = found["run"], statistics.parent / found["database"], found.get("key")
        if type(number) is not int:
            raise TypeError(f"run {number!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{statistics} does not say of which run it is ({type(error).__name__}: {error})") from error
    database = place.resolve() if ".." in place.parts else place
    if run_id not in (None, number):
        raise UserError(f"{path} is of run {number}, but {flag} asks for {run_id}: leave it out, or name {database}")
    if not database.is_file():
        raise UserError(f"{path} is of run {number} in {database}, which is not there: name the database, with {flag}")
    run = read_run(database, number)
    if key is not None and run.record["facts"].get("key") != key:
        raise UserError(
            f"{path} is of another run than run {number} in {database}, which was built anew since: name the database "
            "to see what is in it"
        )
    return run


def read_run(file: Path, run_id: int | None = None) -> Run:
    """A finished run with its predictions for the test part; the newest one unless a number is given.

    Raises:
        UserError: the file is not a database of ours, it has no such finished run, or the run has no predictions.
    """
    stored = Database(file, 0, 0)
    meta, labels, runs = stored.meta(), tuple(stored.labels()), stored.read_runs()
    finished = {run["run_id"]: run for run in runs if run["status"] in FINISHED}
    if run_id is not None and run_id not in finished:
        status = next((f"is {run['status']}" for run in runs if run["run_id"] == run_id), "is not there")
        known = ", ".join(map(str, finished)) or "none"
        raise UserError(f"run {run_id} in {file} {status}; finished runs: {known}")
    if not finished:
        raise UserError(f"{file} holds {len(runs)} runs, none of them finished")
    record = finished[max(finished) if run_id is None else run_id]
    stored, number = replace(stored, tok_id=record["tok_id"], split_id=record["split_id"]), record["run_id"]
    parts, part_truth = dict[str, Integers](), dict[str, Flags]()
    predictions = dict[tuple[str, str], Predictions]()
    for part in PARTS:
        parts[part], part_truth[part] = stored.read_labels(part)
        for level in LEVELS:
            if rows := stored.read_predictions(number, part, level):
                what = f"run {number}, {part} {level}s"
                predictions[part, level] = _predictions(what, rows, parts[part], part_truth[part])
    if ("test", "document") not in predictions:
        raise UserError(f"run {number} in {file} has no predictions for test documents")
    several, epochs, metrics = bool(meta["multi_label"]), stored.read_epochs(number), stored.read_test_metrics(number)
    return Run(stored, record, meta, labels, several, parts, part_truth, predictions, epochs, metrics)


def _predictions(what: str, rows: Sequence[tuple[Any, ...]], documents: Integers, truth: Flags) -> Predictions:
    """Rows of `predictions` as arrays, with the labels of their documents: (D,) documents and (D, K) labels."""
    doc_ids, fold_idx, blobs, raw_logits = zip(*rows, strict=True)
    kept = None not in raw_logits
    logits = _floats(raw_logits, truth.shape[1], f"{what}: logits") if kept else None
    probabilities = _floats(blobs, truth.shape[1], f"{what}: probabilities")
    ids = np.array(doc_ids, np.int64)
    if len(strange := np.setdiff1d(ids, documents)):
        raise UserError(f"{what}: document {strange[0]} is not in that part of the split")
    return Predictions(ids, np.array(fold_idx, np.int64), probabilities, logits, truth[np.searchsorted(documents, ids)])


def _floats(blobs: Sequence[bytes], num_labels: int, what: str) -> Floats:
    for blob in blobs:
        if not isinstance(blob, bytes) or len(blob) != 4 * num_labels:
            found = f"{len(blob) / 4:g} numbers" if isinstance(blob, bytes) else repr(blob)
            raise UserError(f"{what} must be {num_labels} numbers, one for each label in the database, not {found}")
    values = np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, num_labels).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{what} hold {int((~np.isfinite(values)).sum())} values that are not finite numbers")
    return values


def units_of(run: Run, doc_ids: Sequence[int] | Integers) -> Integers:
    """(D,) the unit of each document, numbered from 0: what is alike and what a split therefore does not take apart.

    A sample of documents must not take it apart either.
    """
    with opened(run.database.path) as connection:
        documents = read_split_documents(connection)
    numbers = dict[str, int]()
    names = units_of_documents([documents[int(doc_id)] for doc_id in doc_ids], use_groups=True)
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


# ---- two runs ----------------------------------------------------------------------------------------------------


def places_of_same(first: Run, second: Run) -> Integers:
    """For each test document of the first run its place in the predictions of the second, found by text and labels.

    Raises:
        UserError: the runs know other labels, were tested on other documents, or on others' truths.
    """
    if first.multi_label != second.multi_label:
        raise UserError(f"of {first} and {second} only one gives several labels: they cannot be compared")
    if odd := sorted(set(first.labels) ^ set(second.labels)):
        raise UserError(f"{first} and {second} know other labels, for one {odd[0]!r}, and cannot be compared")
    keys = list[list[tuple[bytes, tuple[int, ...]]]]()
    for run in (first, second):
        test = run.predictions["test", "document"]
        truth = test.truth[:, [run.labels.index(name) for name in first.labels]]
        texts = (text.encode("utf-8", "surrogatepass") for text in run.database.read_texts(test.doc_ids))
        hashed = (hashlib.sha256(text).digest() for text in texts)
        keys.append([(text, tuple(np.flatnonzero(row))) for text, row in zip(hashed, truth, strict=True)])
    orders = [sorted(range(len(own)), key=own.__getitem__) for own in keys]
    own, others = ([key[place] for place in order] for key, order in zip(keys, orders, strict=True))
    mine, theirs = ([text for text, _ in rows] for rows in (own, others))
    if mine != theirs:
        raise UserError(
            f"{first} was tested on {len(own):,} documents, {second} on {len(others):,}, and "
            f"{len({*mine} & {*theirs}):,} are the same: only runs on the same test documents can be compared"
        )
    if own != others:
        raise UserError(f"{first} and {second} were tested on the same texts with other labels: not comparable")
    places = np.empty(len(own), np.int64)
    places[orders[0]] = orders[1]
    return places


def mcnemar(first_right: Flags, second_right: Flags) -> dict[str, Any]:
    """McNemar's exact test: are the documents that only one of two classifiers gets right shared out evenly?

    By (D,) whether each is right, "only_first", "only_second", "both" and "neither" count documents, and "p" is the
    two-sided probability of a split at least as uneven if both were equally good (binomial; Dietterich 1998, section
    3.1, in its exact form).
    """
    from scipy.stats import binomtest

    cases = {"only_first": first_right & ~second_right, "only_second": second_right & ~first_right}
    cases |= {"both": first_right & second_right, "neither": ~first_right & ~second_right}
    counts = {name: int(rows.sum()) for name, rows in cases.items()}
    differing = counts["only_first"] + counts["only_second"]
    return {**counts, "p": float(binomtest(counts["only_first"], differing).pvalue) if differing else 1.0}
