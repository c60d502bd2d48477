"""Pieces of HTML in which every text that comes from data is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already."""


def escape(value: Any) -> Markup:
    """HTML of any value; control characters, which HTML has no place for, become a visible sign."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(value))
    return Markup(html.escape(text, quote=True))


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash where it has no meaning."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], text_columns: int = 1, caption: str = "") -> Markup:
    """A table whose first columns are text and whose others are numbers."""

    def line(cells: Sequence[Any], kind: str) -> str:
        marks = ["" if number < text_columns else ' class="n"' for number in range(len(cells))]
        return "<tr>" + "".join(f"<{kind}{m}>{escape(c)}</{kind}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return Markup(
        f'<div class="wide"><table>{title}<thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'
    )
