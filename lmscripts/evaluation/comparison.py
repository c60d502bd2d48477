"""Runs as their database holds them, found by what they left, and compared with each other.

A database is only read here. What a run measured is not believed but computed again from its predictions.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmscripts.data.labelled_store import SCHEMA_VERSION
from lmscripts.errors import UserError
from lmscripts.evaluation.metrics import Flags, Floats, Integers

RESULTS = ("_train_test_stats.json", "_testset_predictions.csv", "_testset_fragments.csv")
FINISHED = ("done", "finished")  # what the status of a run says when it came to its end
PARTS = ("train", "validation", "test")
_TABLES = (
    *("meta", "documents", "labels", "document_labels", "folds", "splits", "split_members", "tokenizations"),
    *("runs", "epochs", "predictions", "test_metrics", "bad_rows"),
)


@dataclass(frozen=True)
class Predictions:
    """What a run said about N documents or fragments of K labels.

    Attributes:
        doc_ids: (N,) rising.
        fold_idx: (N,) number of the fragment in its document; -1 for documents.
        probabilities: (N, K) after the temperature.
        logits: (N, K) before it; None when they were not kept.
        truth: (N, K) labels of the documents.
    """

    doc_ids: Integers
    fold_idx: Integers
    probabilities: Floats
    logits: Floats | None
    truth: Flags


@dataclass(frozen=True)
class Run:
    """A run and its data.

    Attributes:
        file: the database.
        record: columns of its row in `runs`, with "options" and "facts" as dictionaries, and "tokenizer", "folding"
            and "split" in plain values.
        meta: what the database says about the table it was made from, and "bad_rows", how many were refused.
        labels: names of the K labels.
        multi_label: a document may have several labels, or none.
        parts: part -> (D,) documents.
        part_truth: part -> (D, K) their labels.
        predictions: (part, level) -> predictions, where there are any.
        epochs: records with epoch, step, part, metric and value.
        stored_metrics: (level, metric) -> what the run itself wrote down.
    """

    file: Path
    record: dict[str, Any]
    meta: dict[str, Any]
    labels: tuple[str, ...]
    multi_label: bool
    parts: dict[str, Integers]
    part_truth: dict[str, Flags]
    predictions: dict[tuple[str, str], Predictions]
    epochs: list[dict[str, Any]]
    stored_metrics: dict[tuple[str, str], float]


@contextmanager
def open_database(file: Path) -> Iterator[sqlite3.Connection]:
    """A database of classification, for reading only.

    Raises:
        UserError: no such file, no SQLite file, not one of ours, of another version, or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")
    with open(file, "rb") as opened:
        if opened.read(16) != b"SQLite format 3\0":
            raise UserError(f"{file} is no SQLite database")
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if missing := [name for name in _TABLES if name not in found]:
                raise UserError(f"{file} is not a database of finetune_classifier.py: it has no table {missing[0]}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != SCHEMA_VERSION:
                raise UserError(f"{file} has version {version} of the tables; this program reads {SCHEMA_VERSION}")
            yield connection
    except sqlite3.Error as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def read_results(path: Path, run_id: int | None = None, flag: str = "--run") -> Run:
    """The run that a file is about: a database, or what a run left beside it.

    Args:
        path: a database; or the statistics or predictions of a run, of which the statistics name run and database.
        run_id: number of the run; None takes what the statistics say, or the newest finished run of a database.
        flag: the option that gives the number, for the sentence.

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
    number, database, key = _origin(statistics)
    if run_id is not None and run_id != number:
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


def _origin(statistics: Path) -> tuple[int, Path, str | None]:
    """Run, database and key that the statistics of a run name."""
    try:
        found = json.loads(statistics.read_text(encoding="utf-8"))
        number, name, key = found["run"], found["database"], found.get("key")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{statistics} does not say of which run it is ({type(error).__name__}: {error})") from error
    if type(number) is not int or not isinstance(name, str):
        raise UserError(f"{statistics} does not say of which run it is: run {number!r}, database {name!r}")
    place = statistics.parent / name
    return number, place.resolve() if ".." in place.parts else place, key


def read_run(file: Path, run_id: int | None = None) -> Run:
    """A finished run with its predictions for the test part; the newest one unless a number is given.

    Raises:
        UserError: the file is not a database of ours, it has no such finished run, or the run has no predictions.
    """
    with open_database(file) as connection:
        record = _find(connection, file, run_id)
        labels = tuple(name for (name,) in connection.execute("SELECT name FROM labels ORDER BY label_id"))
        query = "SELECT doc_id, label_id FROM document_labels ORDER BY doc_id, label_id"
        truth = _Truth(_integers(connection.execute(query).fetchall(), 2), len(labels))
        query = "SELECT doc_id FROM split_members WHERE split_id = ? AND part = ? ORDER BY doc_id"
        parts = {
            part: _integers(connection.execute(query, (record["split_id"], part)).fetchall())[:, 0] for part in PARTS
        }
        part_truth = {part: truth.of(doc_ids) for part, doc_ids in parts.items()}
        predictions = {
            (part, level): found
            for part in PARTS
            for level in ("document", "fragment")
            if (found := _predictions(connection, record["run_id"], part, level, truth)) is not None
        }
        if ("test", "document") not in predictions:
            raise UserError(f"run {record['run_id']} in {file} has no predictions for test documents")
        sums = predictions["test", "document"].probabilities.sum(1)
        several = any((flags.sum(1) != 1).any() for flags in part_truth.values())
        meta = {
            key: _plain_value(value) for key, value in connection.execute("SELECT key, value FROM meta ORDER BY rowid")
        }
        meta.setdefault("bad_rows", *connection.execute("SELECT count(*) FROM bad_rows").fetchone())
        query = "SELECT epoch, step, part, metric, value FROM epochs WHERE run_id = ? ORDER BY epoch, part, metric"
        names = ("epoch", "step", "part", "metric", "value")
        epochs = [dict(zip(names, row, strict=True)) for row in connection.execute(query, (record["run_id"],))]
        query = "SELECT level, metric, value FROM test_metrics WHERE run_id = ?"
        stored = {(level, metric): value for level, metric, value in connection.execute(query, (record["run_id"],))}
    multi_label = meta.get("multi_label") is True or bool(several or (np.abs(sums - 1) > 1e-3).any())
    return Run(file, record, meta, labels, multi_label, parts, part_truth, predictions, epochs, stored)


def read_texts(run: Run, doc_ids: Sequence[int] | Integers) -> list[str]:
    """Texts of documents, in the given order."""
    query, texts = "SELECT text FROM documents WHERE doc_id = ?", []
    with open_database(run.file) as connection:
        for doc_id in doc_ids:
            found = connection.execute(query, (int(doc_id),)).fetchone()
            if found is None:
                raise UserError(f"{run.file}: run {run.record['run_id']} names document {doc_id}, which is not there")
            texts.append(str(found[0]))
    return texts


def read_places(run: Run, doc_id: int) -> dict[str, Any]:
    """Where a document stood: "file", "line", "name", "text", "spans" {fragment number: (char_start, char_end)}."""
    with open_database(run.file) as connection:
        query = "SELECT file, line, name, text FROM documents WHERE doc_id = ?"
        source, line, name, text = connection.execute(query, (int(doc_id),)).fetchone()
        query = "SELECT idx, char_start, char_end FROM folds WHERE tok_id = ? AND doc_id = ? ORDER BY idx"
        rows = connection.execute(query, (run.record["tok_id"], int(doc_id))).fetchall()
    spans = {idx: (start, end) for idx, start, end in rows}
    return {"file": source, "line": line, "name": name, "text": str(text), "spans": spans}


def units_of(run: Run, doc_ids: Sequence[int] | Integers) -> Integers:
    """(D,) the unit of each document, numbered from 0: documents of one group, text or name are one, also by others.

    A split does not take them apart as they are alike, and for the same reason a sample of documents must not.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    marks: dict[tuple[str, Any], int] = {}
    owners, places = list[int](), list[int]()
    query = "SELECT grp, text_hash, name FROM documents WHERE doc_id = ?"
    with open_database(run.file) as connection:
        for number, doc_id in enumerate(doc_ids):
            found = connection.execute(query, (int(doc_id),)).fetchone() or ()
            for mark in zip(("group", "text", "name"), found):
                if mark[1] is not None:
                    owners.append(number)
                    places.append(marks.setdefault(mark, len(marks)))
    count = len(doc_ids)
    size = count + len(marks)
    links = csr_matrix((np.ones(len(owners)), (owners, np.array(places, np.int64) + count)), shape=(size, size))
    _, numbers = connected_components(links, directed=False)
    return np.unique(numbers[:count], return_inverse=True)[1].astype(np.int64)


def digests(run: Run, doc_ids: Integers) -> list[bytes]:
    """sha256 of each text: the documents of two databases are the same if these are."""
    return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in read_texts(run, doc_ids)]


# ---- two runs ----------------------------------------------------------------------------------------------------


def places_of_same(first: Run, second: Run) -> Integers:
    """For each test document of the first run its place in the predictions of the second, found by text and labels.

    Raises:
        UserError: the runs know other labels, were tested on other documents, or on others' truths.
    """
    names = [f"run {run.record['run_id']} in {run.file.name}" for run in (first, second)]
    if first.multi_label != second.multi_label:
        raise UserError(f"of {names[0]} and {names[1]} only one gives several labels: they cannot be compared")
    if sorted(first.labels) != sorted(second.labels):
        odd = sorted(set(first.labels) ^ set(second.labels))
        raise UserError(f"{names[0]} and {names[1]} know other labels, for one {odd[0]!r}, and cannot be compared")
    tests = [run.predictions["test", "document"] for run in (first, second)]
    keys = [digests(run, test.doc_ids) for run, test in zip((first, second), tests, strict=True)]
    if sorted(keys[0]) != sorted(keys[1]):
        both = len(set(keys[0]) & set(keys[1]))
        raise UserError(
            f"{names[0]} was tested on {len(keys[0]):,} documents, {names[1]} on {len(keys[1]):,}, and {both:,} are "
            "the same: only runs on the same test documents can be compared"
        )
    truths = [[tuple(np.flatnonzero(row)) for row in tests[0].truth]]
    columns = [second.labels.index(name) for name in first.labels]
    truths.append([tuple(np.flatnonzero(row)) for row in tests[1].truth[:, columns]])
    orders = [sorted(range(len(own)), key=lambda n: (own[n], truth[n])) for own, truth in zip(keys, truths)]
    if [truths[0][n] for n in orders[0]] != [truths[1][n] for n in orders[1]]:
        raise UserError(f"{names[0]} and {names[1]} were tested on the same texts with other labels: not comparable")
    places = np.empty(len(orders[0]), np.int64)
    places[orders[0]] = orders[1]
    return places


def mcnemar(first_right: Flags, second_right: Flags) -> dict[str, Any]:
    """McNemar's exact test: are the documents that only one of two classifiers gets right shared out evenly?

    Args:
        first_right: (D,) whether the first classifier is right.
        second_right: (D,) whether the second one is.

    Returns:
        "only_first", "only_second", "both", "neither", and "p", the two-sided probability of a split at least as
        uneven if both were equally good (binomial; Dietterich 1998, section 3.1, in its exact form).
    """
    from scipy.stats import binomtest

    first, second = np.asarray(first_right, np.bool_), np.asarray(second_right, np.bool_)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    return {"only_first": only_first, "only_second": only_second, "both": both, "neither": neither, "p": p}


# ---- reading -----------------------------------------------------------------------------------------------------


class _Truth:
    """Labels of documents, from rising (document, label) pairs."""

    def __init__(self, pairs: Integers, num_labels: int) -> None:
        self.doc_ids, self.label_ids, self.num_labels = pairs[:, 0], pairs[:, 1], num_labels

    def of(self, doc_ids: Integers) -> Flags:
        flags = np.zeros((len(doc_ids), self.num_labels), dtype=np.bool_)
        first = np.searchsorted(self.doc_ids, doc_ids, side="left")
        counts = np.searchsorted(self.doc_ids, doc_ids, side="right") - first
        for number in range(int(counts.max(initial=0))):
            rows = np.flatnonzero(counts > number)
            flags[rows, self.label_ids[first[rows] + number]] = True
        return flags


def _find(connection: sqlite3.Connection, file: Path, run_id: int | None) -> dict[str, Any]:
    """The row of a finished run, with what it refers to."""
    names = ("run_id", "name", "options", "facts", "tok_id", "split_id", "model_dir", "started", "ended", "status")
    runs = [dict(zip(names, row, strict=True)) for row in connection.execute(f"SELECT {', '.join(names)} FROM runs")]
    finished = {run["run_id"]: run for run in runs if run["status"] in FINISHED}
    if run_id is not None and run_id not in finished:
        status = next((f"is {run['status']}" for run in runs if run["run_id"] == run_id), "is not there")
        known = ", ".join(map(str, sorted(finished))) or "none"
        raise UserError(f"run {run_id} in {file} {status}; finished runs: {known}")
    if not finished:
        raise UserError(f"{file} holds {len(runs)} runs, none of them finished")
    record = finished[max(finished) if run_id is None else run_id]
    record |= {name: _json(record[name]) for name in ("options", "facts")}
    query = "SELECT tokenizer, fingerprint, settings FROM tokenizations WHERE tok_id = ?"
    tokenizer, fingerprint, folding = connection.execute(query, (record["tok_id"],)).fetchone() or (None,) * 3
    split = connection.execute("SELECT settings FROM splits WHERE split_id = ?", (record["split_id"],)).fetchone()
    record |= {"tokenizer": tokenizer, "tokenizer_fingerprint": fingerprint, "folding": _json(folding)}
    return record | {"split": _json(split and split[0])}


def _plain_value(text: str) -> Any:
    """What a value of `meta` holds: text, unless it is a JSON object, list or flag."""
    return json.loads(text) if re.fullmatch(r"true|false|null|\{.*\}|\[.*\]", str(text), re.DOTALL) else text


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = {"unreadable": re.sub(r"\s+", " ", str(text))}
    return value if isinstance(value, dict) else {"value": value}


def _integers(rows: Sequence[Sequence[int]], columns: int = 1) -> Integers:
    return np.array(rows, dtype=np.int64).reshape(-1, columns)


def _predictions(
    connection: sqlite3.Connection, run_id: int, part: str, level: str, truth: _Truth
) -> Predictions | None:
    query = "SELECT doc_id, fold_idx, probabilities, logits FROM predictions "
    query += "WHERE run_id = ? AND part = ? AND level = ? ORDER BY doc_id, fold_idx"
    rows = connection.execute(query, (run_id, part, level)).fetchall()
    if not rows:
        return None
    what = f"run {run_id}, {part} {level}s"
    doc_ids, fold_idx, blobs, raw_logits = zip(*rows, strict=True)
    logits = (
        None if any(blob is None for blob in raw_logits) else _floats(raw_logits, truth.num_labels, f"{what}: logits")
    )
    probabilities = _floats(blobs, truth.num_labels, f"{what}: probabilities")
    ids = np.array(doc_ids, np.int64)
    return Predictions(ids, np.array(fold_idx, np.int64), probabilities, logits, truth.of(ids))


def _floats(blobs: Sequence[bytes], num_labels: int, what: str) -> Floats:
    for blob in blobs:
        if not isinstance(blob, bytes) or len(blob) != 4 * num_labels:
            found = f"{len(blob) / 4:g} numbers" if isinstance(blob, bytes) else f"{blob!r}"
            raise UserError(f"{what} must be {num_labels} numbers, one for each label in the database, not {found}")
    values = np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, num_labels).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{what} hold {int((~np.isfinite(values)).sum())} values that are not finite numbers")
    return values
