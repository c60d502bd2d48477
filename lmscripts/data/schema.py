"""What a record of a decision consists of: named fields, their ids in one table, and their ids in words.

A schema is a JSON object; `kanachan-v1` and `kanachan-v2` in `schemas/` are built in. It says for each column of the
text, in order, what the column is:

    {"name": "answers", "lists": {"colour": ["red", "green"]}, "value": {"field": "result", "index": 0, "scale": 10},
     "fields": [{"name": "game", "kind": "id"},
                {"name": "seen", "kind": "set", "vocab_size": 6, "max_length": 3,
                 "ranges": [{"first": 0, "name": "light", "digits": ["colour", ["", "blinking"]]},
                            {"first": 4, "name": "hour", "digits": [2]}]},
                {"name": "sizes", "kind": "numeric", "max_length": 2, "scales": [1, 100], "names": ["age", "weight"]},
                {"name": "events", "kind": "sequence", "vocab_size": 9, "min_length": 0, "max_length": 20},
                {"name": "answers", "kind": "candidates", "vocab_size": 5, "max_length": 4},
                {"name": "chosen", "kind": "label"},
                {"name": "result", "kind": "extra", "max_length": 1}]}

A set and candidates are ascending and without repetition, a sequence keeps its order, numbers are divided by their
scales, a label is an index into the candidates, and what is extra is only known afterwards and never seen by a model.
A range gives words to ids: its digits are counted out, the most significant first, and a digit is a list of words, the
name of one in "lists", or how many numbers there are.

No numpy and no torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.files import read_json

KINDS = ("id", "set", "numeric", "sequence", "candidates", "label", "extra")
TOKENS = ("set", "sequence", "candidates")
_FOLDER = Path(__file__).parent / "schemas"
_WAY_OUT = "mend it; the head of lmscripts/data/schema.py shows the form"
_MOST, _LONGEST = 1 << 20, (1 << 16) - 1  # ids of the table, and positions: counts are kept in 16 bits
_KEYS = {"name": str, "lists": dict, "fields": list, "value": dict}
_FIELD_KEYS = {"name": str, "kind": str, "vocab_size": int, "reserved": int, "min_length": int, "max_length": int}
_FIELD_KEYS |= {"scales": list, "names": list, "ranges": list}
_RANGE_KEYS = {"first": int, "name": str, "digits": list}
_VALUE_KEYS = {"field": str, "index": int, "scale": (int, float)}


@dataclass(frozen=True)
class Range:
    """Words for the ids from `first` on: `name` and a word of each digit, the most significant first."""

    first: int
    name: str
    digits: tuple[tuple[str, ...], ...]

    @property
    def end(self) -> int:
        """The first id behind it."""
        return self.first + math.prod(map(len, self.digits))

    def words(self, number: int) -> str:
        """An id in words."""
        rest, said = number - self.first, list[str]()
        for digit in reversed(self.digits):
            rest, place = divmod(rest, len(digit))
            said.append(digit[place])
        return " ".join(filter(None, [self.name, *reversed(said)]))


@dataclass(frozen=True)
class Field:
    """One column of a record.

    Attributes:
        kind: one of KINDS.
        vocab_size: ids are 0 to vocab_size - 1; 0 for a kind without ids.
        reserved: further entries of the table behind them; the first of the candidates' is the VALUE token.
        min_length, max_length: numbers in the column.
        scales: a number is divided by its scale, of numeric.
        ranges: words for ids, ascending.
        names: what each number is, of numeric and extra.
    """

    name: str
    kind: str
    vocab_size: int = 0
    reserved: int = 0
    min_length: int = 1
    max_length: int = 1
    scales: tuple[float, ...] = ()
    ranges: tuple[Range, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def num_ids(self) -> int:
        """Rows of the table that belong to it: ids, reserved ones, and its own padding as the last; 0 without ids."""
        return self.vocab_size + self.reserved + 1 if self.kind in TOKENS else 0


@dataclass(frozen=True)
class Value:
    """What a value head learns: the number in this column of all extra numbers, divided by `scale`."""

    index: int
    scale: float


@dataclass(frozen=True)
class Schema:
    """The columns of a record, in order; see the module's docstring."""

    name: str
    fields: tuple[Field, ...]
    value: Value | None = None
    _json: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def of_kind(self, *kinds: str) -> tuple[Field, ...]:
        """The fields of some kinds, in the order of the columns."""
        return tuple(each for each in self.fields if each.kind in kinds)

    def field(self, kind: str) -> Field:
        """The only, or first, field of a kind.

        Raises:
            UserError: there is none.
        """
        if not (found := self.of_kind(kind)):
            raise UserError(f"the schema {self.name} has no field of the kind {kind}")
        return found[0]

    @cached_property
    def token_fields(self) -> tuple[Field, ...]:
        """Those whose ids are tokens."""
        return self.of_kind(*TOKENS)

    @cached_property
    def num_ids(self) -> int:
        """Size of the one embedding table."""
        return sum(each.num_ids for each in self.fields)

    def first_id(self, field: Field) -> int:
        """Row of the table of the id 0 of a token field."""
        return sum(each.num_ids for each in self.fields[: self.fields.index(field)])

    @cached_property
    def pad_id(self) -> int:
        """Row of padding: the last of the table."""
        return self.num_ids - 1

    @cached_property
    def value_id(self) -> int:
        """Row of the VALUE token, at which a value head looks."""
        candidates = self.field("candidates")
        return self.first_id(candidates) + candidates.vocab_size

    @cached_property
    def num_numeric(self) -> int:
        """Numbers of all numeric fields."""
        return sum(each.max_length for each in self.of_kind("numeric"))

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """What each of the numbers of all numeric fields is divided by."""
        return tuple(scale for each in self.of_kind("numeric") for scale in each.scales)

    @cached_property
    def num_extra(self) -> int:
        """Numbers of all extra fields, each at its longest."""
        return sum(each.max_length for each in self.of_kind("extra"))

    @cached_property
    def max_positions(self) -> int:
        """Positions of the longest row: every field at its longest, and the VALUE token."""
        return sum(each.max_length for each in self.token_fields) + self.num_numeric + 1

    @property
    def max_candidates(self) -> int:
        """Candidates of a record at most."""
        return self.field("candidates").max_length

    def words(self, field: Field, number: int) -> str:
        """An id of a token field, as it stands in the text, in words."""
        found = _range_of(field, number)
        return found.words(number) if found else f"{field.name} {number}"

    def type_of(self, number: int) -> str:
        """The kind of thing that a candidate is: the name of the range of its id in the text."""
        candidates = self.field("candidates")
        found = _range_of(candidates, number)
        return found.name if found else candidates.name

    def layout(self) -> list[Any]:
        """What decides how text is read and what ids mean, without the words; equal layouts can share a store."""
        sizes = ("kind", "vocab_size", "reserved", "min_length", "max_length")
        return [[getattr(each, size) for size in sizes] for each in self.fields]

    def as_json(self) -> dict[str, Any]:
        """A JSON object, from which `from_json` gives this schema again."""
        return dict(json.loads(json.dumps(self._json)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: str = "the schema") -> Schema:
        """A schema of a JSON object.

        Raises:
            UserError: names what is wrong in it, and `origin`.
        """
        _check_keys(content, _KEYS, ("name", "fields"), origin)
        lists = {
            name: _as_words(words, f"{origin}: the list {name}") for name, words in content.get("lists", {}).items()
        }
        columns = tuple(
            _field(each, lists, f"{origin}: column {number}") for number, each in enumerate(content["fields"])
        )
        for kind, fewest, most in (("candidates", 1, 1), ("label", 1, 1), ("id", 0, 1)):
            number = sum(each.kind == kind for each in columns)
            if not fewest <= number <= most:
                words = "exactly one" if fewest else "at most one"
                raise UserError(f"{origin} has {number} columns of the kind {kind}, there must be {words}; {_WAY_OUT}")
        if again := [each.name for each in columns if sum(other.name == each.name for other in columns) > 1]:
            raise UserError(f"{origin} has two columns named {again[0]}; {_WAY_OUT}")
        made = cls(content["name"], columns, _value(content.get("value"), columns, origin), content)
        if made.num_ids > _MOST or made.max_positions > _LONGEST:
            raise UserError(
                f"{origin} has {made.num_ids:,} ids and {made.max_positions:,} positions; at most {_MOST:,} "
                f"and {_LONGEST:,} are possible"
            )
        return made


def _range_of(field: Field, number: int) -> Range | None:
    return next((each for each in field.ranges if each.first <= number < each.end), None)


def builtin_names() -> tuple[str, ...]:
    """Schemas that have a name."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_schema(name_or_path: str | Path) -> Schema:
    """A built-in schema by its name, or that in a JSON file.

    Raises:
        UserError: there is neither, or the file holds no schema.
    """
    path = _FOLDER / f"{name_or_path}.json" if str(name_or_path) in builtin_names() else Path(name_or_path)
    if not path.is_file():
        raise UserError(f"there is no schema {name_or_path}: give a JSON file, or one of {', '.join(builtin_names())}")
    return Schema.from_json(read_json(path, dict, _WAY_OUT), str(path))


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_keys(content: Any, known: Mapping[str, Any], needed: Sequence[str], place: str) -> None:
    """Refuse what is no object, lacks a key, has an unknown one, or a value of another type."""
    if not isinstance(content, Mapping):
        raise UserError(f"{place} is {json.dumps(content)[:40]}, not an object with keys; {_WAY_OUT}")
    for key in needed:
        if key not in content:
            raise UserError(f"{place} has no {key}; {_WAY_OUT}")
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{place} has the unknown key {key}; there are {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise UserError(f"{place}: {key} is {json.dumps(value)[:40]}, of the wrong kind or negative; {_WAY_OUT}")


def _as_words(content: Any, place: str) -> tuple[str, ...]:
    if not isinstance(content, list) or not content or not all(isinstance(word, str) for word in content):
        raise UserError(f"{place} is not a list of words: {json.dumps(content)[:40]}; {_WAY_OUT}")
    return tuple(content)


def _field(content: Any, lists: Mapping[str, tuple[str, ...]], place: str) -> Field:
    _check_keys(content, _FIELD_KEYS, ("name", "kind"), place)
    kind, place = content["kind"], f"{place} ({content['name']})"
    if kind not in KINDS:
        raise UserError(f"{place} has the kind {kind}; there are {', '.join(KINDS)}")
    longest = content.get("max_length", 1)
    shortest = content.get("min_length", longest if kind in ("numeric", "extra") else 1)
    scales = content.get("scales", [1.0] * longest if kind == "numeric" else [])
    names = _as_words(content["names"], f"{place}: names") if "names" in content else ()
    sizes = {"vocab_size": content.get("vocab_size", 0), "reserved": content.get("reserved", int(kind == "candidates"))}
    if (kind in TOKENS) != bool(sizes["vocab_size"]) or (
        kind not in TOKENS and (sizes["reserved"] or "ranges" in content)
    ):
        raise UserError(f"{place}: {', '.join(TOKENS)} have a vocab_size above 0, and they alone; {_WAY_OUT}")
    if kind == "candidates" and not sizes["reserved"]:
        raise UserError(f"{place}: reserved is 0, the VALUE token needs 1; {_WAY_OUT}")
    alone = kind in ("id", "label") and longest != 1
    if alone or (kind == "numeric" and shortest != longest) or not shortest <= longest or not longest:
        raise UserError(f"{place} has {shortest} to {longest} numbers, which a column of the kind {kind} cannot have")
    good = all(isinstance(scale, (int, float)) and math.isfinite(scale) and scale for scale in scales)
    if not good or len(scales) != (longest if kind == "numeric" else 0) or (names and len(names) != longest):
        raise UserError(f"{place}: a scale that is not 0, and a name if there are any, for each of {longest} numbers")
    ranges = _ranges(content.get("ranges", []), lists, sizes["vocab_size"], place)
    lengths = {"min_length": shortest, "max_length": longest}
    return Field(
        content["name"], kind, **sizes, **lengths, scales=tuple(map(float, scales)), ranges=ranges, names=names
    )


def _ranges(content: Sequence[Any], lists: Mapping[str, Any], vocab_size: int, place: str) -> tuple[Range, ...]:
    made = list[Range]()
    for number, each in enumerate(content):
        where = f"{place}: range {number}"
        _check_keys(each, _RANGE_KEYS, ("first", "name"), where)
        digits = list[tuple[str, ...]]()
        for digit in each.get("digits", []):
            if isinstance(digit, str) and digit not in lists:
                raise UserError(f"{where} names the list {digit}; there are {', '.join(lists) or 'none'}")
            if isinstance(digit, int) and 0 < digit <= _MOST:
                digits.append(tuple(map(str, range(digit))))
            else:
                digits.append(lists[digit] if isinstance(digit, str) else _as_words(digit, where))
        made.append(Range(each["first"], each["name"], tuple(digits)))
        before = made[-2].end if number else 0
        if made[-1].first < before or made[-1].end > vocab_size:
            raise UserError(
                f"{where} ({each['name']}) is {made[-1].first} to {made[-1].end - 1}: it must lie between {before}, "
                f"where the one before ends, and {vocab_size - 1}"
            )
    return tuple(made)


def _value(content: Any, columns: Sequence[Field], origin: str) -> Value | None:
    if content is None:
        return None
    _check_keys(content, _VALUE_KEYS, ("field", "index", "scale"), f"{origin}: value")
    before = 0
    for each in columns:
        if each.kind == "extra":
            if each.name == content["field"] and content["index"] < each.min_length and content["scale"]:
                return Value(before + content["index"], float(content["scale"]))
            before += each.max_length
    raise UserError(f"{origin}: value is number {content['index']} of {content['field']}, which no extra field has")
