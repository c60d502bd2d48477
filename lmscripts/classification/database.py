"""A labelled table as an SQLite file: read, split and tokenised once, then opened in no time by every further run.

`open_or_build` is the way in. The same table, tokenizer and settings give the same file content whatever the number of
processes; a second opening makes no call of a tokenizer. See `sqlite_file` for the tables in the file.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmscripts.classification.records import BadRow, TableOptions
from lmscripts.classification.splits import SplitSettings, split_documents, text_hash
from lmscripts.classification.sqlite_file import OtherVersionError, new_file, only_builder, opened, transaction
from lmscripts.classification.stored import Stored, read_split_documents
from lmscripts.classification.tables import PARTS, check_classes, order_labels, read_table
from lmscripts.classification.tokenising import fold_in_order
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.folding import Folder, FoldSettings
from lmscripts.text_reading import COMPRESSIONS, FORMATS
from lmscripts.tokenization import Encoder, load_encoder

DATABASE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
_BATCH_DOCUMENTS = 256

_NEXT_DOCUMENTS = "SELECT doc_id, text FROM documents WHERE doc_id > ? ORDER BY doc_id LIMIT ?"
_COUNT_BAD_ROWS = "SELECT count(*) FROM bad_rows"
_INSERT_DOCUMENT = "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)"
_INSERT_BAD_ROW = "INSERT INTO bad_rows VALUES (?, ?, ?)"
_INSERT_FOLD = "INSERT INTO fresh VALUES (?, ?, ?, ?, ?, ?)"
_FRESH = "CREATE TEMP TABLE fresh(doc_id, idx, n, char_start, char_end, ids)"
_TAKE_FRESH = (
    "INSERT INTO folds(tok_id, doc_id, idx, n, char_start, char_end, ids) "
    "SELECT ?, doc_id, idx, n, char_start, char_end, ids FROM fresh ORDER BY rowid"
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Database(Stored):
    """An opened file, with the tokenization and the split that were asked for; for reading and writing see `Stored`.

    Attributes:
        tok_id, split_id: numbers of the tokenization and the split.
        done: sentences that say what was built, added or found.
    """

    tok_id: int
    split_id: int
    done: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """What was asked for."""

    target: Path
    sources: dict[str, Path]  # part, or "" for a table of all parts -> file; empty where the file itself was given
    hashes: dict[str, str]
    options: TableOptions
    encoder: Encoder
    folds: FoldSettings
    split: SplitSettings
    num_workers: int
    progress: Progress

    @property
    def fold_key(self) -> tuple[str, str]:
        return self.encoder.fingerprint, _json(asdict(self.folds))

    @property
    def split_key(self) -> str:
        shares = dict(zip(PARTS, (round(share, 12) for share in self.split.shares())))
        return _json(asdict(self.split) | shares)  # .8, .1, .1 and 80, 10, 10 are the same split

    def reading_options(self) -> dict[str, Any]:
        """The options that decide what is in the file; `on_bad_row` does not, once there is none."""
        options: dict[str, Any] = json.loads(_json(asdict(self.options)))
        del options["on_bad_row"]
        return options


def open_or_build(
    source: str | Path,
    tokenizer: str | Path | Encoder,
    folds: FoldSettings,
    split: SplitSettings,
    options: TableOptions | None = None,
    *,
    database: str | Path | None = None,
    part_files: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
    progress: Progress = lambda _: None,
) -> Database:
    """Open the SQLite file of a table, and build it or add to it what it lacks.

    Several processes may call this at once: one builds and the others wait. Whatever happens, there is the file that
    was there before, or the new one, whole.

    Args:
        source: a table, or an SQLite file that was built earlier.
        tokenizer: folder of a tokenizer, or an encoder.
        folds: how texts become rows; another setting adds a tokenization and keeps the others.
        split: which documents are for training; another setting adds a split.
        options: how the table is read; with an SQLite file, only what differs from the defaults is compared.
        database: where the file is; by default beside the table, `NAME.sqlite`.
        part_files: "validation", "test" -> further tables; `source` is then for training (and `split.method` "given").
        overwrite: replace a file that was made from another source or by other options; its runs are lost.
        num_workers: processes that tokenise; the result does not depend on it.
        progress: called with the number of documents of each batch that is tokenised.

    Raises:
        UserError: a table that cannot be used (see `tables`), a split that cannot be made, a file that is not ours,
            is damaged or was made from another source; nothing is changed then.
    """
    target, sources = _files(Path(source), database, part_files or {})
    options = options or TableOptions()
    if not options.label:
        raise UserError("a classifier is trained on labels: name the column that holds them")
    encoder = tokenizer if isinstance(tokenizer, Encoder) else load_encoder(tokenizer)
    hashes = {f"{part} {path.name}".strip(): file_sha256(path) for part, path in sources.items()}
    task = _Task(target, sources, hashes, options, encoder, folds, split, num_workers, progress)
    found = _reuse(task, overwrite)
    if found is None:
        with only_builder(task.target):
            found = _reuse(task, overwrite) or _extend(task, overwrite) or _build(task)
    return found


def _files(
    source: Path, database: str | Path | None, part_files: Mapping[str, str | Path]
) -> tuple[Path, dict[str, Path]]:
    """(the SQLite file, part -> table), the latter empty where the SQLite file itself was given."""
    if source.suffix.lower() in DATABASE_SUFFIXES:
        if part_files or (database and Path(database) != source):
            raise UserError(f"{source} is an SQLite file: give the table beside it, or leave out the other files")
        return source, {}
    if unknown := set(part_files) - set(PARTS[1:]):
        raise UserError(f"files of parts are for validation and test, not {', '.join(sorted(unknown))}")
    sources = {"train" if part_files else "": source, **{part: Path(path) for part, path in part_files.items()}}
    for path in sources.values():
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"the table {path} {what} (seen from {Path.cwd()})")
    return Path(database) if database else database_of(source), sources


def database_of(table: str | Path) -> Path:
    """`NAME.sqlite` beside a table, without the table's suffixes."""
    path = Path(table)
    name = path.name
    for suffixes in (COMPRESSIONS, tuple(FORMATS)):
        if name.lower().endswith(suffixes):
            name = name[: name.rindex(".")]
    return path.with_name(f"{name}.sqlite")


def open_database(path: str | Path) -> Stored:
    """An existing file, for reading what is in it and writing runs.

    Raises:
        UserError: not one of our files, or damaged.
    """
    with opened(Path(path)):
        return Stored(Path(path))


# ---- an existing file ----


def _reuse(task: _Task, overwrite: bool) -> Database | None:
    """The file as it is, if it holds all that is asked for."""
    if not task.target.exists() and task.sources:
        return None
    try:
        with opened(task.target) as connection:
            if not _same_source(connection, task, overwrite):
                return None
            tok_id, split_id = _find(connection, task)
    except OtherVersionError:
        if overwrite and task.sources:
            return None
        raise
    if tok_id is None or split_id is None:
        return None
    return Database(task.target, tok_id, split_id, (f"found all in {task.target}",))


def _extend(task: _Task, overwrite: bool) -> Database | None:
    """Add to the file what it lacks, in one transaction."""
    if not task.target.exists():
        return None
    try:
        with opened(task.target) as connection:
            if not _same_source(connection, task, overwrite):
                return None
    except OtherVersionError:
        return None  # `_reuse` has refused it unless it may be replaced
    done = []
    with opened(task.target, write=True) as connection:
        tok_id, split_id = _find(connection, task)
        if split_id is None:
            split_id = _add_split(connection, task)
            done.append(f"added a split to {task.target}")
        if tok_id is None:
            tok_id = _add_tokenization(connection, task)
            done.append(f"added rows of {task.folds.max_length} tokens to {task.target}")
    return Database(task.target, tok_id, split_id, tuple(done))


def _find(connection: sqlite3.Connection, task: _Task) -> tuple[int | None, int | None]:
    """Numbers of the tokenization and the split that are asked for; None for what is not there."""
    tok = "SELECT tok_id FROM tokenizations WHERE fingerprint = ? AND settings = ?"
    found = connection.execute(tok, task.fold_key).fetchone()
    split = connection.execute("SELECT split_id FROM splits WHERE settings = ?", (task.split_key,)).fetchone()
    return found and found[0], split and split[0]


def _same_source(connection: sqlite3.Connection, task: _Task, overwrite: bool) -> bool:
    """Whether the file was made from what was given; False where it is not and may be replaced.

    Raises:
        UserError: it is not, and may not be replaced.
    """
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    wanted, stored = task.reading_options(), json.loads(meta["options"])
    plain = json.loads(_json(asdict(TableOptions())))
    different = [
        name for name in wanted if wanted[name] != stored[name] and (task.sources or wanted[name] != plain[name])
    ]
    hashes = json.loads(meta["sha256"])
    runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    way_out = f"give another --database, or --overwrite to build it again ({runs} runs in it would be lost)"
    found = ""
    if task.sources and list(hashes.values()) != list(task.hashes.values()):
        found = f"was made from {_shown(hashes)}, and now the source is {_shown(task.hashes)}"
    elif different:
        values = ", ".join(f"{name} {stored[name]!r} and now {wanted[name]!r}" for name in different)
        found = f"was made with other options ({values})"
    elif task.options.on_bad_row == "fail" and (number := connection.execute(_COUNT_BAD_ROWS).fetchone()[0]):
        found = f"leaves {number:,} bad rows out, which on_bad_row fail does not allow"
    if found and not (overwrite and task.sources):
        raise UserError(f"{task.target} {found}: {way_out}")
    return not found


def _shown(hashes: Mapping[str, str]) -> str:
    return " and ".join(f"{name} (sha256 {value[:16]})" for name, value in hashes.items())


# ---- a new file ----


def _build(task: _Task) -> Database:
    with new_file(task.target) as connection:
        before = [path.stat() for path in task.sources.values()]
        num_documents, num_bad = _add_table(connection, task)
        after = [path.stat() for path in task.sources.values()]
        if [(each.st_size, each.st_mtime_ns) for each in before] != [(e.st_size, e.st_mtime_ns) for e in after]:
            raise UserError(f"{_shown(task.hashes)} was changed while it was read; start again when it is whole")
        split_id = _add_split(connection, task)  # before the long work, which a split that cannot be made would waste
        tok_id = _add_tokenization(connection, task)
    done = f"built {task.target}: {num_documents:,} documents, {num_bad:,} bad rows left out"
    return Database(task.target, tok_id, split_id, (done,))


def _add_table(connection: sqlite3.Connection, task: _Task) -> tuple[int, int]:
    """Read the tables into documents, labels and bad rows; returns the number of documents and of bad rows."""
    options, repairs = task.options, Counter[str]()
    counts, reasons = Counter(dict.fromkeys(options.labels, 0)), Counter[str]()
    labels: list[tuple[str, ...]] = []
    with transaction(connection):
        for part, path in task.sources.items():
            for row in read_table(path, options, repairs):
                if isinstance(row, BadRow):
                    reasons[row.reason] += 1
                    connection.execute(_INSERT_BAD_ROW, (row.line, f"{row.reason}: {row.details}", row.raw))
                    continue
                given = part or row.part
                values = (len(labels), row.line, row.name, row.text, row.group, given, text_hash(row.text))
                connection.execute(_INSERT_DOCUMENT, values)
                labels.append(row.labels)
                counts.update(row.labels)
        check_classes(" and ".join(map(str, task.sources.values())), counts, len(labels), reasons, options.label)
        names = order_labels(counts, options)
        numbers = {name: number for number, name in enumerate(names)}
        connection.executemany("INSERT INTO labels VALUES (?, ?)", enumerate(names))
        pairs = ((number, numbers[label]) for number, each in enumerate(labels) for label in each)
        connection.executemany("INSERT INTO document_labels VALUES (?, ?)", pairs)
        facts = {
            "source": " and ".join(task.hashes),
            "sha256": _json(task.hashes, sort=False),
            "options": _json(task.reading_options()),
            "columns": _json(options.columns()),
            "multi_label": _json(bool(options.separator)),
            "num_documents": _json(len(labels)),
            "num_bad_rows": _json(reasons.total()),
            "bad_rows": _json(reasons),
            "repairs": _json({kind: number for kind, number in repairs.items() if number}),
            "rows_of_labels": _json(counts),
        }
        connection.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
    return len(labels), reasons.total()


def _add_split(connection: sqlite3.Connection, task: _Task) -> int:
    documents = read_split_documents(connection)
    parts = split_documents(documents, task.split)
    with transaction(connection):
        split_id = connection.execute("INSERT INTO splits(settings) VALUES (?)", (task.split_key,)).lastrowid
        rows = ((split_id, doc_id, part) for doc_id, part in enumerate(parts))
        connection.executemany("INSERT INTO split_members VALUES (?, ?, ?)", rows)
    return int(split_id or 0)


def _add_tokenization(connection: sqlite3.Connection, task: _Task) -> int:
    """Tokenise into a temporary table, so that the file itself is locked for the moment of copying only."""
    connection.execute(_FRESH)
    for batch in fold_in_order(Folder(task.encoder, task.folds), _batches(connection), task.num_workers):
        connection.execute("BEGIN")
        connection.executemany(_INSERT_FOLD, (row for rows in batch for row in rows))
        connection.execute("COMMIT")
        task.progress(len(batch))
    if not connection.execute("SELECT count(*) FROM fresh").fetchone()[0]:
        raise UserError(f"the tokenizer {task.encoder.folder} makes no token of any text of {task.target}")
    with transaction(connection):
        sql = "INSERT INTO tokenizations(tokenizer, fingerprint, settings) VALUES (?, ?, ?)"
        tok_id = connection.execute(sql, (task.encoder.description, *task.fold_key)).lastrowid
        connection.execute(_TAKE_FRESH, (tok_id,))
    connection.execute("DROP TABLE fresh")
    return int(tok_id or 0)


def _batches(connection: sqlite3.Connection) -> Iterator[list[tuple[int, str]]]:
    """Documents by the hundred; no statement stays open between two batches, as it would hold a lock."""
    last = -1
    while rows := connection.execute(_NEXT_DOCUMENTS, (last, _BATCH_DOCUMENTS)).fetchall():
        yield rows
        last = rows[-1][0]


def _json(values: Any, sort: bool = True) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=sort)
