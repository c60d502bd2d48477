"""Lines of a csv file to its rows, with the lines on which they stand, and no row lost to a quote that is astray.

The rules are those of RFC 4180 and of Python's `csv` in strict mode; besides, white space may stand around a quoted
field. `csv` itself does not tell on which line the field began that swallowed the lines behind it, and loses them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmscripts.text.reading import MAX_RECORD_BYTES


class CsvRow(NamedTuple):
    """One row.

    Attributes:
        first, last: its first and its last line, from 1.
        fields: what stands between the delimiters; quotes are undone.
        stray_from: 0, or the line on which a quote opens that is astray: it closes in the midst of a field on the line
            `last`, or is still open there. The row is none then: `fields` ends with the field as it stands on its first
            line, and the next row begins on the line after `stray_from`; of a text of several lines with a fault in its
            quotes, that is the rest, which nothing tells from rows.
        closed: whether a quote that is astray closes.
    """

    first: int
    last: int
    fields: list[str]
    stray_from: int = 0
    closed: bool = True


def csv_rows(lines: Iterator[str], delimiter: str, quotes: bool) -> Iterator[CsvRow]:
    """The rows of lines; empty lines are none. Memory grows with the longest row, up to 64 MiB of characters.

    Args:
        lines: with their ends, LF, CRLF or CR.
        delimiter: one character.
        quotes: whether a field that begins with a double quote ends with the next one that is not doubled.
    """
    source = _Lines(lines)
    reader = _QuotedRows(source, delimiter)
    while (line := source.take()) is not None:
        if quotes and '"' in line:
            yield reader.row(line)
        elif body := line.rstrip("\r\n"):
            fields = [field.lstrip(" ") for field in body.split(delimiter)]
            yield CsvRow(source.number, source.number, fields)


class _Lines:
    """Lines that can be put back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.number = 0  # of the line that was taken last
        self._lines, self._again = lines, deque[str]()

    def take(self) -> str | None:
        line = self._again.popleft() if self._again else next(self._lines, None)
        self.number += line is not None
        return line

    def put_back(self, lines: Sequence[str]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)


class _QuotedRows:
    """Reads rows with quotes in them."""

    def __init__(self, source: _Lines, delimiter: str) -> None:
        self._source, self._delimiter = source, delimiter
        self._opens = re.compile('"' if delimiter == " " else ' *"')
        blank = " \t".replace(delimiter, "")
        self._behind = re.compile(rf"[{blank}]*(?:({re.escape(delimiter)})|[\r\n]*\Z)")

    def row(self, line: str) -> CsvRow:
        """The row that begins with a line, which was taken."""
        first, fields, place = self._source.number, list[str](), 0
        while True:
            opened = self._opens.match(line, place)
            if opened is None:
                end = line.find(self._delimiter, place)
                fields.append((line[place:end] if end >= 0 else line[place:].rstrip("\r\n")).lstrip(" "))
                place = end + 1
                if end < 0:
                    return CsvRow(first, self._source.number, fields)
                continue
            began = line[opened.end() - 1 :]
            text, taken, line, close = self._quoted(line, opened.end())
            behind = self._behind.match(line, close + 1) if close >= 0 else None
            if behind is None:
                last = self._source.number
                self._source.put_back(taken)
                fields.append(began.rstrip("\r\n"))
                return CsvRow(first, last, fields, self._source.number, close >= 0)
            fields.append(text)
            place = behind.end()
            if not behind[1]:
                return CsvRow(first, self._source.number, fields)

    def _quoted(self, line: str, start: int) -> tuple[str, list[str], str, int]:
        """(the field, the lines taken for it, the line of its closing quote and the place there; -1: never closed)."""
        pieces, taken, size = list[str](), list[str](), 0
        while (close := _closing_quote(line, start)) < 0:
            pieces.append(line[start:])
            size += len(line)
            following = self._source.take() if size < MAX_RECORD_BYTES else None
            if following is None:
                return "", taken, line, -1
            line, start = following, 0
            taken.append(line)
        pieces.append(line[start:close])
        return "".join(pieces).replace('""', '"'), taken, line, close


def _closing_quote(line: str, start: int) -> int:
    """The place of the next quote that is not doubled; -1 where there is none."""
    while (place := line.find('"', start)) >= 0 and line[place + 1 : place + 2] == '"':
        start = place + 2
    return place
