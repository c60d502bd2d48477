"""The SQLite file of a classification task: its schema, whether a file is one, opening it, and who may change it.

    meta            what it was made from: names and hashes of the source, options, counts
    documents       the good rows of the table, or of each of its files; bad_rows: the others, with the reason
    labels          0, 1, ... with their names; document_labels: which a document has
    tokenizations   a tokenizer with fold settings; folds: its rows, int32 ids (little endian) with special tokens,
                    and `row_checks` of each
    splits          settings of a split; split_members: the part of every document
    runs            one row a run; epochs, predictions (float32, little endian) and test_metrics: what it gave

A new file is built aside and renamed. What is added to one goes in by one transaction. Either way a process that is
killed leaves what was there before. Only the holder of a lock builds or adds; the kernel frees it when it dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from lmscripts.errors import UserError, naming

APPLICATION_ID = 0x6C6D7363  # "lmsc"
SCHEMA_VERSION = 2
BUSY_SECONDS = 120.0
_MAGIC = b"SQLite format 3\0"
_LOCK_SECONDS = 6 * 3600.0

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


class OtherVersionError(UserError):
    """A file of ours that an older or newer version made, or that is damaged: one may build it again."""


def check_ours(path: Path) -> None:
    """Check by its first bytes that a file is one of ours and of this version; nothing is opened for writing.

    Raises:
        OtherVersionError: ours, of another version, or cut off within its first bytes.
        UserError: any other file.
    """
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


@contextmanager
def opened(path: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection to one of our files, checked; what is written without a `transaction` is written at once.

    Raises:
        OtherVersionError: see `check_ours`, or the file is truncated or damaged.
        UserError: not ours, or the system refuses to write.
    """
    check_ours(path)
    _recover(path)
    try:
        with closing(_connect(path, "rw" if write else "ro")) as connection:
            connection.execute("SELECT count(*) FROM meta").fetchone()
            yield connection
    except sqlite3.DatabaseError as error:
        raise database_error(path, error) from error


def check_pages(path: Path, connection: sqlite3.Connection) -> None:
    """Read the whole file once, as only a page that is read is found to be damaged.

    Raises:
        OtherVersionError: it is.
    """
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise damaged(path, " ".join(str(found).split())[:100])


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What the block writes is written whole when it ends well, and not at all otherwise."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.execute("COMMIT")


def database_error(path: Path, error: sqlite3.DatabaseError) -> UserError:
    """What SQLite found, as a sentence that names the file."""
    if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
        return UserError(f"{path}: what was to be written contradicts what is there ({error})")
    reasons = ("locked", "full", "readonly", "unable to open", "disk i/o")
    if any(reason in str(error).lower() for reason in reasons):
        return UserError(f"{path} cannot be used now ({error}); its folder must be writable, with room on the disk")
    return damaged(path, str(error))


def damaged(path: Path, what: str) -> OtherVersionError:
    """The error of a file that cannot be trusted, with the way out."""
    return OtherVersionError(
        f"{path} is truncated or damaged ({what}); nothing was changed. Give the table from which it was made, with "
        "--overwrite to build it again (runs in it would be lost)"
    )


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    place = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA temp_store = FILE")
    return connection


def _recover(path: Path) -> None:
    """Undo what a killed writer left half done, which a connection for reading must not."""
    journal = path.with_name(f"{path.name}-journal")
    if journal.exists() and os.access(path, os.W_OK):
        with closing(_connect(path, "rw")) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()


@contextmanager
def new_file(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an empty file with our schema that takes the place of `path` when the block ends well.

    Only for the holder of `only_builder`. When the block fails, nothing is left of it; what a killed process left is
    overwritten.

    Raises:
        UserError: SQLite cannot write it.
    """
    aside = _aside(path)
    try:
        with naming(aside):
            aside.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(aside, isolation_level=None)) as connection:
                # Nobody sees the file before it is whole and flushed, so that it needs no journal.
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.executescript(SCHEMA)
                yield connection
        except sqlite3.DatabaseError as error:
            raise UserError(f"{aside} cannot be written ({error}); nothing was changed") from error
        with naming(path):
            _flush(aside)
            # A journal of the file that is replaced must never be played back into this one.
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            os.replace(aside, path)
            _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.building")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_builder(path: Path) -> Iterator[None]:
    """Let one process at a time build or extend `path`; others wait until it has finished or died.

    Raises:
        UserError: the folder cannot be written, or another process has been at it for hours.
    """
    lock = _lock(path)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{lock.parent} cannot be written ({error.strerror}): give another --database") from error
        try:
            if _is_locked(lock, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise UserError(f"another process holds {lock} for {_LOCK_SECONDS / 3600:g} hours; is it still alive?")
        time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def remove_leftovers_of_builders(path: Path) -> None:
    """Remove what a killed builder left beside a file, unless another one is at work or the folder is read only."""
    lock = _lock(path)
    if not lock.exists():  # which every builder has from beginning to end
        return
    with suppress(OSError):
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _is_locked(lock, descriptor):
                _aside(path).unlink(missing_ok=True)
                lock.unlink()
        finally:
            os.close(descriptor)


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _is_locked(lock: Path, descriptor: int) -> bool:
    """Whether this process now holds the lock that it has opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever finished meanwhile has removed the file: a lock on a removed file locks nobody out.
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except (BlockingIOError, FileNotFoundError):
        return False


# ---- processes that use a file for long --------------------------------------------------------------------------


def process_name() -> str:
    """What tells this process from all others: machine, number, and when it began, as numbers are given again."""
    return f"{socket.gethostname()} {os.getpid()} {_beginning(os.getpid())}"


def is_alive(process: str) -> bool | None:
    """Whether a process of that name is there; None where this machine cannot tell, as it is of another one."""
    host, number, beginning = process.rsplit(" ", 2)
    if host != socket.gethostname():
        return None
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _beginning(int(number)) == beginning


def _beginning(process: int) -> str:
    """When a process began, in ticks since the machine did; "-" where the system does not say, "" of a dead one."""
    try:
        found = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "-"
    return "" if found[0] in "ZX" else found[19]
