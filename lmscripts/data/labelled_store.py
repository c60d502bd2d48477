"""The SQLite file of a classification task: its schema, who may change it, and all that is read from it or written.

    meta            what it was made from: names and hashes of the source, options, counts
    documents       the good rows of the table, or of each of its files; bad_rows: the others, with the reason
    labels          0, 1, ... with their names; document_labels: which a document has
    tokenizations   a tokenizer with fold settings; folds: its rows, int32 ids (little endian) with special tokens,
                    and `row_checks` of each
    splits          settings of a split; split_members: the part of every document
    runs            one row a run; epochs, predictions (float32, little endian) and test_metrics: what it gave

A new file is built aside and renamed. What is added to one goes in by one transaction. Either way a process that is
killed leaves what was there before. Who builds or adds holds a lock, and so does every run as long as it lives; the
kernel frees the locks of a process that dies.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import sqlite3
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lmscripts.counters import hash_counters
from lmscripts.data.splits import SplitDocument, SplitSettings, split_report
from lmscripts.errors import UserError, naming
from lmscripts.files import fsync
from lmscripts.text.labels import MISSING, doubts, in_words, shown

Ints = NDArray[np.int64]

APPLICATION_ID = 0x6C6D7363  # "lmsc"
SCHEMA_VERSION = 2
_MAGIC = b"SQLite format 3\0"
_BUSY_SECONDS, _PATIENT_SECONDS = 10.0, 120.0  # at a beginning, and with the work of hours to be written
_BUILD_SECONDS = 6 * 3600.0
_CHECKED_AT_ONCE = 50_000
_DETAILS = 400  # characters of what is wrong with a row
_LINES = 5  # lines of bad rows that are named for each reason

SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE documents(doc_id INTEGER PRIMARY KEY, file TEXT, line INTEGER, name TEXT, text TEXT NOT NULL, grp TEXT,
    given_part TEXT, text_hash BLOB NOT NULL);
CREATE TABLE labels(label_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE document_labels(doc_id INTEGER, label_id INTEGER, PRIMARY KEY(doc_id, label_id)) WITHOUT ROWID;
CREATE TABLE bad_rows(file TEXT, line INTEGER, reason TEXT, details TEXT, raw TEXT);
CREATE TABLE tokenizations(tok_id INTEGER PRIMARY KEY, tokenizer TEXT, fingerprint TEXT, settings TEXT,
    vocab_size INTEGER, UNIQUE(fingerprint, settings));
CREATE TABLE folds(fold_id INTEGER PRIMARY KEY, tok_id INTEGER, doc_id INTEGER, idx INTEGER, n INTEGER,
    char_start INTEGER, char_end INTEGER, ids BLOB, row_check INTEGER);
CREATE UNIQUE INDEX folds_of_documents ON folds(tok_id, doc_id, idx);
CREATE TABLE splits(split_id INTEGER PRIMARY KEY, settings TEXT UNIQUE);
CREATE TABLE split_members(split_id INTEGER, doc_id INTEGER, part TEXT, PRIMARY KEY(split_id, doc_id)) WITHOUT ROWID;
CREATE TABLE runs(run_id INTEGER PRIMARY KEY, name TEXT, options TEXT, facts TEXT, tok_id INTEGER, split_id INTEGER,
    model_dir TEXT, started REAL, ended REAL, status TEXT);
CREATE TABLE epochs(run_id INTEGER, epoch INTEGER, step INTEGER, part TEXT, metric TEXT, value REAL,
    PRIMARY KEY(run_id, epoch, part, metric)) WITHOUT ROWID;
CREATE TABLE predictions(run_id INTEGER, part TEXT, level TEXT, doc_id INTEGER, fold_idx INTEGER, probabilities BLOB,
    logits BLOB, PRIMARY KEY(run_id, part, level, doc_id, fold_idx)) WITHOUT ROWID;
CREATE TABLE test_metrics(run_id INTEGER, level TEXT, metric TEXT, value REAL, PRIMARY KEY(run_id, level, metric))
    WITHOUT ROWID;
"""

_COLUMNS = "f.row_check, f.doc_id, f.idx, f.n, f.char_start, f.char_end, f.ids"
_FOLDS = f"""SELECT {_COLUMNS} FROM split_members m CROSS JOIN folds f ON f.tok_id = ? AND f.doc_id = m.doc_id
WHERE m.split_id = ? AND m.part = ? ORDER BY m.doc_id, f.idx"""
_ALL_FOLDS = f"SELECT {_COLUMNS} FROM folds f WHERE f.fold_id > ? AND f.fold_id <= ?"
_LABELS = """SELECT m.doc_id, coalesce(l.label_id, -1) FROM split_members m LEFT JOIN document_labels l USING(doc_id)
WHERE m.split_id = ? AND m.part = ?"""
_FIRST_OF_LABELS = """SELECT l.name, count(*), d.file, d.line, min(d.doc_id) FROM labels l
JOIN document_labels USING(label_id) JOIN documents d USING(doc_id) GROUP BY l.label_id ORDER BY l.label_id"""
_REPEATED_IDS = """SELECT name, count(*), file, line, min(doc_id) AS first FROM documents WHERE name IS NOT NULL
GROUP BY name HAVING count(*) > 1 ORDER BY first"""
_NO_TEXTS = "SELECT count(*), file, line, text, min(doc_id) FROM documents WHERE lower(text) IN ({})"
_RUNS = """SELECT r.*, t.tokenizer, t.fingerprint AS tokenizer_fingerprint, t.settings AS folding, s.settings AS split
FROM runs r LEFT JOIN tokenizations t USING(tok_id) LEFT JOIN splits s USING(split_id) ORDER BY r.run_id"""
_PREDICTIONS = """SELECT doc_id, fold_idx, probabilities, logits FROM predictions
WHERE run_id = ? AND part = ? AND level = ? ORDER BY doc_id, fold_idx"""


# ---- opening -----------------------------------------------------------------------------------------------------


class OtherVersionError(UserError):
    """A file of ours that an older or newer version made, or that is damaged: one may build it again."""


def check_ours(path: Path) -> None:
    """Refuse by its first bytes what is none of ours or of another version; nothing is opened for writing."""
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
        raise UserError(f"{what} (seen from {Path.cwd()})")
    with open(path, "rb") as file:
        head = file.read(100)
    if len(head) < 100 or not head.startswith(_MAGIC):
        raise UserError(f"{path} is no SQLite file; nothing was changed. Give another --database, or move it away")
    version, application = int.from_bytes(head[60:64], "big"), int.from_bytes(head[68:72], "big")
    if application != APPLICATION_ID:
        raise UserError(
            f"{path} is an SQLite file of another program (application id {application:#x} instead of "
            f"{APPLICATION_ID:#x}); nothing was changed. Give another --database"
        )
    if version != SCHEMA_VERSION:
        raise OtherVersionError(
            f"{path} has schema version {version}, and this version reads {SCHEMA_VERSION}; nothing was changed. Give "
            "the table from which it was made, with --overwrite to build it again, or give another --database"
        )


class OtherRunError(UserError):
    """A run is not in a file any more."""


@contextmanager
def opened(path: Path, *, write: bool = False, patient: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection to one of our files, checked; what is written without a `transaction` is written at once.

    While another program writes, seconds are waited, or if `patient` minutes.

    Raises:
        OtherVersionError: of another version, truncated or damaged.
        UserError: not ours, or the system refuses to write.
    """
    check_ours(path)
    try:
        if path.with_name(f"{path.name}-journal").exists() and os.access(path, os.W_OK):
            _recover(path)  # which a connection for reading must not
        with closing(_connect(path, "rw" if write else "ro", patient)) as connection:
            connection.execute("SELECT count(*) FROM meta").fetchone()
            yield connection
    except sqlite3.DatabaseError as error:
        raise _as_sentence(path, error) from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What the block writes is written whole when it ends well, and not at all otherwise."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        yield


def _as_sentence(path: Path, error: sqlite3.DatabaseError) -> UserError:
    if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
        return UserError(f"{path}: what was to be written contradicts what is there ({error})")
    if "locked" in str(error).lower():
        return UserError(
            f"{path} cannot be used now ({error}): another program writes into it, or was "
            "left open in the midst of that: end it, wait for its end, or give another --database"
        )
    if any(reason in str(error).lower() for reason in ("full", "readonly", "unable to open", "disk i/o")):
        return UserError(f"{path} cannot be used now ({error}); its folder must be writable, with room on the disk")
    return damaged(path, str(error))


def damaged(path: Path, what: str) -> OtherVersionError:
    """The error of a file that cannot be trusted, with the way out."""
    return OtherVersionError(
        f"{path} is truncated or damaged ({what}); nothing was changed. Give the table from which it was made, with "
        "--overwrite to build it again (runs in it would be lost)"
    )


def _connect(path: Path, mode: str, patient: bool = False) -> sqlite3.Connection:
    place = f"file:{quote(str(path.absolute()))}?mode={mode}"
    timeout = _PATIENT_SECONDS if patient else _BUSY_SECONDS
    connection = sqlite3.connect(place, uri=True, timeout=timeout, isolation_level=None)
    connection.execute("PRAGMA temp_store = FILE")
    return connection


def _recover(path: Path, and_then: str = "") -> None:
    """Undo what a killed writer left half done, and write into the file what it left beside it."""
    with closing(_connect(path, "rw")) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.execute(and_then)


# ---- a new file --------------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an empty file with our schema that takes the place of `path` when the block ends well.

    Only for the holder of `only_builder`. What a killed process left is overwritten. In the end what was written is
    read again and compared.
    """
    aside = _aside(path)
    try:
        with naming(aside):
            aside.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(aside, isolation_level=None)) as connection:
                # Nobody sees the file before it is whole and flushed, so that it needs no journal.
                connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")
                ours = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
                connection.executescript(ours + SCHEMA)
                yield connection
                written = _content_hash(connection)
            _remove_side_files(path)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{aside} cannot be written ({error}); nothing was changed") from error
        with naming(path):
            fsync(aside)
            os.replace(aside, path)
            fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
    with opened(path) as connection:
        if _content_hash(connection) != written:
            raise UserError(
                f"what is read from {path} is not what was just written: another program has it open, or the disk "
                "fails; build it again with --overwrite when no other program uses it"
            )


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.building")


def _remove_side_files(path: Path) -> None:
    """Remove what SQLite would play back into the file that takes the place of `path`, after it was into `path`."""
    files = [path.with_name(f"{path.name}-{kind}") for kind in ("journal", "wal", "shm")]
    if path.exists() and any(file.exists() for file in files):
        try:
            _recover(path, "PRAGMA journal_mode = DELETE")
        except sqlite3.DatabaseError as error:  # a damaged file may be lost
            if "locked" in str(error).lower():
                raise _as_sentence(path, error) from error
    for file in files:
        file.unlink(missing_ok=True)


def _content_hash(connection: sqlite3.Connection) -> str:
    """Of all rows of all tables."""
    digest = hashlib.sha256()
    for statement in connection.iterdump():
        digest.update(statement.encode())
    return digest.hexdigest()


# ---- locks -------------------------------------------------------------------------------------------------------

_runs_here: dict[str, FileLock] = {}  # those of the runs of this process, by their keys


@contextmanager
def only_builder(path: Path, seconds: float = _BUILD_SECONDS) -> Iterator[None]:
    """One process at a time may build or extend `path`; others wait for its end, at most for hours."""
    lock = _lock(path)
    try:
        if not path.parent.is_dir():  # which the lock would make
            raise FileNotFoundError(2, "there is no such folder")
        lock.acquire(timeout=seconds)
    except Timeout:
        raise UserError(f"another process holds {lock.lock_file} for {seconds / 3600:g} hours; is it alive?") from None
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror}): give another --database") from error
    try:
        yield
    finally:
        _free(lock)


def _lock(path: Path, run_key: str = "") -> FileLock:
    place = path.resolve()
    return FileLock(place.with_name(f".{place.name}{run_key and '.'}{run_key}.lock"), thread_local=False)


def _free(lock: FileLock) -> None:
    """Release a lock and leave nothing of it; whoever waits for it sees that its file is gone and makes another."""
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _is_held(lock: FileLock) -> bool:
    """Whether a living process holds a lock; what a dead one left of it is removed."""
    if not Path(lock.lock_file).exists():
        return False
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):  # or it is another user's
        return True
    _free(lock)
    return False


def remove_leftovers(path: Path) -> None:
    """Remove what killed builders and runs left beside a file, unless others are at work or the folder is read only."""
    if Path(_lock(path).lock_file).exists():  # which every builder has from beginning to end
        with suppress(UserError, OSError), only_builder(path, 0):
            _aside(path).unlink(missing_ok=True)
    place = path.resolve()
    for file in place.parent.glob(f".{glob.escape(place.name)}.*.lock"):
        _is_held(FileLock(file))


# ---- reading and writing -----------------------------------------------------------------------------------------


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
class Database:
    """The SQLite file of a task, with one of its tokenizations and splits.

    Every method opens the file anew, so that an object can be handed to other processes and threads. Only the main
    process of a run writes. All methods raise `UserError` where the file is damaged or cannot be written.

    Attributes:
        path: the file.
        tok_id, split_id: numbers of the tokenization and the split; 0 where neither is asked for.
        split: its settings; of an SQLite file whose documents were given their parts, "given" whatever was asked for.
        done: sentences that say what was built, added or found.
    """

    path: Path
    tok_id: int = 0
    split_id: int = 0
    split: SplitSettings = field(default_factory=SplitSettings)
    done: tuple[str, ...] = ()

    def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with opened(self.path) as connection:
            return connection.execute(sql, values).fetchall()

    def meta(self) -> dict[str, Any]:
        """What the file was made from: source, sha256 of each file, [part, name, sha256] of each, options, counts."""
        values = dict(self._query("SELECT key, value FROM meta"))
        try:
            return {key: value if key == "source" else json.loads(value) for key, value in values.items()}
        except (ValueError, TypeError) as error:
            raise damaged(self.path, f"its facts are no JSON: {error}") from error

    def labels(self) -> list[str]:
        """Names of the labels, in the order of their ids."""
        return [name for (name,) in self._query("SELECT name FROM labels ORDER BY label_id")]

    def read_folds(self, part: str) -> FoldRows:
        """All rows of a part, each compared with the check that was stored with it."""
        rows = self._query(_FOLDS, self.tok_id, self.split_id, part)
        known = self._query("SELECT vocab_size FROM tokenizations WHERE tok_id = ?", self.tok_id)
        columns, blobs = _checked_rows(self.path, rows)
        sizes = np.fromiter(map(len, blobs), np.int64, len(rows))
        ids = np.frombuffer(b"".join(blobs), "<i4").astype(np.int32, copy=False)
        if len(ids) and (ids.min() < 0 or ids.max() >= known[0][0]):
            raise damaged(self.path, f"a token {max(ids.max(), -ids.min())} of a vocabulary of {known[0][0]:,}")
        return FoldRows(ids, np.append(0, np.cumsum(sizes // 4)), *columns)

    def read_labels(self, part: str) -> tuple[Ints, NDArray[np.bool_]]:
        """(D,) documents of a part in rising order, and (D, K) whether each has each of the K labels."""
        rows = np.array(self._query(_LABELS, self.split_id, part), np.int64).reshape(-1, 2)
        doc_ids, places = np.unique(rows[:, 0], return_inverse=True)
        truth = np.zeros((len(doc_ids), len(self.labels()) + 1), np.bool_)
        truth[places, rows[:, 1]] = True
        return doc_ids, truth[:, :-1]  # without the last column, where those of no label are

    def read_texts(self, doc_ids: Sequence[int] | Ints) -> list[str]:
        """Texts of documents, in the order given."""
        sql = "SELECT text FROM documents WHERE doc_id = ?"
        with opened(self.path) as connection:
            found = [connection.execute(sql, (int(doc_id),)).fetchone() for doc_id in doc_ids]
        if None in found:
            raise damaged(self.path, f"there is no document {doc_ids[found.index(None)]}")
        return [text for (text,) in found]

    def read_document(self, doc_id: int) -> dict[str, Any]:
        """Of one document "file", "line", "name", "text" and "spans": number of a row -> (char_start, char_end)."""
        place = self._records("SELECT file, line, name, text FROM documents WHERE doc_id = ?", doc_id)[0]
        sql = "SELECT idx, char_start, char_end FROM folds WHERE tok_id = ? AND doc_id = ? ORDER BY idx"
        return {**place, "spans": {idx: (start, end) for idx, start, end in self._query(sql, self.tok_id, doc_id)}}

    def origin(self) -> str:
        """What the file, the tokenization and the split were made from, to be compared."""
        tok = self._query("SELECT fingerprint, settings FROM tokenizations WHERE tok_id = ?", self.tok_id)
        split = self._query("SELECT settings FROM splits WHERE split_id = ?", self.split_id)
        return as_json({"meta": self.meta(), "tokenization": tok, "split": split})

    def documents_without_rows(self) -> list[int]:
        """Documents of which a tokenizer makes no token (of control characters only, for example)."""
        sql = "SELECT doc_id FROM documents EXCEPT SELECT doc_id FROM folds WHERE tok_id = ? AND idx = 0 ORDER BY 1"
        return [doc_id for (doc_id,) in self._query(sql, self.tok_id)]

    def check_whole(self) -> None:
        """Read the whole file once and compare all rows with their checks, in memory that does not grow with them.

        Raises:
            OtherVersionError: a page is damaged, which shows only when it is read, or a row differs.
        """
        ((found,),) = self._query("PRAGMA quick_check(1)")
        if found != "ok":
            raise damaged(self.path, " ".join(str(found).split())[:100])
        ((last,),) = self._query("SELECT max(fold_id) FROM folds")
        for first in range(0, last or 0, _CHECKED_AT_ONCE):
            _checked_rows(self.path, self._query(_ALL_FOLDS, first, first + _CHECKED_AT_ONCE))

    def bad_rows(self) -> list[tuple[Any, ...]]:
        """(file, line, reason, details) of every row that was left out."""
        return self._query("SELECT file, line, reason, details FROM bad_rows ORDER BY rowid")

    def reading_sentences(self) -> list[str]:
        """Rows that were left out, by reason and with the first lines of each, and what was put right in others."""
        rows = defaultdict[str, list[tuple[Any, ...]]](list)
        for row in self.bad_rows():
            rows[row[2]].append(row)
        lines = []
        for reason, found in sorted(rows.items(), key=lambda item: -len(item[1])):
            places = ", ".join(f"{file}:{line}" for file, line, *_ in found[:_LINES])
            more = ", ..." if len(found) > _LINES else ""
            lines.append(
                f"left out {len(found):,} rows, {reason}: {places}{more} (the first: {shown(found[0][3], _DETAILS)})"
            )
        lines += [f"put right {number:,} {kind.replace('_', ' ')}" for kind, number in self.meta()["repairs"].items()]
        return lines

    def split_sentences(self) -> list[str]:
        """What the split gives: rows and shares of each part and class, and what to beware of."""
        parts = self._query("SELECT part FROM split_members WHERE split_id = ? ORDER BY doc_id", self.split_id)
        with opened(self.path) as connection:
            return split_report(read_split_documents(connection), [part for (part,) in parts], self.labels())

    def sentences(self) -> list[str]:
        """What was read, and how it was split; nothing of it is longer than a person would read."""
        labels = self.labels()
        lines = [*self.done, *self.reading_sentences(), f"{len(labels)} labels: {in_words(labels)}"]
        with opened(self.path) as connection:
            lines += doubts(read_labels(connection))
            lines += _doubtful_documents(connection)
        if self.split.method == "given":
            lines.append("the documents were given their parts by the table or its files")
        lines += self.split_sentences()
        if without := len(self.documents_without_rows()):
            lines.append(f"beware: {without:,} documents give no row; they are neither trained nor judged")
        return lines

    # ---- what runs gave, for those who judge it

    def _records(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with opened(self.path) as connection:
            found = connection.execute(sql, values)
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found]

    def read_runs(self) -> list[dict[str, Any]]:
        """Rows of `runs`, with "tokenizer", "tokenizer_fingerprint", "folding" and "split" of what each learnt from."""
        records = self._records(_RUNS)
        for record in records:
            for name in ("options", "facts", "folding", "split"):
                try:
                    record[name] = dict(json.loads(record[name] or "{}"))
                except (ValueError, TypeError) as error:
                    raise damaged(self.path, f"{name} of run {record['run_id']}: {error}") from error
        return records

    def read_epochs(self, run_id: int) -> list[dict[str, Any]]:
        """Records with "epoch", "step", "part", "metric" and "value"."""
        sql = "SELECT epoch, step, part, metric, value FROM epochs WHERE run_id = ? ORDER BY epoch, part, metric"
        return self._records(sql, run_id)

    def read_test_metrics(self, run_id: int) -> dict[tuple[str, str], float]:
        """(level, metric) -> value."""
        rows = self._query("SELECT level, metric, value FROM test_metrics WHERE run_id = ?", run_id)
        return {(level, metric): value for level, metric, value in rows}

    def read_predictions(self, run_id: int, part: str, level: str) -> list[tuple[int, int, bytes, bytes | None]]:
        """(doc_id, fold_idx, probabilities, logits) of a part at a level ("document" or "fragment"), see `SCHEMA`."""
        return self._query(_PREDICTIONS, run_id, part, level)  # type: ignore[return-value]

    # ---- what this run gives

    def running(self) -> list[tuple[int, str, str, bool]]:
        """(number, name, model_dir, whether its process lives) of every run whose end was not written."""
        rows = self._query("SELECT run_id, name, model_dir, facts FROM runs WHERE status = 'running' ORDER BY run_id")
        return [(*row, _is_held(_lock(self.path, str(json.loads(facts).get("key"))))) for *row, facts in rows]

    def start_run(
        self,
        name: str,
        asked: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        model_dir: str | Path,
        origin: str | None = None,
    ) -> RunKey:
        """Enter a run of this process with the status "running", and those of its `model_dir` that died as "killed".

        Refused where the file is not made any more of what `origin` said when the run looked what it is to learn from.
        """
        run = RunKey(0, secrets.token_hex(16))
        ids = (self.tok_id, self.split_id, str(model_dir), time.time())
        with self._living(run), opened(self.path, write=True) as connection, transaction(connection):
            if origin is not None and self.origin() != origin:
                raise UserError(
                    f"{self.path} was built again while this run was about to begin: nothing was written into it; "
                    "start again, or give another --database"
                )
            for run_id, _, folder, alive in self.running():
                if folder == str(model_dir) and not alive:
                    connection.execute("UPDATE runs SET status = 'killed' WHERE run_id = ?", (run_id,))
            values = (name, as_json(asked), as_json({**facts, "key": run.key}), *ids)
            sql = "INSERT INTO runs VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, NULL, 'running')"
            return run._replace(run_id=int(connection.execute(sql, values).lastrowid or 0))

    @contextmanager
    def _living(self, run: RunKey) -> Iterator[None]:
        """Hold the lock that says that a run lives, also after the block if that ends well."""
        if run.key not in _runs_here:
            lock = _lock(self.path, run.key)
            try:
                lock.acquire(timeout=3)  # whoever looks whether somebody holds it holds it for a moment
            except Timeout:
                raise UserError(f"run {run.run_id} in {self.path} goes on in another process") from None
            _runs_here[run.key] = lock
        try:
            yield
        except BaseException:
            _free(_runs_here.pop(run.key))
            raise

    def go_on_with_run(self, run: RunKey) -> bool:
        """Write that a run goes on, in this process; False if it is not entered here: another may have its number."""
        with suppress(OtherRunError), self._living(run), self._writing(run) as (connection, _):
            connection.execute("UPDATE runs SET ended = NULL, status = 'running' WHERE run_id = ?", (run.run_id,))
            return True
        return False

    def end_run(self, run: RunKey, status: str, facts: Mapping[str, Any] | None = None) -> None:
        """Write how a run ended ("done", "stopped", ...), and facts in place of those of its start."""
        try:
            with self._writing(run) as (connection, known):
                ended = {**(known if facts is None else facts), "key": run.key}
                sql = "UPDATE runs SET ended = ?, status = ?, facts = ? WHERE run_id = ?"
                connection.execute(sql, (time.time(), status, as_json(ended), run.run_id))
        finally:
            if lock := _runs_here.pop(run.key, None):
                _free(lock)

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
        """Write predictions of a part at a level ("document" or "fragment"), in place of earlier ones of the same rows.

        (P,) documents and (P,) numbers of the rows within them, None for documents; (P, L) probabilities after the
        temperature, logits before it.
        """
        places = [-1] * len(doc_ids) if fold_idx is None else fold_idx
        values = np.stack([probabilities, logits], axis=1).astype("<f4")
        rows = [
            (run.run_id, part, level, int(doc_id), int(place), p.tobytes(), z.tobytes())
            for doc_id, place, (p, z) in zip(doc_ids, places, values, strict=True)
        ]
        self._write(run, "INSERT OR REPLACE INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def read_places(self, run: RunKey) -> dict[int, tuple[int, str]]:
        """(line, name) of every document, by its number, as long as the file is the one that a run learnt from."""
        with opened(self.path) as connection:
            self._facts(connection, run)
            rows = connection.execute("SELECT doc_id, line, name FROM documents")
            return {doc_id: (line, name) for doc_id, line, name in rows}

    def _write(self, run: RunKey, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        with self._writing(run) as (connection, _):
            connection.executemany(sql, rows)

    @contextmanager
    def _writing(self, run: RunKey) -> Iterator[tuple[sqlite3.Connection, dict[str, Any]]]:
        """A transaction in which the run is known to be entered, and its facts."""
        with opened(self.path, write=True, patient=True) as connection, transaction(connection):
            yield connection, self._facts(connection, run)

    def _facts(self, connection: sqlite3.Connection, run: RunKey) -> dict[str, Any]:
        row = connection.execute("SELECT facts FROM runs WHERE run_id = ?", (run.run_id,)).fetchone()
        facts: dict[str, Any] = json.loads(row[0]) if row else {}
        if facts.get("key") != run.key:
            raise OtherRunError(
                f"{self.path} was built again since run {run.run_id} was entered there, which it does not hold any "
                "more: nothing was written; to go on, give the table of the run, its --run_name, another --database "
                "and --do_continue"
            )
        return facts


def read_labels(connection: sqlite3.Connection) -> dict[str, tuple[int, str]]:
    """Label -> (its documents, file and line of the first), in the order of their ids."""
    return {name: (rows, f"{file}:{line}") for name, rows, file, line, _ in connection.execute(_FIRST_OF_LABELS)}


def _doubtful_documents(connection: sqlite3.Connection) -> list[str]:
    """Sentences on ids that stand in several rows, and on texts that other readers take for none."""
    lines = []
    if found := connection.execute(_REPEATED_IDS).fetchall():
        name, rows, file, line, _ = found[0]
        more = f"{len(found):,} ids stand" if len(found) > 1 else "1 id stands"
        lines.append(
            f"beware: {more} in several rows each, first {shown(name)} in {rows:,}, {file}:{line}; predictions have "
            "it as often"
        )
    rows, file, line, text, _ = connection.execute(_NO_TEXTS.format(", ".join(map(repr, sorted(MISSING))))).fetchone()
    if rows:
        lines.append(
            f"beware: {rows:,} texts are words for a missing value, first {shown(text)} at {file}:{line}; they are "
            "learnt as text, and left out where their cell is empty"
        )
    return lines


def read_split_documents(connection: sqlite3.Connection) -> list[SplitDocument]:
    """What a split needs to know of all documents, in the order of their ids, which count from 0."""
    labels = defaultdict[int, list[int]](list)
    for doc_id, label_id in connection.execute("SELECT doc_id, label_id FROM document_labels"):
        labels[doc_id].append(label_id)
    sql = "SELECT doc_id, text_hash, grp, given_part, name FROM documents ORDER BY doc_id"
    return [SplitDocument(tuple(labels.get(doc_id, ())), *facts) for doc_id, *facts in connection.execute(sql)]


def as_json(values: Any) -> str:
    """As all settings and facts stand in the file, where they are also compared as text."""
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


# ---- checks of rows ----------------------------------------------------------------------------------------------


def row_checks(numbers: Sequence[Sequence[int] | Ints], blobs: Sequence[bytes]) -> Ints:
    """(R,) a number for each of R rows that tells a changed one: a CRC of its ids, begun with a hash of its numbers.

    These are (R,) each of doc_id, idx, n, char_start and char_end. SQLite keeps no check of its own, and a flipped bit
    would be read as another token.
    """
    mixed = np.zeros(len(blobs), np.uint64)
    for column in numbers:
        mixed = hash_counters(mixed, np.asarray(column, np.int64).view(np.uint64))
    return np.fromiter(map(zlib.crc32, blobs, (mixed >> np.uint64(32)).tolist()), np.int64, len(blobs))


def _checked_rows(path: Path, rows: Sequence[tuple[Any, ...]]) -> tuple[list[Ints], Sequence[bytes]]:
    """Columns of numbers and the ids of rows (`_COLUMNS`), after each was compared with its check."""
    checks, *numbers, blobs = zip(*rows) if rows else ((),) * 7
    try:
        columns = [np.fromiter(column, np.int64, len(rows)) for column in numbers]
        wrong = np.flatnonzero(row_checks(columns, blobs) != np.fromiter(checks, np.int64, len(rows)))
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"a row holds no numbers: {error}") from error
    if len(wrong):
        first = ", ".join(str(column[wrong[0]]) for column in columns[:2])
        raise damaged(path, f"{len(wrong):,} rows are not as they were written, the first of document and row {first}")
    return columns, blobs
