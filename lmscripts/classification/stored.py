"""Reading rows, labels and splits from the SQLite file of a task as arrays, and writing what a run gave."""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.classification.splits import SplitDocument, shown, split_report
from lmscripts.classification.sqlite_file import damaged, opened, transaction
from lmscripts.errors import UserError
from lmscripts.order import hash_counters

Ints = NDArray[np.int64]

_COLUMNS = "f.row_check, f.doc_id, f.idx, f.n, f.char_start, f.char_end, f.ids"
_FOLDS = (
    f"SELECT {_COLUMNS} FROM split_members m "
    "CROSS JOIN folds f ON f.tok_id = ? AND f.doc_id = m.doc_id WHERE m.split_id = ? AND m.part = ? "
    "ORDER BY m.doc_id, f.idx"
)
_ALL_FOLDS = f"SELECT {_COLUMNS} FROM folds f WHERE f.fold_id > ? AND f.fold_id <= ?"
_CHECKED_AT_ONCE = 50_000
_LABELS = (
    "SELECT m.doc_id, l.label_id FROM split_members m LEFT JOIN document_labels l ON l.doc_id = m.doc_id "
    "WHERE m.split_id = ? AND m.part = ? ORDER BY m.doc_id, l.label_id"
)
_BAD_ROWS = "SELECT file, line, reason, details FROM bad_rows ORDER BY rowid"
_LINES = 5  # lines of bad rows that are named for each reason


@dataclass(frozen=True)
class FoldRows:
    """Rows of a part, in the order of documents and of the rows within each. R rows, N tokens.

    Attributes:
        ids: (N,) int32, the tokens of all rows, special tokens included, one row after the other.
        offsets: (R + 1,) int64, row r is `ids[offsets[r]:offsets[r + 1]]`.
        doc_ids: (R,) int64.
        idx, n: (R,) int64, number of the row within its document, and of its rows.
        char_start, char_end: (R,) int64, the characters of the document's text that it covers.
    """

    ids: NDArray[np.int32]
    offsets: Ints
    doc_ids: Ints
    idx: Ints
    n: Ints
    char_start: Ints
    char_end: Ints


@dataclass(frozen=True)
class Stored:
    """The SQLite file of a task.

    Every method opens the file anew, so that an object can be handed to other processes and threads. Only the main
    process of a run writes. All methods raise `UserError` where the file is damaged or cannot be written.
    """

    path: Path

    def meta(self) -> dict[str, Any]:
        """What the file was made from: source, sha256 of each file, [part, name, sha256] of each, options, counts."""
        with opened(self.path) as connection:
            return read_meta(self.path, connection)

    def labels(self) -> list[str]:
        """Names of the labels, in the order of their ids."""
        with opened(self.path) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM labels ORDER BY label_id")]

    def read_folds(self, tok_id: int, split_id: int, part: str) -> FoldRows:
        """All rows of a part, each compared with the check that was stored with it."""
        with opened(self.path) as connection:
            rows = connection.execute(_FOLDS, (tok_id, split_id, part)).fetchall()
            known = connection.execute("SELECT vocab_size FROM tokenizations WHERE tok_id = ?", (tok_id,)).fetchone()
        checks, *numbers, blobs = zip(*rows) if rows else ((),) * 7
        columns = check_rows(self.path, checks, numbers, blobs)
        sizes = np.fromiter(map(len, blobs), np.int64, len(rows))
        ids = np.frombuffer(b"".join(blobs), "<i4").astype(np.int32, copy=False)
        if len(ids) and (ids.min() < 0 or ids.max() >= known[0]):
            raise damaged(self.path, f"a token {max(ids.max(), -ids.min())} of a vocabulary of {known[0]:,}")
        return FoldRows(ids, np.append(0, np.cumsum(sizes // 4)), *columns)

    def read_labels(self, split_id: int, part: str) -> tuple[Ints, Ints, Ints]:
        """The documents of a part, D of them, with their labels; those that have none are among them.

        Returns:
            doc_ids (D,) in rising order, offsets (D + 1,), and label ids: document d has
            `label_ids[offsets[d]:offsets[d + 1]]`; with one label each, label_ids is (D,).
        """
        with opened(self.path) as connection:
            rows = connection.execute(_LABELS, (split_id, part)).fetchall()
        owners = np.fromiter((doc_id for doc_id, _ in rows), np.int64, len(rows))
        labelled = np.fromiter((label_id is not None for _, label_id in rows), np.bool_, len(rows))
        doc_ids, places = np.unique(owners, return_inverse=True)
        numbers = np.bincount(places[labelled], minlength=len(doc_ids))
        label_ids = np.array([label_id for _, label_id in rows if label_id is not None], np.int64)
        return doc_ids, np.append(0, np.cumsum(numbers)), label_ids

    def read_texts(self, doc_ids: Sequence[int]) -> list[str]:
        """Texts of documents, in the order given."""
        sql = "SELECT text FROM documents WHERE doc_id = ?"
        with opened(self.path) as connection:
            return [connection.execute(sql, (int(doc_id),)).fetchone()[0] for doc_id in doc_ids]

    def documents_without_rows(self, tok_id: int) -> list[int]:
        """Documents of which a tokenizer makes no token (of control characters only, for example)."""
        sql = "SELECT doc_id FROM documents EXCEPT SELECT doc_id FROM folds WHERE tok_id = ? AND idx = 0 ORDER BY 1"
        with opened(self.path) as connection:
            return [doc_id for (doc_id,) in connection.execute(sql, (tok_id,))]

    def bad_rows(self) -> list[tuple[str, int, str, str]]:
        """(file, line, reason, details) of every row that was left out."""
        with opened(self.path) as connection:
            return connection.execute(_BAD_ROWS).fetchall()

    def reading_sentences(self) -> list[str]:
        """Rows that were left out, by reason and with the first lines of each, and what was put right in others."""
        rows: dict[str, list[tuple[str, int, str, str]]] = {}
        for row in self.bad_rows():
            rows.setdefault(row[2], []).append(row)
        lines = []
        for reason, found in sorted(rows.items(), key=lambda item: -len(item[1])):
            places = ", ".join(f"{file}:{line}" for file, line, *_ in found[:_LINES])
            more = ", ..." if len(found) > _LINES else ""
            lines.append(f"left out {len(found):,} rows, {reason}: {places}{more} (the first: {shown(found[0][3])})")
        lines += [f"put right {number:,} {kind.replace('_', ' ')}" for kind, number in self.meta()["repairs"].items()]
        return lines

    def split_sentences(self, split_id: int) -> list[str]:
        """What the split gives: rows and shares of each part and class, and what to beware of."""
        names = self.labels()
        with opened(self.path) as connection:
            documents = read_split_documents(connection)
            sql = "SELECT part FROM split_members WHERE split_id = ? ORDER BY doc_id"
            parts = [part for (part,) in connection.execute(sql, (split_id,))]
        return split_report(documents, parts, names)

    # ---- what a run gave ----

    def start_run(
        self,
        name: str,
        options: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        tok_id: int,
        split_id: int,
        model_dir: str | Path,
    ) -> int:
        """Enter a run with the status "running"; returns its number."""
        sql = (
            "INSERT INTO runs(name, options, facts, tok_id, split_id, model_dir, started, status) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'running')"
        )
        values = (name, _json(options), _json(facts), tok_id, split_id, str(model_dir), time.time())
        with opened(self.path, write=True) as connection, transaction(connection):
            return int(connection.execute(sql, values).lastrowid or 0)

    def end_run(self, run_id: int, status: str, facts: Mapping[str, Any] | None = None) -> None:
        """Write how a run ended ("done", "stopped", ...), and facts in place of those of its start.

        Raises:
            UserError: there is no such run.
        """
        sql = "UPDATE runs SET ended = ?, status = ?, facts = coalesce(?, facts) WHERE run_id = ?"
        values = (time.time(), status, None if facts is None else _json(facts), run_id)
        with opened(self.path, write=True) as connection, transaction(connection):
            if connection.execute(sql, values).rowcount != 1:
                raise UserError(f"{self.path} holds no run {run_id}")

    def write_epoch(self, run_id: int, epoch: int, step: int, part: str, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a part after an epoch, in place of earlier ones; a NaN is stored as NULL."""
        rows = [(run_id, epoch, step, part, metric, float(value)) for metric, value in metrics.items()]
        self._write("INSERT OR REPLACE INTO epochs VALUES (?, ?, ?, ?, ?, ?)", rows)

    def write_test_metrics(self, run_id: int, level: str, metrics: Mapping[str, float]) -> None:
        """Write the metrics of the test part at a level ("document" or "fragment"), in place of earlier ones."""
        rows = [(run_id, level, metric, float(value)) for metric, value in metrics.items()]
        self._write("INSERT OR REPLACE INTO test_metrics VALUES (?, ?, ?, ?)", rows)

    def write_predictions(
        self,
        run_id: int,
        part: str,
        level: str,
        doc_ids: Sequence[int] | Ints,
        fold_idx: Sequence[int] | Ints | None,
        probabilities: NDArray[Any],
        logits: NDArray[Any],
    ) -> None:
        """Write the predictions of a part, P of them for L labels, in place of earlier ones of the same rows.

        Args:
            run_id: the run.
            part: validation or test.
            level: document or fragment.
            doc_ids: (P,).
            fold_idx: (P,), number of the row within its document; None for documents.
            probabilities: (P, L), after the temperature.
            logits: (P, L), before.

        Raises:
            UserError: shapes that do not go together.
        """
        places = [-1] * len(doc_ids) if fold_idx is None else fold_idx
        if not len(doc_ids) == len(places) == len(probabilities) == len(logits) or probabilities.shape != logits.shape:
            raise UserError(
                f"{len(doc_ids)} documents and {len(places)} rows do not go with probabilities of the shape "
                f"{probabilities.shape} and logits of the shape {logits.shape}"
            )
        rows = [
            (run_id, part, level, int(doc_id), int(place), p.tobytes(), z.tobytes())
            for doc_id, place, p, z in zip(doc_ids, places, probabilities.astype("<f4"), logits.astype("<f4"))
        ]
        self._write("INSERT OR REPLACE INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _write(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        with opened(self.path, write=True) as connection, transaction(connection):
            connection.executemany(sql, rows)


def read_meta(path: Path, connection: sqlite3.Connection) -> dict[str, Any]:
    """See `Stored.meta`."""
    values = dict(connection.execute("SELECT key, value FROM meta"))
    try:
        return {key: value if key == "source" else json.loads(value) for key, value in values.items()}
    except (ValueError, TypeError) as error:
        raise damaged(path, f"its facts are no JSON: {error}") from error


def row_checks(numbers: Sequence[Sequence[int] | Ints], blobs: Sequence[bytes]) -> Ints:
    """(R,) a number for each of R rows that tells a changed one: a CRC of its ids, begun with a hash of its numbers.

    SQLite keeps no check of its own, and a flipped bit would be read as another token.

    Args:
        numbers: (R,) each of doc_id, idx, n, char_start and char_end.
        blobs: R, the ids.
    """
    mixed = np.zeros(len(blobs), np.uint64)
    for column in numbers:
        mixed = hash_counters(mixed, np.asarray(column, np.int64).view(np.uint64))
    return np.fromiter(map(zlib.crc32, blobs, (mixed >> np.uint64(32)).tolist()), np.int64, len(blobs))


def check_rows(
    path: Path, checks: Sequence[int], numbers: Sequence[Sequence[int]], blobs: Sequence[bytes]
) -> list[Ints]:
    """Compare rows with the checks that were stored with them; returns their numbers as arrays.

    Raises:
        OtherVersionError: a row differs.
    """
    try:
        columns = [np.fromiter(column, np.int64, len(blobs)) for column in numbers]
        wrong = np.flatnonzero(row_checks(columns, blobs) != np.fromiter(checks, np.int64, len(blobs)))
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"a row holds no numbers: {error}") from error
    if len(wrong):
        first = ", ".join(str(column[wrong[0]]) for column in columns[:2])
        raise damaged(path, f"{len(wrong):,} rows are not as they were written, the first of document and row {first}")
    return columns


def check_all_rows(path: Path, connection: sqlite3.Connection) -> None:
    """Compare the rows of all tokenizations with their checks, in memory that does not grow with them.

    Raises:
        OtherVersionError: a row differs.
    """
    (last,) = connection.execute("SELECT max(fold_id) FROM folds").fetchone()
    for first in range(0, last or 0, _CHECKED_AT_ONCE):
        rows = connection.execute(_ALL_FOLDS, (first, first + _CHECKED_AT_ONCE)).fetchall()
        checks, *numbers, blobs = zip(*rows) if rows else ((),) * 7
        check_rows(path, checks, numbers, blobs)


def read_split_documents(connection: sqlite3.Connection) -> list[SplitDocument]:
    """What a split needs to know of all documents, in the order of their ids, which count from 0."""
    labels: dict[int, list[int]] = {}
    for doc_id, label_id in connection.execute("SELECT doc_id, label_id FROM document_labels"):
        labels.setdefault(doc_id, []).append(label_id)
    sql = "SELECT doc_id, text_hash, grp, given_part, name FROM documents ORDER BY doc_id"
    return [SplitDocument(tuple(labels.get(doc_id, ())), *facts) for doc_id, *facts in connection.execute(sql)]


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), ensure_ascii=False, sort_keys=True, default=str)
