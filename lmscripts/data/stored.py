"""Reading rows, labels and splits from the SQLite file of a task as arrays, and writing what a run gave."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmscripts.counters import hash_counters
from lmscripts.data.splits import SplitDocument, shown, split_report
from lmscripts.data.sqlite_file import damaged, is_alive, opened, process_name, transaction
from lmscripts.errors import UserError

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


class RunKey(NamedTuple):
    """What a run writes by: numbers are given again in a file that is built anew, and the key is drawn at random."""

    run_id: int
    key: str


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

    def read_places(self, run: RunKey) -> dict[int, tuple[int, str]]:
        """(line, name) of every document, by its number, as long as the file is the one that a run learnt from.

        Raises:
            UserError: it is not.
        """
        with opened(self.path) as connection:
            if _facts_of(connection, run) is None:
                raise self._other_run(run)
            rows = connection.execute("SELECT doc_id, line, name FROM documents")
            return {doc_id: (line, name) for doc_id, line, name in rows}

    def origin(self, tok_id: int, split_id: int) -> str:
        """What the file, a tokenization and a split were made from, to be compared."""
        with opened(self.path) as connection:
            return _read_origin(self.path, connection, tok_id, split_id)

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
        origin: str | None = None,
    ) -> RunKey:
        """Enter a run of this process with the status "running".

        An earlier run of the same folder that still has this status was killed, unless its process is there.

        Args:
            name: of the run.
            options: of the script.
            facts: whatever else is known of it.
            tok_id: tokenization that it learns from.
            split_id: likewise the split.
            model_dir: folder of its model.
            origin: what `origin` gave when the run looked what it is to learn from; None: never mind.

        Raises:
            UserError: the file is not made of that any more.
        """
        run = (
            "INSERT INTO runs(name, options, facts, tok_id, split_id, model_dir, started, status) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'running')"
        )
        killed = "UPDATE runs SET status = 'killed' WHERE run_id = ? AND model_dir = ?"
        key = secrets.token_hex(16)
        facts = {**facts, "key": key, "process": process_name()}
        values = (name, _json(options), _json(facts), tok_id, split_id, str(model_dir), time.time())
        with opened(self.path, write=True) as connection, transaction(connection):
            if origin is not None and _read_origin(self.path, connection, tok_id, split_id) != origin:
                raise UserError(
                    f"{self.path} was built again while this run was about to begin: nothing was written into it; "
                    "start again, or give another --database"
                )
            for run_id, _, alive in read_running(connection):
                if not alive:
                    connection.execute(killed, (run_id, str(model_dir)))
            return RunKey(int(connection.execute(run, values).lastrowid or 0), key)

    def holds_run(self, run: RunKey) -> bool:
        """Whether a run is entered here; another one may have its number."""
        with opened(self.path) as connection:
            return _facts_of(connection, run) is not None

    def go_on_with_run(self, run: RunKey) -> None:
        """Write that a run goes on, in this process."""
        with self._writing(run) as (connection, facts):
            sql = "UPDATE runs SET ended = NULL, status = 'running', facts = ? WHERE run_id = ?"
            connection.execute(sql, (_json({**facts, "process": process_name()}), run.run_id))

    def end_run(self, run: RunKey, status: str, facts: Mapping[str, Any] | None = None) -> None:
        """Write how a run ended ("done", "stopped", ...), and facts in place of those of its start."""
        with self._writing(run) as (connection, known):
            known = {name: value for name, value in known.items() if name != "process"}
            ended = {**(known if facts is None else facts), "key": run.key}
            sql = "UPDATE runs SET ended = ?, status = ?, facts = ? WHERE run_id = ?"
            connection.execute(sql, (time.time(), status, _json(ended), run.run_id))

    def write_epoch(self, run: RunKey, epoch: int, step: int, part: str, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a part after an epoch, in place of earlier ones; a NaN is stored as NULL."""
        rows = [(run.run_id, epoch, step, part, metric, float(value)) for metric, value in metrics.items()]
        self._write(run, "INSERT OR REPLACE INTO epochs VALUES (?, ?, ?, ?, ?, ?)", rows)

    def write_test_metrics(self, run: RunKey, level: str, metrics: Mapping[str, float]) -> None:
        """Write the metrics of the test part at a level ("document" or "fragment"), in place of earlier ones."""
        rows = [(run.run_id, level, metric, float(value)) for metric, value in metrics.items()]
        self._write(run, "INSERT OR REPLACE INTO test_metrics VALUES (?, ?, ?, ?)", rows)

    def write_predictions(
        self,
        run: RunKey,
        part: str,
        level: str,
        doc_ids: Sequence[int] | Ints,
        fold_idx: Sequence[int] | Ints | None,
        probabilities: NDArray[Any],
        logits: NDArray[Any],
    ) -> None:
        """Write the predictions of a part, P of them for L labels, in place of earlier ones of the same rows.

        Args:
            run: the run.
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
            (run.run_id, part, level, int(doc_id), int(place), p.tobytes(), z.tobytes())
            for doc_id, place, p, z in zip(doc_ids, places, probabilities.astype("<f4"), logits.astype("<f4"))
        ]
        self._write(run, "INSERT OR REPLACE INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _write(self, run: RunKey, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        with self._writing(run) as (connection, _):
            connection.executemany(sql, rows)

    @contextmanager
    def _writing(self, run: RunKey) -> Iterator[tuple[sqlite3.Connection, dict[str, Any]]]:
        """A transaction in which the run is known to be entered, and its facts."""
        with opened(self.path, write=True) as connection, transaction(connection):
            facts = _facts_of(connection, run)
            if facts is None:
                raise self._other_run(run)
            yield connection, facts

    def _other_run(self, run: RunKey) -> UserError:
        return UserError(
            f"{self.path} was built again since run {run.run_id} was entered there, which it does not hold any more: "
            "nothing was written; to go on, give the table of the run, its --run_name, another --database and "
            "--do_continue"
        )


def read_meta(path: Path, connection: sqlite3.Connection) -> dict[str, Any]:
    """See `Stored.meta`."""
    values = dict(connection.execute("SELECT key, value FROM meta"))
    try:
        return {key: value if key == "source" else json.loads(value) for key, value in values.items()}
    except (ValueError, TypeError) as error:
        raise damaged(path, f"its facts are no JSON: {error}") from error


def read_running(connection: sqlite3.Connection) -> list[tuple[int, str, bool | None]]:
    """(number, name, whether its process is there or None for unknown) of every run whose end was not written."""
    rows = connection.execute(
        "SELECT run_id, name, facts FROM runs WHERE status = 'running' ORDER BY run_id"
    ).fetchall()
    processes = [json.loads(facts).get("process") for *_, facts in rows]
    return [(*row[:2], bool(process) and is_alive(process)) for row, process in zip(rows, processes, strict=True)]


def _facts_of(connection: sqlite3.Connection, run: RunKey) -> dict[str, Any] | None:
    """Facts of a run; None if there is no such run, or another that has its number."""
    row = connection.execute("SELECT facts FROM runs WHERE run_id = ?", (run.run_id,)).fetchone()
    facts: dict[str, Any] = {} if row is None else json.loads(row[0])
    return facts if facts.get("key") == run.key else None


def _read_origin(path: Path, connection: sqlite3.Connection, tok_id: int, split_id: int) -> str:
    tok = connection.execute("SELECT fingerprint, settings FROM tokenizations WHERE tok_id = ?", (tok_id,)).fetchone()
    split = connection.execute("SELECT settings FROM splits WHERE split_id = ?", (split_id,)).fetchone()
    return _json({"meta": read_meta(path, connection), "tokenization": tok, "split": split})


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
