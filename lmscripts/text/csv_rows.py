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
    """One row, or what is none for a quote that is astray, after which the next row begins behind `stray_from`.

    Of a text of several lines with a fault in its quotes that is the rest, which nothing tells from rows.
    """

    first: int  # line, from 1
    last: int
    fields: list[str]  # quotes are undone; the last one as it stands on its first line where a quote is astray
    stray_from: int = 0  # the line on which a quote opens that closes in the midst of a field on the line `last`
    closed: bool = True  # or, if not, is still open there


def csv_rows(lines: Iterator[str], delimiter: str, quotes: bool) -> Iterator[CsvRow]:
    """The rows of lines; empty lines are none. Memory grows with the longest row, up to 64 MiB of characters.

    Args:
        lines: with their ends, LF, CRLF or CR.
        delimiter: one character.
        quotes: whether a field that begins with a double quote ends with the next one that is not doubled.
    """
    source = _Lines(lines)
    opens = re.compile('"' if delimiter == " " else ' *"')
    blank = " \t".replace(delimiter, "")
    behind = re.compile(rf"[{blank}]*(?:({re.escape(delimiter)})|[\r\n]*\Z)")
    while (line := source.take()) is not None:
        if quotes and '"' in line:
            yield _quoted_row(source, line, delimiter, opens, behind)
        elif body := line.rstrip("\r\n"):
            yield CsvRow(source.number, source.number, body.split(delimiter))


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


def _quoted_row(source: _Lines, line: str, delimiter: str, opens: re.Pattern[str], behind: re.Pattern[str]) -> CsvRow:
    """The row that begins with a line, which was taken and has a quote in it."""
    first, fields, place = source.number, list[str](), 0
    while True:
        opened = opens.match(line, place)
        if opened is None:
            end = line.find(delimiter, place)
            fields.append(line[place:end] if end >= 0 else line[place:].rstrip("\r\n"))
            place = end + 1
            if end < 0:
                return CsvRow(first, source.number, fields)
            continue
        began = line[opened.end() - 1 :]
        text, taken, line, close = _quoted_field(source, line, opened.end())
        after = behind.match(line, close + 1) if close >= 0 else None
        if after is None:
            last = source.number
            source.put_back(taken)
            return CsvRow(first, last, [*fields, began.rstrip("\r\n")], source.number, close >= 0)
        fields.append(text)
        place = after.end()
        if not after[1]:
            return CsvRow(first, source.number, fields)


def _quoted_field(source: _Lines, line: str, start: int) -> tuple[str, list[str], str, int]:
    """(the field, the lines taken for it, the line of its closing quote and the place there; -1: never closed)."""
    parts, taken, size = list[str](), list[str](), 0
    while (close := _closing_quote(line, start)) < 0:
        parts.append(line[start:])
        size += len(line)
        following = source.take() if size < MAX_RECORD_BYTES else None
        if following is None:
            return "", taken, line, -1
        line, start = following, 0
        taken.append(line)
    parts.append(line[start:close])
    return "".join(parts).replace('""', '"'), taken, line, close


def _closing_quote(line: str, start: int) -> int:
    """The place of the next quote that is not doubled; -1 where there is none."""
    while (place := line.find('"', start)) >= 0 and line[place + 1 : place + 2] == '"':
        start = place + 2
    return place
