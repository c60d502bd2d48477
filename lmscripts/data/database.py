"""A labelled table as an SQLite file: read, split and tokenised once, then opened in no time by every further run.

`open_or_build` is the way in. The same table, tokenizer and settings give the same file content whatever the number of
processes; a second opening makes no call of a tokenizer. See `sqlite_file` for the tables in the file.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmscripts.data.folding import Folder, FoldSettings
from lmscripts.data.source_tables import SourceTable, add_tables, hash_tables, reading_options
from lmscripts.data.splits import SplitSettings, shown, split_documents
from lmscripts.data.sqlite_file import (
    OtherVersionError,
    check_pages,
    new_file,
    only_builder,
    opened,
    remove_leftovers_of_builders,
    transaction,
)
from lmscripts.data.stored import Stored, check_all_rows, read_meta, read_running, read_split_documents
from lmscripts.data.tokenising import fold_in_order
from lmscripts.errors import UserError
from lmscripts.text.reading import COMPRESSIONS, FORMATS, check_file
from lmscripts.text.records import TableOptions
from lmscripts.text.tables import PARTS
from lmscripts.tokenizer.encoder import Encoder, load_encoder

DATABASE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
_BATCH_DOCUMENTS = 256

_NEXT_DOCUMENTS = "SELECT doc_id, text FROM documents WHERE doc_id > ? ORDER BY doc_id LIMIT ?"
_COUNT_BAD_ROWS = "SELECT count(*) FROM bad_rows"
_INSERT_FOLD = "INSERT INTO fresh VALUES (?, ?, ?, ?, ?, ?, ?)"
_FRESH = "CREATE TEMP TABLE fresh(doc_id, idx, n, char_start, char_end, ids, row_check)"
_TAKE_FRESH = (
    "INSERT INTO folds(tok_id, doc_id, idx, n, char_start, char_end, ids, row_check) "
    "SELECT ?, doc_id, idx, n, char_start, char_end, ids, row_check FROM fresh ORDER BY rowid"
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Database(Stored):
    """An opened file, with the tokenization and the split that were asked for; for reading and writing see `Stored`.

    Attributes:
        tok_id, split_id: numbers of the tokenization and the split.
        split: what was asked for; of an SQLite file whose documents were given their parts, "given" all the same.
        done: sentences that say what was built, added or found.
    """

    tok_id: int
    split_id: int
    split: SplitSettings
    done: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Task:
    """What was asked for."""

    target: Path
    sources: list[SourceTable]  # none where the SQLite file itself was given
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
        split: which documents are for training; another setting adds a split. With an SQLite file whose documents were
            given their parts, by a column or by files, the method is "given" in any case.
        options: how the table is read; with an SQLite file, only what differs from the defaults is compared.
        database: where the file is; by default beside the table, `NAME.sqlite`.
        part_files: "validation", "test" -> further tables; `source` is then for training (and `split.method` "given").
        overwrite: replace a file that was made from another source or by other options, or is damaged, which is
            looked for then; its runs are lost, and there must be none that goes on.
        num_workers: processes that tokenise; the result does not depend on it.
        progress: called with the number of documents of each batch that is tokenised.

    Raises:
        UserError: a table that cannot be used (see `tables`), a split that cannot be made, a file that is not ours,
            is damaged or was made from another source, or is to be replaced while a run writes into it; nothing is
            changed then.
    """
    target, paths = _files(Path(source), database, part_files or {})
    options = options or TableOptions()
    if not options.label:
        raise UserError("a classifier is trained on labels: name the column that holds them")
    if overwrite and not paths:
        raise UserError(f"{target} is built again from the table that it was made from: give that, not {target}")
    split = split if paths else _as_made(target, split)
    split.shares()  # refuses what makes no sense before a table is read
    encoder = tokenizer if isinstance(tokenizer, Encoder) else load_encoder(tokenizer)
    task = _Task(target, hash_tables(paths), options, encoder, folds, split, num_workers, progress)
    found = _reuse(task, overwrite)
    if found is None:
        with only_builder(task.target):
            task = replace(task, sources=hash_tables(paths))  # those from before the wait may have been replaced
            found = _reuse(task, overwrite) or _extend(task, overwrite) or _build(task)
    else:
        remove_leftovers_of_builders(task.target)
    return found


def _as_made(target: Path, split: SplitSettings) -> SplitSettings:
    """A split of an SQLite file: where its documents were given their parts, none but that is meant.

    Otherwise documents for testing would be trained on as soon as the file stands in for its table.
    """
    meta = Stored(target).meta()
    given = meta["options"]["split"] or any(part for part, *_ in meta["sources"])
    return replace(split, method="given") if given else split


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
        check_file(path, "table")
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
    if not _is_usable(task, overwrite):
        return None
    with opened(task.target) as connection:
        tok_id, split_id = _find(connection, task)
    if tok_id is None or split_id is None:
        return None
    return Database(task.target, tok_id, split_id, task.split, (f"found all in {task.target}",))


def _is_usable(task: _Task, overwrite: bool) -> bool:
    """Whether there is a file, made from what was given; False where there is none, or one that may be replaced.

    Raises:
        UserError: there is another, or a damaged one, and it may not be replaced.
    """
    if not task.target.exists() and task.sources:
        return False
    try:
        with opened(task.target) as connection:
            if not _same_source(connection, task, overwrite):
                return False
            if overwrite:  # whoever was told of damage gives it, and damage shows only where it is read
                check_pages(task.target, connection)
                check_all_rows(task.target, connection)
    except OtherVersionError:
        if overwrite:
            return False
        raise
    return True


def _extend(task: _Task, overwrite: bool) -> Database | None:
    """Add to the file what it lacks, all of it or nothing."""
    if not _is_usable(task, overwrite):
        return None
    done = []
    with opened(task.target, write=True) as connection:
        tok_id, split_id = _find(connection, task)
        parts = _make_split(connection, task) if split_id is None else []  # nothing is added unless all can be
        if tok_id is None:
            tok_id = _add_tokenization(connection, task)
            done.append(f"added rows of {task.folds.max_length} tokens to {task.target}")
        if split_id is None:
            split_id = _add_split(connection, task, parts)
            done.append(f"added a split to {task.target}")
    return Database(task.target, tok_id, split_id, task.split, tuple(done))


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
    meta = read_meta(task.target, connection)
    wanted, stored = reading_options(task.options), meta["options"]
    plain = reading_options(TableOptions())
    different = [
        name for name in wanted if wanted[name] != stored[name] and (task.sources or wanted[name] != plain[name])
    ]
    made_of: list[list[str]] = meta["sources"]  # part, name and hash of each
    runs = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    way_out = f"give another --database, or --overwrite to build it again ({runs} runs in it would be lost)"
    if not task.sources:
        way_out = (
            f"leave that out, or give the table that it was made from, {' and '.join(name for _, name, _ in made_of)}"
        )
    found = ""
    now = [(source.part, source.path.name, source.sha256) for source in task.sources]
    if now and [(part, sha256) for part, _, sha256 in made_of] != [(part, sha256) for part, _, sha256 in now]:
        found = f"was made from {_shown(made_of)}, and now the source is {_shown(now)}"
    elif different:
        values = ", ".join(f"{name} {stored[name]!r} and now {wanted[name]!r}" for name in different)
        found = f"was made with other options ({values})"
    elif task.options.on_bad_row == "fail" and (number := connection.execute(_COUNT_BAD_ROWS).fetchone()[0]):
        found = f"leaves {number:,} bad rows out, which on_bad_row fail does not allow"
    if found and not overwrite:
        raise UserError(f"{task.target} {found}: {way_out}")
    return not found


def _shown(sources: Iterable[Sequence[str]]) -> str:
    return " and ".join(f"{part} {name} (sha256 {sha256[:16]})".strip() for part, name, sha256 in sources)


# ---- a new file ----


def _build(task: _Task) -> Database:
    _check_nobody_trains(task.target)
    Folder(task.encoder, task.folds)  # refuses rows without room for text before the table is read
    with new_file(task.target) as connection:
        num_documents, num_bad = add_tables(connection, task.sources, task.options)
        parts = _make_split(connection, task)  # before the long work, which a split that cannot be made would waste
        split_id = _add_split(connection, task, parts)
        tok_id = _add_tokenization(connection, task)
    done = f"built {task.target}: {num_documents:,} documents, {num_bad:,} bad rows left out"
    return Database(task.target, tok_id, split_id, task.split, (done,))


def _check_nobody_trains(target: Path) -> None:
    """Refuse to replace a file that a run writes into, which would lose hours of it.

    Raises:
        UserError: there is one.
    """
    if not target.exists():
        return
    try:
        with opened(target) as connection:
            running = read_running(connection)
    except OtherVersionError:
        return  # no run can go on with it
    for run_id, name, alive in running:
        if alive:
            raise UserError(
                f"run {run_id} ({shown(name)}) is training with {target}, which cannot be built again meanwhile: wait "
                "for its end or stop it, or give another --database"
            )
        if alive is None:
            raise UserError(
                f"run {run_id} ({shown(name)}) stands in {target} as running on another machine, so that it cannot be "
                "built again: give another --database, or remove the file if that run was killed"
            )


def _make_split(connection: sqlite3.Connection, task: _Task) -> list[str]:
    return split_documents(read_split_documents(connection), task.split)


def _add_split(connection: sqlite3.Connection, task: _Task, parts: Sequence[str]) -> int:
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
        sql = "INSERT INTO tokenizations(tokenizer, fingerprint, settings, vocab_size) VALUES (?, ?, ?, ?)"
        values = (task.encoder.description, *task.fold_key, task.encoder.vocab_size)
        tok_id = connection.execute(sql, values).lastrowid
        connection.execute(_TAKE_FRESH, (tok_id,))
    connection.execute("DROP TABLE fresh")
    return int(tok_id or 0)


def _batches(connection: sqlite3.Connection) -> Iterator[list[tuple[int, str]]]:
    """Documents by the hundred; no statement stays open between two batches, as it would hold a lock."""
    last = -1
    while rows := connection.execute(_NEXT_DOCUMENTS, (last, _BATCH_DOCUMENTS)).fetchall():
        yield rows
        last = rows[-1][0]


def _json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=True)
