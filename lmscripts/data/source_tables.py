"""Labelled tables as documents, labels and bad rows of an SQLite file, with the hash of what was read."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmscripts.data.splits import text_hash
from lmscripts.data.sqlite_file import transaction
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.text.records import BadRow, TableOptions
from lmscripts.text.tables import check_classes, order_labels, read_table

_INSERT_DOCUMENT = "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT_BAD_ROW = "INSERT INTO bad_rows VALUES (?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class SourceTable:
    """One of the tables of a task.

    Attributes:
        part: the part that all of it is for; "" where its documents are for several.
        path: the file.
        sha256: of its content.
        state: device, number, size and time of the file before it was hashed.
    """

    part: str
    path: Path
    sha256: str
    state: tuple[int, ...]

    @property
    def name(self) -> str:
        """The file's name, after that of its part."""
        return f"{self.part} {self.path.name}".strip()


def hash_tables(paths: Mapping[str, Path]) -> list[SourceTable]:
    """Tables by their parts as they are now; `add_tables` sees whether they were changed since."""
    return [SourceTable(part, path, state=_state(path), sha256=file_sha256(path)) for part, path in paths.items()]


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def reading_options(options: TableOptions) -> dict[str, Any]:
    """The options that decide what is in the file; `on_bad_row` does not, once there is none."""
    found: dict[str, Any] = json.loads(_json(asdict(options)))
    del found["on_bad_row"]
    return found


def add_tables(
    connection: sqlite3.Connection, sources: Sequence[SourceTable], options: TableOptions
) -> tuple[int, int]:
    """Read tables into the documents, labels, bad rows and facts of an empty file.

    Returns:
        The number of documents and of bad rows.

    Raises:
        UserError: a table that cannot be used (see `tables`), or that was changed since it was hashed.
    """
    repairs = Counter[str]()
    counts, reasons = Counter(dict.fromkeys(options.labels, 0)), Counter[str]()
    labels: list[tuple[str, ...]] = []
    with transaction(connection):
        for source in sources:
            for row in read_table(source.path, options, repairs):
                place = (source.path.name, row.line)
                if isinstance(row, BadRow):
                    reasons[row.reason] += 1
                    connection.execute(_INSERT_BAD_ROW, (*place, row.reason, row.details, row.raw))
                    continue
                values = (row.name, row.text, row.group, source.part or row.part, text_hash(row.text))
                connection.execute(_INSERT_DOCUMENT, (len(labels), *place, *values))
                labels.append(row.labels)
                counts.update(row.labels)
            if _state(source.path) != source.state:
                raise UserError(f"{source.path} was changed while it was read; start again when it is whole")
        read = " and ".join(str(source.path) for source in sources)
        check_classes(read, counts, len(labels), reasons, options.label)
        names = order_labels(counts, options)
        numbers = {name: number for number, name in enumerate(names)}
        connection.executemany("INSERT INTO labels VALUES (?, ?)", enumerate(names))
        pairs = ((number, numbers[label]) for number, each in enumerate(labels) for label in each)
        connection.executemany("INSERT INTO document_labels VALUES (?, ?)", pairs)
        facts = {
            "source": " and ".join(source.name for source in sources),
            "sha256": _json({source.name: source.sha256 for source in sources}, sort=False),
            "sources": _json([(source.part, source.path.name, source.sha256) for source in sources]),
            "options": _json(reading_options(options)),
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


def _json(values: Any, sort: bool = True) -> str:
    return json.dumps(values, ensure_ascii=False, sort_keys=sort)
