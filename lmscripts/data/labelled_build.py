"""A labelled table as an SQLite file: read, split and tokenised once, then opened in no time by every further run.

`open_or_build` is the way in. The same table, tokenizer and settings give the same file content whatever the number of
processes; a second opening makes no call of a tokenizer. See `labelled_store` for what is in the file.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lmscripts.data.folding import Folder, FoldSettings
from lmscripts.data.labelled_store import (
    Database,
    OtherVersionError,
    as_json,
    new_file,
    only_builder,
    opened,
    read_labels,
    read_split_documents,
    remove_leftovers,
    row_checks,
    transaction,
)
from lmscripts.data.splits import SplitSettings, split_documents, text_hash
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.text.labels import check_classes, order_labels, quoted, shown
from lmscripts.text.reading import COMPRESSIONS, FORMATS, check_file
from lmscripts.text.records import PARTS, BadRow, TableOptions, read_table
from lmscripts.tokenizer.encoder import Encoder, load_encoder
from lmscripts.workers import in_order

__all__ = ["SplitSettings", "TableOptions", "database_of", "open_or_build"]
DATABASE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
_BATCH_DOCUMENTS = 256

_NEXT_DOCUMENTS = "SELECT doc_id, text FROM documents WHERE doc_id > ? ORDER BY doc_id LIMIT ?"
_FOLD_COLUMNS = "doc_id, idx, n, char_start, char_end, ids, row_check"
_TAKE_FRESH = f"INSERT INTO folds(tok_id, {_FOLD_COLUMNS}) SELECT ?, {_FOLD_COLUMNS} FROM fresh ORDER BY rowid"

Documents = list[tuple[int, str]]  # (doc_id, text)
Progress = Callable[[int], None]


class SourceTable(NamedTuple):
    """One of the tables of a task; `part` is the part that all of it is for, "" where it is for several."""

    part: str
    path: Path
    sha256: str

    def __str__(self) -> str:
        return f"{self.part} {self.path.name}".strip()


@dataclass(frozen=True)
class _Task:
    """What was asked for."""

    target: Path
    sources: list[SourceTable]  # none where the SQLite file itself was given
    table: TableOptions
    encoder: Encoder
    folds: FoldSettings
    split: SplitSettings
    num_workers: int
    progress: Progress

    @property
    def fold_key(self) -> tuple[str, str]:
        return self.encoder.fingerprint, as_json(asdict(self.folds))

    @property
    def split_key(self) -> str:
        shares = dict(zip(PARTS, (round(share, 12) for share in self.split.shares())))
        return as_json(asdict(self.split) | shares)  # .8, .1, .1 and 80, 10, 10 are the same split


def open_or_build(
    source: str | Path,
    tokenizer: str | Path | Encoder,
    folds: FoldSettings,
    split: SplitSettings,
    table: TableOptions | None = None,
    *,
    database: str | Path | None = None,
    part_files: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
    progress: Progress = lambda _: None,
) -> Database:
    """Open the SQLite file of a table, and build it or add to it what it lacks: one process, while others wait.

    Args:
        source: a table, or an SQLite file that was built earlier.
        tokenizer: folder of a tokenizer, or an encoder.
        folds: how texts become rows; another setting adds a tokenization and keeps the others.
        split: which documents are for training; another setting adds a split. With an SQLite file whose documents were
            given their parts, by a column or by files, the method is "given" in any case.
        table: how it is read; with an SQLite file, only what differs from the defaults is compared.
        database: where the file is; by default beside the table, `NAME.sqlite`.
        part_files: "validation", "test" -> further tables; `source` is then for training (and `split.method` "given").
        overwrite: replace a file that was made from another source or by other options, or is damaged, which is
            looked for then; its runs are lost, and there must be none that goes on.
        num_workers: processes that tokenise; the result does not depend on it.
        progress: called with the number of documents of each batch that is tokenised.

    Raises:
        UserError: a table that cannot be used (see `text.records`), a split that cannot be made, a file that is not
            ours, is damaged or was made from another source, or is to be replaced while a run writes into it; nothing
            is changed then.
    """
    target, paths = _files(Path(source), database, part_files or {})
    table = table or TableOptions()
    if not table.label:
        raise UserError("a classifier is trained on labels: name the column that holds them")
    if overwrite and not paths:
        raise UserError(f"{target} is built again from the table that it was made from: give that, not {target}")
    if not paths:
        meta = Database(target).meta()
        # Otherwise documents for testing would be trained on as soon as the file stands in for its table.
        if meta["options"]["split"] or any(part for part, *_ in meta["sources"]):
            split = replace(split, method="given")
    split.shares()  # refuses what makes no sense before a table is read
    encoder = tokenizer if isinstance(tokenizer, Encoder) else load_encoder(tokenizer)
    task = _Task(target, _hashed(paths), table, encoder, folds, split, num_workers, progress)
    if found := _found(task, overwrite):
        remove_leftovers(target)
        return found
    with only_builder(target):
        task = replace(task, sources=_hashed(paths))  # those from before the wait may have been replaced
        return _found(task, overwrite, add=True) or _build(task)


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


def _hashed(paths: Mapping[str, Path]) -> list[SourceTable]:
    return [SourceTable(part, path, file_sha256(path)) for part, path in paths.items()]


# ---- an existing file --------------------------------------------------------------------------------------------


def _found(task: _Task, overwrite: bool, *, add: bool = False) -> Database | None:
    """The file, if it is made from what was given and holds all that is asked for, or what it lacks may be added.

    Nothing is added unless all can be. None where there is no file, or one that may be replaced.
    """
    if not task.target.exists() and task.sources:
        return None
    stored, done = Database(task.target), []
    try:
        meta = stored.meta()
        other = _other_source(meta, task)
        if overwrite and not other:  # whoever was told of damage gives it, and damage shows only where it is read
            stored.check_whole()
    except OtherVersionError:
        if overwrite:
            return None
        raise
    if other and overwrite:
        return None
    if other:
        runs = len(stored.read_runs())
        way_out = f"give another --database, or --overwrite to build it again ({runs:,} runs in it would be lost)"
        if not task.sources:
            names = " and ".join(name for _, name, _ in meta["sources"])
            way_out = f"leave that out, or give the table that it was made from, {names}"
        raise UserError(f"{task.target} {other}: {way_out}")
    with opened(task.target, write=add) as connection:
        sql = "SELECT tok_id FROM tokenizations WHERE fingerprint = ? AND settings = ?"
        tok = connection.execute(sql, task.fold_key).fetchone()
        split = connection.execute("SELECT split_id FROM splits WHERE settings = ?", (task.split_key,)).fetchone()
        if not add and not (tok and split):
            return None
        parts = None if split else _parts(connection, task)
        if not tok:
            tok = (_add_tokenization(connection, task),)
            done.append(f"added rows of {task.folds.max_length} tokens to {task.target}")
        if parts is not None:
            split = (_add_split(connection, task, parts),)
            done.append(f"added a split to {task.target}")
    return Database(task.target, tok[0], split[0], task.split, tuple(done) or (f"found all in {task.target}",))


def _other_source(meta: Mapping[str, Any], task: _Task) -> str:
    """In what the source or the options of a file are not those that were given; "" if they are."""
    wanted, plain = _reading(task.table), _reading(TableOptions())
    stored = plain | meta["options"]  # an older file knows fewer
    different = [
        name for name in wanted if wanted[name] != stored[name] and (task.sources or wanted[name] != plain[name])
    ]
    made_of = [SourceTable(part, Path(name), sha256) for part, name, sha256 in meta["sources"]]
    if task.sources and [(s.part, s.sha256) for s in made_of] != [(s.part, s.sha256) for s in task.sources]:
        was, now = (" and ".join(f"{s} (sha256 {s.sha256[:16]})" for s in each) for each in (made_of, task.sources))
        return f"was made from {was}, and now the source is {now}"
    if different:
        values = ", ".join(f"{name} {stored[name]!r} and now {wanted[name]!r}" for name in different)
        return f"was made with other options ({values})"
    if task.table.on_bad_row == "fail" and meta["num_bad_rows"]:
        return f"leaves {meta['num_bad_rows']:,} bad rows out, which on_bad_row fail does not allow"
    return ""


def _reading(table: TableOptions) -> dict[str, Any]:
    """The options that decide what is in the file; `on_bad_row` does not, once there is none."""
    found: dict[str, Any] = json.loads(as_json(asdict(table)))
    del found["on_bad_row"]
    return found


# ---- a new file --------------------------------------------------------------------------------------------------


def _build(task: _Task) -> Database:
    with suppress(OtherVersionError):  # no run can go on with such a file
        for run_id, name, _, lives in Database(task.target).running() if task.target.exists() else ():
            if lives:
                raise UserError(
                    f"run {run_id} ({shown(name)}) is training with {task.target}, which cannot be built again "
                    "meanwhile: wait for its end or stop it, or give another --database"
                )
    Folder(task.encoder, task.folds)  # refuses rows without room for text before the table is read
    with new_file(task.target) as connection:
        num_documents, num_bad = _add_tables(connection, task.sources, task.table)
        # Before the long work, which a split that cannot be made would waste.
        split_id = _add_split(connection, task, _parts(connection, task))
        tok_id = _add_tokenization(connection, task)
    done = f"built {task.target}: {num_documents:,} documents, {num_bad:,} bad rows left out"
    return Database(task.target, tok_id, split_id, task.split, (done,))


def _add_tables(connection: sqlite3.Connection, sources: Sequence[SourceTable], table: TableOptions) -> tuple[int, int]:
    """Read tables into the documents, labels, bad rows and facts of an empty file; (number of documents, bad rows)."""
    given = table.labels or table.label_columns
    repairs, counts, reasons = Counter[str](), Counter(dict.fromkeys(given, 0)), Counter[str]()
    labels, first_bad = list[tuple[str, ...]](), ""
    with transaction(connection):
        for source in sources:
            for row in read_table(source.path, table, repairs):
                place = (source.path.name, row.line)
                if isinstance(row, BadRow):
                    first_bad = first_bad or f"{row.error(source.path)}"
                    reasons[row.reason] += 1
                    bad = (*place, row.reason, row.details, row.raw)
                    connection.execute("INSERT INTO bad_rows VALUES (?, ?, ?, ?, ?)", bad)
                    continue
                values = (row.name, row.text, row.group, source.part or row.part, text_hash(row.text))
                sql = "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
                connection.execute(sql, (len(labels), *place, *values))
                labels.append(row.labels)
                counts.update(row.labels)
            if file_sha256(source.path) != source.sha256:
                raise UserError(f"{source.path} was changed while it was read; start again when it is whole")
        read = " and ".join(str(source.path) for source in sources)
        check_classes(read, counts, len(labels), reasons, ", ".join(table.label_columns) or table.label, first_bad)
        names = order_labels(counts, given)
        numbers = {name: number for number, name in enumerate(names)}
        connection.executemany("INSERT INTO labels VALUES (?, ?)", enumerate(names))
        pairs = ((number, numbers[label]) for number, each in enumerate(labels) for label in each)
        connection.executemany("INSERT INTO document_labels VALUES (?, ?)", pairs)
        facts = {
            "sha256": {str(source): source.sha256 for source in sources},
            "sources": [(source.part, source.path.name, source.sha256) for source in sources],
            "options": _reading(table),
            "columns": table.columns(),
            "multi_label": table.multi_label,
            "num_documents": len(labels),
            "num_bad_rows": reasons.total(),
            "bad_rows": reasons,
            "repairs": {kind: number for kind, number in repairs.items() if number},
            "rows_of_labels": counts,
        }
        rows = [("source", " and ".join(map(str, sources)))]
        rows += [(key, as_json(value)) for key, value in facts.items()]
        connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    return len(labels), reasons.total()


def _parts(connection: sqlite3.Connection, task: _Task) -> list[str]:
    labels = [f"{quoted(name)} ({rows:,}, first {place})" for name, (rows, place) in read_labels(connection).items()]
    return split_documents(read_split_documents(connection), task.split, labels)


def _add_split(connection: sqlite3.Connection, task: _Task, parts: Sequence[str]) -> int:
    with transaction(connection):
        split_id = connection.execute("INSERT INTO splits(settings) VALUES (?)", (task.split_key,)).lastrowid
        rows = ((split_id, doc_id, part) for doc_id, part in enumerate(parts))
        connection.executemany("INSERT INTO split_members VALUES (?, ?, ?)", rows)
    return int(split_id or 0)


def _add_tokenization(connection: sqlite3.Connection, task: _Task) -> int:
    """Tokenise into a temporary table, so that the file itself is locked for the moment of copying only."""
    connection.execute(f"CREATE TEMP TABLE fresh({_FOLD_COLUMNS})")
    fold = partial(_fold_rows, Folder(task.encoder, task.folds))

    def place(batch: list[tuple[int, str]]) -> Callable[[], str]:
        sql = "SELECT 'from ' || file || ':' || line || ' on' FROM documents WHERE doc_id = ?"
        return lambda: str(connection.execute(sql, batch[0][:1]).fetchone()[0])

    for num_documents, rows in in_order(fold, _batches(connection), task.num_workers, place=place):
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO fresh VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        connection.execute("COMMIT")
        task.progress(num_documents)
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


def _fold_rows(folder: Folder, batch: Documents) -> tuple[int, list[tuple[Any, ...]]]:
    """The number of documents, and all of their rows (`_FOLD_COLUMNS`)."""
    folds = folder([text for _, text in batch])
    rows = [
        (doc_id, f.idx, f.n, f.char_start, f.char_end, f.ids.astype("<i4").tobytes())
        for (doc_id, _), each in zip(batch, folds)
        for f in each
    ]
    *numbers, blobs = zip(*rows) if rows else ((),) * 6
    return len(batch), [(*row, check) for row, check in zip(rows, row_checks(numbers, blobs).tolist())]
