"""Labels as a table writes them: their order, what can be learnt from them, what is doubtful about them, in words."""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from lmscripts.errors import UserError

_SHOWN_CHARACTERS = 60  # of a name in a sentence
_SHOWN_NAMES = 20
_SHOWN_DOUBTS = 8
_NUMBER = re.compile(r"[+-]?(\d{1,15}\.?\d{0,15}|\.\d{1,15})([eE][+-]?\d{1,2})?", re.ASCII)
MISSING = frozenset(["na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "none", "null", "nil"])  # to other readers
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕАВЕКМНОРСТУХІЈЅΑΒΕΖΗΙΚΜΝΟΡΤΥΧο−‐‑‒–—’‘“”", "aeopcyxijsABEKMHOPCTYXIJSABEZHIKMNOPTYXo------''\"\""
)
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\ufe00-\ufe0f\uffa0]")  # and those of Cc and Cf
_ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[+-]?\d+(?:\.\d+)?)"""
_ITEMS = re.compile(_ITEM)
_LIST = re.compile(rf"\[\s*(?:{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?\s*)?\]")
_MAY_BE_LIST = re.compile(r"""\[.*\]|[({]\s*['"].*[)}]""", re.DOTALL)


# ---- in words ----


def shown(name: str, most: int = _SHOWN_CHARACTERS) -> str:
    """A name from a table as a line of a terminal may show it: not too long, and no control characters."""
    return name if name.isprintable() and len(name) <= most else quoted(name, most)


def quoted(name: str, most: int = _SHOWN_CHARACTERS) -> str:
    """A name in quotes, of bounded length."""
    return f"{name!r:.{most}}"


def in_words(names: Collection[str], show: Callable[[str], str] = shown) -> str:
    """The first twenty names, and how many more there are."""
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(map(show, itertools.islice(names, _SHOWN_NAMES))) + more


@functools.lru_cache(1024)  # the same label may be wrong in thousands of rows
def nearest(name: str, known: tuple[str, ...]) -> str:
    """The known name nearest to a given one, as the end of a sentence; empty where none is near."""
    by_case = {each.strip().lower(): each for each in known}
    near = difflib.get_close_matches(name.strip().lower(), list(by_case), n=1)
    return f"; did you mean {by_case[near[0]]!r:.60}?" if near else ""


# ---- their order, and what can be learnt ----


def order_labels(names: Iterable[str], given: Sequence[str] = ()) -> list[str]:
    """The labels in the order of their ids: as given, else sorted, as numbers where all are numbers."""
    if given:
        return list(given)
    names = sorted(names)
    return sorted(names, key=float) if all(map(_NUMBER.fullmatch, names)) else names


def are_measures(names: Collection[str]) -> bool:
    """Whether all labels are numbers and some of them no whole ones."""
    return all(map(_NUMBER.fullmatch, names)) and any(not float(name).is_integer() for name in names)


def check_classes(
    path: str | Path, counts: Counter[str], num_rows: int, reasons: Counter[str], column: str, first_bad: str = ""
) -> None:
    """Refuse a table from which nothing can be learnt: no rows, fewer than two labels, or one with fewer than two rows.

    `counts` are the good rows of each label, labels that were given and never seen among them; `num_rows` all good
    rows, `reasons` the bad ones, and `first_bad` the first of them in words.
    """
    bad = ", ".join(f"{number:,} x {reason}" for reason, number in reasons.most_common(4))
    left_out = f"; left out: {bad}{first_bad and f' (the first: {first_bad})'}" if bad else ""
    if not num_rows:
        raise UserError(f"{path} has no row that can be used{left_out or ', only a header or nothing at all'}")
    seen = [label for label, number in counts.items() if number]
    if not seen:
        raise UserError(f"no row of {path} has a label in {column!r}; two labels are needed{left_out}")
    if len(seen) < 2:
        which = "every row" if counts[seen[0]] == num_rows else "every row with a label"
        raise UserError(f"{which} of {path} has the label {quoted(seen[0])} in {column!r}; two are needed{left_out}")
    rare = sorted(label for label, number in counts.items() if number < 2)
    if rare:
        rarest = ", ".join(f"{quoted(label)} ({counts[label]})" for label in rare[:5])
        more = f" and {len(rare) - 5:,} more" if len(rare) > 5 else ""
        way_out = "add rows, merge labels, or take another label column"
        if are_measures(seen):
            way_out = "they are numbers, and classes are learnt here, no regression: round them or name their ranges"
        raise UserError(
            f"{path}: {len(rare):,} of {len(counts):,} labels of {column!r} have fewer than 2 rows: {rarest}{more}; "
            f"{way_out}{left_out}"
        )


# ---- cells that are lists ----


def items_of(cell: str) -> list[str] | None:
    """The elements of a cell that is a list as Python and JSON write one, `['a', 'b']`; None where it is none.

    Raises:
        ValueError: it looks like one and cannot be read.
    """
    if not _MAY_BE_LIST.fullmatch(cell):
        return None
    if not _LIST.fullmatch(cell):
        if re.match(r"""[\[({]\s*['"]""", cell):
            raise ValueError("looks like a list")
        return None
    found = [json.loads(item) if item[0] == '"' else item for item in _ITEMS.findall(cell)]
    return [str(ast.literal_eval(item)) if item.startswith("'") else item for item in found]


# ---- what is doubtful ----


def doubts(found: Mapping[str, tuple[int, str]]) -> list[str]:
    """Sentences on labels that may not be what they were meant to be; all of them are learnt as they stand.

    Args:
        found: label -> (rows, place of the first).
    """
    alike = defaultdict[str, list[str]](list)
    for name in found:
        alike[_key(name)].append(name)

    def listed(names: Iterable[str], signs: bool = False) -> str:
        names = list(names)
        common = set.intersection(*map(set, names)) if signs else set[str]()
        said = []
        for name in names:
            codes = [f"U+{ord(sign):04X}" for sign in dict.fromkeys(name) if sign not in common] if signs else []
            more = "".join(f", {code}" for code in codes[:4]) + ", ..." * (len(codes) > 4)
            said.append(f"{quoted(name)} ({found[name][0]:,} rows, first {found[name][1]}{more})")
        return " and ".join(said[:_SHOWN_DOUBTS]) + f" and {len(said) - 8:,} more" * (len(said) > _SHOWN_DOUBTS)

    groups = [names for names in alike.values() if len(names) > 1]
    lines = [
        f"beware: {listed(names, signs=True)} look alike and are learnt as different labels; where one is meant, make "
        "them one in the table"
        for names in groups[:_SHOWN_DOUBTS]
    ]
    if len(groups) > _SHOWN_DOUBTS:
        lines.append(f"beware: so do {len(groups) - _SHOWN_DOUBTS:,} more groups of labels")
    if missing := [name for name in found if name.casefold() in MISSING]:
        lines.append(
            f"beware: {listed(missing)} are learnt as labels; where they stand for no label, give --labels with the "
            "others, and their rows are left out"
        )
    if are_measures(found):
        lines.append("beware: the labels are numbers, and are learnt as classes without an order, no regression")
    return lines


def _key(name: str) -> str:
    """What is left of a label without what a person does not see, or sees as the same."""
    text = unicodedata.normalize("NFKC", name).translate(_LOOKALIKES).casefold()
    text = "".join(sign for sign in _INVISIBLE.sub("", text) if unicodedata.category(sign) not in ("Cc", "Cf"))
    if _NUMBER.fullmatch(text.strip()):
        return str(float(text) + 0.0)  # of -0.0 too
    text = re.sub(r"(?<=\w)[-_\s\u2010-\u2015]+(?=\w)", "", text)
    return "".join(text.strip(" \t.,;:'\"`。、").split()) or name
