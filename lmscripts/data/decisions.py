"""The decision store: annotated decisions on disk, memory-mapped; and the parser that makes them of lines of text.

In the text a decision is a line: columns with tabs between them, as a `schema` says, whole numbers with commas between
them in each column. A store is a folder:

    manifest.json              format version, fingerprint, options, counts, file hashes
    schema.json                the schema by which the text was read
    train/, validation/        one folder per part, with the arrays of a `DecisionPart`, NAME.bin each

The bytes of a store depend on the text alone: not on its files, their compression, or the number of processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b, sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.data.arrays import check_hashes, check_sizes, map_array
from lmscripts.data.schema import TOKENS, Field, Schema, load_schema
from lmscripts.errors import UserError
from lmscripts.files import check_once, read_json, user_cache
from lmscripts.text.records import BadRow

FORMAT_VERSION = 1
ARRAYS = ("ids", "counts", "offsets", "numeric", "labels", "extra", "games")
PARTS = ("train", "validation")
MISSING = -(2**31)  # stands behind the last number of an extra field that has fewer than it may have
_BLOCK = 1 << 16  # records that are looked at together
_MOST_DIGITS = 10
_WAY_OUT = "prepare the store again"
_COMMA, _TAB, _NEWLINE, _MINUS = b",\t\n-"
_BEFORE = b"0000"
_WHOLE = re.compile(rb"-?[0-9]+")
_ZEROS, _TO_CARRY, _CARRIES = (np.uint32(0x01010101 * byte) for byte in (ord("0"), 0x80 - 10, 0x80))
_KEPT = np.array([0, 0xFF000000, 0xFFFF0000, 0xFFFFFF00, 0xFFFFFFFF], np.uint32)  # of one to four digits
_FEW_GAMES = 10
_PART_FORM = {
    **dict.fromkeys(("records", "tokens", "games", "duplicates"), int),
    "files": {name: {"bytes": int, "sha256": str} for name in ARRAYS},
}
_FORM = {
    "fingerprint": str,
    "text": {"train": str, "validation": str},
    "options": {"validation_share": float, "keep_duplicates": bool},
    "parts": dict.fromkeys(PARTS, _PART_FORM),
    "report": dict,
}


@dataclass(frozen=True)
class DecisionPart:
    """Decisions, memory-mapped (one part of a store) or in memory (parsed lines). R records, N tokens.

    Attributes:
        ids: (N,) uint16 or uint32, ids in the one table of the schema; token fields in the order of their columns.
        counts: (R, token fields) uint8 or uint16, tokens of each field.
        offsets: (R + 1,) int64 offsets into `ids`.
        numeric: (R, num_numeric) float32, not yet scaled.
        labels: (R,) uint16, index into the candidates.
        extra: (R, num_extra) int32; `MISSING` behind the last number of a field that has fewer than it may have.
        games: (R,) uint64, hash of the id field; without one, of all that was known and chosen.
    """

    ids: NDArray[Any]
    counts: NDArray[Any]
    offsets: NDArray[np.int64]
    numeric: NDArray[np.float32]
    labels: NDArray[np.uint16]
    extra: NDArray[np.int32]
    games: NDArray[np.uint64]

    @property
    def num_records(self) -> int:
        """Number of records, R."""
        return int(self.labels.size)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64 positions of some records, of (n,): tokens and numbers, without the VALUE token."""
        lengths: NDArray[np.int64] = self.offsets[rows + 1] - self.offsets[rows] + self.numeric.shape[1]
        return lengths

    def taken(self, wanted: NDArray[np.bool_]) -> DecisionPart:
        """In memory, the records that are wanted, of (R,)."""
        sizes = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(sizes[wanted])])
        ids = self.ids[self.offsets[0] : self.offsets[-1]][np.repeat(wanted, sizes)]
        rest = (getattr(self, name)[wanted] for name in ARRAYS[3:])
        return DecisionPart(ids, self.counts[wanted], offsets, *rest)

    def slice(self, start: int, end: int) -> DecisionPart:
        """The records [start, end), without a copy of their tokens."""
        offsets = self.offsets[start : end + 1]
        ids = self.ids[offsets[0] : offsets[-1]]
        rest = (getattr(self, name)[start:end] for name in ARRAYS[3:])
        return DecisionPart(ids, self.counts[start:end], offsets - offsets[0], *rest)


@dataclass(frozen=True)
class DecisionStore:
    """An opened store; see the module's docstring for the layout."""

    folder: Path
    manifest: dict[str, Any]
    schema: Schema

    @property
    def fingerprint(self) -> str:
        """Hash of what the store was made from: text, layout of the schema and options."""
        return str(self.manifest["fingerprint"])

    def part(self, name: str) -> DecisionPart:
        """Memory-map one part, "train" or "validation"."""
        return map_part(self.folder / name, self.schema, self.manifest["parts"][name])

    def sentences(self) -> list[str]:
        """What a user should know of its parts."""
        held_out, said = self.manifest["parts"]["validation"], list[str]()
        if shared := held_out.get("games_in_training", 0):
            said.append(
                f"warning: {shared:,} of the {held_out['games']:,} held-out games of {self.folder} are in the training "
                "data too: held-out figures tell less than they seem to"
            )
        if 0 < (number := held_out["games"]) < _FEW_GAMES:
            said.append(
                f"only {number} game{'s are' if number > 1 else ' is'} held out of {self.folder}: "
                "held-out figures speak of such games alone; more data, or a larger share, gives more"
            )
        return said


def _shapes(schema: Schema) -> dict[str, tuple[str, int | None]]:
    """Of each array its dtype and how wide it is; None for one dimension."""
    longest = max(each.max_length for each in schema.token_fields)
    return {
        "ids": ("uint16" if schema.num_ids <= 1 << 16 else "uint32", None),
        "counts": ("uint8" if longest < 1 << 8 else "uint16", len(schema.token_fields)),
        "offsets": ("int64", None),
        "numeric": ("float32", schema.num_numeric),
        "labels": ("uint16", None),
        "extra": ("int32", schema.num_extra),
        "games": ("uint64", None),
    }


def map_part(folder: Path, schema: Schema, facts: dict[str, Any]) -> DecisionPart:
    """Memory-map the arrays of a folder, of which a manifest says this."""
    arrays = {}
    for file, (dtype, width) in _shapes(schema).items():
        array = map_array(folder / f"{file}.bin", np.dtype(dtype), facts["files"][file]["bytes"])
        arrays[file] = array if width is None else array.reshape(facts["records"], width)
    return DecisionPart(**arrays)


# ---- opening -----------------------------------------------------------------------------------------------------


def store_fingerprint(text: dict[str, str], schema: Schema, settings: dict[str, Any]) -> str:
    """Fingerprint of a store from the hashes of its text, its schema and the options that change its content."""
    content = json.dumps([FORMAT_VERSION, text, schema.as_json(), settings], sort_keys=True)
    return sha256(content.encode()).hexdigest()


def is_store(folder: Path) -> bool:
    """Whether a folder looks like a decision store."""
    return (folder / "manifest.json").is_file() and (folder / "schema.json").is_file()


def open_decisions(folder: Path) -> DecisionStore:
    """Open a store and check that it is whole; for the content see `check_decisions`.

    Raises:
        UserError: no store there, another format version, a damaged manifest or schema, a file missing or of the wrong
            size.
    """
    if not is_store(folder):
        raise UserError(
            f"{folder} is not a decision store: it has no manifest.json and schema.json; make one with "
            "prepare_annotations.py"
        )
    manifest_file = folder / "manifest.json"
    version = read_json(manifest_file, {"format_version": int}, _WAY_OUT)["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has store format {version}, this program reads {FORMAT_VERSION}; {_WAY_OUT}")
    manifest = read_json(manifest_file, _FORM, _WAY_OUT)
    schema = load_schema(folder / "schema.json")
    if manifest["fingerprint"] != store_fingerprint(manifest["text"], schema, manifest["options"]):
        raise UserError(
            f"{manifest_file} is damaged (its fingerprint is not that of its text, schema and options); {_WAY_OUT}"
        )
    for name, facts in manifest["parts"].items():
        records, sizes = facts["records"], {}
        for file, (dtype, width) in _shapes(schema).items():
            numbers = {"ids": facts["tokens"], "offsets": records + 1}.get(
                file, records * (1 if width is None else width)
            )
            sizes[file] = np.dtype(dtype).itemsize * numbers
        check_sizes(folder / name, sizes, facts["files"], _WAY_OUT)
    return DecisionStore(folder, manifest, schema)


def check_decisions(store: DecisionStore) -> None:
    """As `verify_decisions`, but only where it was not done before on these very files."""
    files = [store.folder / name / f"{file}.bin" for name in PARTS for file in ARRAYS]
    note = user_cache() / "decisions" / f"{store.fingerprint[:16]}.json"
    check_once(note, [store.folder / "manifest.json", *files], lambda: verify_decisions(store))


def verify_decisions(store: DecisionStore) -> None:
    """Compare the content of every file with the manifest; a bar on a terminal.

    Raises:
        UserError: names the first file that differs, with both hashes, or what cannot be in a store.
    """
    parts, schema = store.manifest["parts"], store.schema
    check_hashes({store.folder / name: parts[name]["files"] for name in PARTS}, _WAY_OUT)
    candidates = schema.token_fields.index(schema.field("candidates"))
    for name in PARTS:
        part, end = store.part(name), 0
        for at in range(0, part.num_records, _BLOCK):
            some = slice(at, at + _BLOCK)
            offsets = part.offsets[at : at + _BLOCK + 1]
            wrong = offsets[0] != end or (np.diff(offsets) != part.counts[some].sum(1, dtype=np.int64)).any()
            wrong = wrong or (part.labels[some] >= part.counts[some, candidates]).any()
            end = int(offsets[-1])
            if wrong or part.ids[int(offsets[0]) : end].max() >= schema.num_ids:
                raise UserError(
                    f"{store.folder / name} holds records that {schema.name} cannot have, behind record {at:,}: it is "
                    f"damaged; {_WAY_OUT}"
                )


def record_in_words(part: DecisionPart, row: int, schema: Schema) -> list[str]:
    """A record in words: a line for each field, and one for each candidate, the chosen one marked by `>`."""
    at, token, number, extra, said = int(part.offsets[row]), 0, 0, 0, list[str]()
    for field in schema.fields:
        if field.kind in TOKENS:
            count = int(part.counts[row, token])
            ids = part.ids[at : at + count].astype(np.int64) - schema.first_id(field)
            words = [schema.words(field, int(each)) for each in ids]
            at, token = at + count, token + 1
            if field.kind == "candidates":
                label = int(part.labels[row])
                said += [f"{field.name}:", *(f"  {'>' if n == label else ' '} {each}" for n, each in enumerate(words))]
                continue
        elif field.kind in ("numeric", "extra"):
            table, start = (part.numeric, number) if field.kind == "numeric" else (part.extra, extra)
            values = table[row, start : start + field.max_length].astype(np.int64)
            number, extra = (
                (start + field.max_length, extra) if field.kind == "numeric" else (number, start + field.max_length)
            )
            words = [
                f"{name} {n}".strip() for name, n in zip(field.names or [""] * len(values), values) if n != MISSING
            ]
        else:
            continue
        said.append(f"{field.name}: {', '.join(words) or 'none'}")
    return said


# ---- lines to records --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A schema as arrays over the columns of whole numbers, all but the one of the id."""

    schema: Schema
    id_column: int | None
    columns: tuple[Field, ...]
    extra_columns: int  # how many of the last are extra; -1 where others are too
    base: NDArray[np.int64]  # added to ids
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    shortest: NDArray[np.int64]
    longest: NDArray[np.int64]
    ordered: NDArray[np.bool_]

    def are(self, *kinds: str) -> NDArray[np.bool_]:
        """(columns,) whether a column is of one of these kinds."""
        return np.array([each.kind in kinds for each in self.columns])

    def only(self, kind: str) -> int:
        return int(np.flatnonzero(self.are(kind))[0])


def _limits(field: Field) -> tuple[int, int]:
    """Smallest and largest number that may stand in a column."""
    if field.kind in TOKENS:
        return 0, field.vocab_size - 1
    return (0, (1 << 16) - 1) if field.kind == "label" else (MISSING + 1, -MISSING - 1)


@lru_cache(maxsize=16)
def _plan(schema: Schema) -> _Plan:
    columns = tuple(each for each in schema.fields if each.kind != "id")
    places = [number for number, each in enumerate(schema.fields) if each.kind == "id"]
    ints = {
        "base": [schema.first_id(each) if each.kind in TOKENS else 0 for each in columns],
        "low": [_limits(each)[0] for each in columns],
        "high": [_limits(each)[1] for each in columns],
        "shortest": [each.min_length for each in columns],
        "longest": [each.max_length for each in columns],
    }
    extra, behind = schema.of_kind("extra"), 0
    while schema.fields[-1 - behind].kind == "extra":
        behind += 1
    ordered = np.array([each.kind in ("set", "candidates") for each in columns])
    arrays = {name: np.array(values, np.int64) for name, values in ints.items()}
    id_column, behind = places[0] if places else None, behind if behind == len(extra) else -1
    return _Plan(schema, id_column, columns, behind, **arrays, ordered=ordered)


def parse(lines: Sequence[bytes], schema: Schema, first_line: int = 1) -> tuple[DecisionPart, list[BadRow]]:
    """Records of lines of text in memory, and the lines that are none, with what is wrong with them.

    Args:
        lines: with or without their line ends.
        schema: what their columns are.
        first_line: number of the first of them in its file.
    """
    records, bad, _ = parse_with_keys(lines, schema, first_line)
    return records, bad


def parse_with_keys(
    lines: Sequence[bytes], schema: Schema, first_line: int = 1
) -> tuple[DecisionPart, list[BadRow], NDArray[np.uint64]]:
    """As `parse`, and (R,) uint64 hashes of all of each record but what is extra: of all that was known and chosen."""
    plan, tabs = _plan(schema), len(schema.fields) - 1
    taken, bodies, games, keys = list[int](), list[bytes](), list[int](), list[int]()
    known = b""
    game = 0
    for number, line in enumerate(lines):
        line = line.rstrip(b"\r\n")
        if line.count(b"\t") != tabs:
            continue
        key = _hash(_without_extra(line, plan))
        name, body = _without_id(line, plan.id_column)
        if plan.id_column is None:
            game = key
        elif not name:
            continue
        elif name != known:
            known, game = name, _hash(name)
        taken.append(number)
        bodies.append(body)
        games.append(game)
        keys.append(key)
    records, wrong = _records(b"\n".join(bodies) + b"\n" * bool(bodies), plan, np.array(games, np.uint64))
    good = set(np.array(taken, np.int64)[~wrong].tolist())
    bad = [_bad_row(line, schema, first_line + n) for n, line in enumerate(lines) if n not in good]
    return records, bad, np.array(keys, np.uint64)[~wrong]


def _hash(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def _without_extra(line: bytes, plan: _Plan) -> bytes:
    if plan.extra_columns >= 0:
        return line.rsplit(b"\t", plan.extra_columns)[0]
    cells = zip(plan.schema.fields, line.split(b"\t"))
    return b"\t".join(cell for field, cell in cells if field.kind != "extra")


def _without_id(line: bytes, column: int | None) -> tuple[bytes, bytes]:
    """What stands in the column of the id, and the rest of the line."""
    if column is None:
        return b"", line
    if column == 0:
        name, _, rest = line.partition(b"\t")
        return name, rest
    cells = line.split(b"\t")
    name = cells.pop(column)
    return name, b"\t".join(cells)


def _whole_numbers(
    buffer: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(n,) int64 values of pieces of text, and (n,) which of them are no whole numbers of a few digits.

    Nearly all have one to four digits, which are read at once, as the bytes of one integer; `buffer` has four bytes
    before the first piece.
    """
    sizes = ends - starts
    words = np.ndarray((buffer.size - 3,), "<u4", buffer, strides=(1,))[ends - 4]  # the first digit in the lowest byte
    digits = (words ^ _ZEROS) & _KEPT[np.minimum(sizes, 4)]
    wrong = ((digits + _TO_CARRY) | digits) & _CARRIES != 0  # a byte above 9
    pairs = (digits * np.uint32(10) + (digits >> np.uint32(8))) & np.uint32(0x00FF00FF)
    values = ((pairs & np.uint32(0xFF)) * np.uint32(100) + (pairs >> np.uint32(16))).astype(np.int64)
    wrong |= sizes < 1
    others = np.flatnonzero(wrong | (sizes > 4))
    values[others], wrong[others] = _by_digit(buffer, starts[others], ends[others])
    return values, wrong


def _by_digit(
    buffer: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """As `_whole_numbers`, for any pieces."""
    negative = buffer[starts] == _MINUS
    starts = starts + negative
    sizes = ends - starts
    wrong = (sizes < 1) | (sizes > _MOST_DIGITS)
    values = np.zeros(starts.size, np.int64)
    for place in range(_MOST_DIGITS):
        left = np.flatnonzero(~wrong & (sizes > place))
        digit = buffer[starts[left] + place] ^ np.uint8(ord("0"))
        wrong[left[digit > 9]] = True
        values[left] = values[left] * 10 + digit
    return np.where(negative, -values, values), wrong


def _records(body: bytes, plan: _Plan, games: NDArray[np.uint64]) -> tuple[DecisionPart, NDArray[np.bool_]]:
    """Records of lines that have the right number of columns, the id's left out, and (lines,) which are none."""
    width, buffer = len(plan.columns), np.frombuffer(_BEFORE + body, np.uint8)
    ends = np.flatnonzero((buffer == _COMMA) | (buffer == _TAB) | (buffer == _NEWLINE))
    starts = np.concatenate([[len(_BEFORE)], ends[:-1] + 1]) if ends.size else ends
    values, wrong = _whole_numbers(buffer, starts, ends)
    is_last = buffer[ends] != _COMMA
    last = np.flatnonzero(is_last)  # pieces that end a cell
    counts = np.diff(last, prepend=-1)
    empty = (counts == 1) & (starts[last] == ends[last])
    column = np.repeat(np.tile(np.arange(width), games.size), counts)
    wrong |= (values < plan.low[column]) | (values > plan.high[column])
    wrong[1:] |= plan.ordered[column[1:]] & ~is_last[:-1] & (values[1:] <= values[:-1])
    wrong[last[empty]] = False
    rows = np.repeat(np.arange(games.size), counts.reshape(-1, width).sum(1))
    counts = np.where(empty, 0, counts).reshape(-1, width)
    spoilt = ((counts < plan.shortest) | (counts > plan.longest)).any(1)
    spoilt |= values[last.reshape(-1, width)[:, plan.only("label")]] >= counts[:, plan.only("candidates")]
    spoilt[rows[wrong]] = True
    kept = ~spoilt[rows]
    kept[last[empty]] = False
    return _arranged(plan, counts[~spoilt], games[~spoilt], values[kept], column[kept]), spoilt


def _arranged(
    plan: _Plan,
    counts: NDArray[np.int64],
    games: NDArray[np.uint64],
    values: NDArray[np.int64],
    column: NDArray[np.int64],
) -> DecisionPart:
    """Records of good numbers in the order of the text, (n,) values of (n,) columns, with (R, columns) counts."""
    shapes, are_tokens, records = _shapes(plan.schema), plan.are(*TOKENS), games.size
    dtype = {name: np.dtype(kind) for name, (kind, _) in shapes.items()}
    is_token = are_tokens[column]
    ids = values[is_token] + plan.base[column[is_token]]
    of_tokens = counts[:, are_tokens]
    offsets = np.concatenate([[0], np.cumsum(of_tokens.sum(1))])
    extra = np.full((records, plan.schema.num_extra), MISSING, np.int32)
    is_extra = plan.are("extra")
    if is_extra.any():
        filled = np.concatenate(
            [
                np.arange(each.max_length) < counts[:, [n]]
                for n, each in enumerate(plan.columns)
                if each.kind == "extra"
            ],
            1,
        )
        extra[filled] = values[is_extra[column]]
    numeric = values[plan.are("numeric")[column]].reshape(records, plan.schema.num_numeric)
    labels = values[plan.are("label")[column]]
    return DecisionPart(
        ids.astype(dtype["ids"]),
        of_tokens.astype(dtype["counts"]),
        offsets,
        numeric.astype(np.float32),
        labels.astype(np.uint16),
        extra,
        games,
    )


# ---- what is wrong with a line -----------------------------------------------------------------------------------


def _bad_row(line: bytes, schema: Schema, number: int) -> BadRow:
    reason, details = _fault(line.rstrip(b"\r\n"), schema)
    return BadRow(number, reason, details, line.decode("utf-8", "replace"))


def _fault(line: bytes, schema: Schema) -> tuple[str, str]:
    """The first thing that is wrong with a line: a reason of few kinds, and details."""
    cells = line.split(b"\t")
    if len(cells) != len(schema.fields):
        how = "many" if len(cells) > len(schema.fields) else "few"
        return f"too {how} fields", f"{len(cells)}, where {schema.name} has {len(schema.fields)} with tabs between them"
    numbers = dict[str, list[int]]()
    for place, (field, cell) in enumerate(zip(schema.fields, cells)):
        where = f"field {place} ({field.name})"
        texts = cell.split(b",") if cell else []
        if not cell and field.min_length:
            return f"{where} is empty", "each has at least one character"
        if field.kind == "id":
            continue
        if not field.min_length <= len(texts) <= field.max_length:
            least = f"{field.min_length} to " if field.min_length < field.max_length else ""
            return f"{where} has the wrong number of elements", f"{len(texts)}, not {least}{field.max_length}"
        for text in texts:
            if not _WHOLE.fullmatch(text):
                return f"{where} holds what is no whole number", repr(text.decode("utf-8", "replace"))[:40]
            low, high = _limits(field)
            if len(text) > _MOST_DIGITS + 1 or not low <= int(text) <= high:
                return f"{where} is out of range", f"{text.decode()[:40]}, not {low} to {high}"
            if len(text.lstrip(b"-")) > _MOST_DIGITS:
                return f"{where} is written with too many digits", text.decode()
            numbers.setdefault(field.kind, []).append(int(text))
        if field.kind in ("set", "candidates"):
            ids = list(map(int, texts))
            if wrong := [(one, two) for one, two in pairwise(ids) if one >= two]:
                one, two = wrong[0]
                what = "has an element twice" if one == two else "is not ascending"
                return f"{where} {what}", f"{two} behind {one}"
    label, candidates = numbers["label"][0], len(numbers["candidates"])
    if label < candidates:
        raise AssertionError(f"a good line was refused: {line!r}")
    return "the label is no candidate", f"{label}, where there are {candidates} candidates (0 to {candidates - 1})"
