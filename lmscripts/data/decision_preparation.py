"""From text files of decisions to a decision store, or to the one that was made of them before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmscripts.data.arrays import ArrayWriter
from lmscripts.data.decisions import (
    ARRAYS,
    FORMAT_VERSION,
    PARTS,
    DecisionPart,
    DecisionStore,
    check_decisions,
    is_store,
    map_part,
    open_decisions,
    parse_with_keys,
    store_fingerprint,
)
from lmscripts.data.schema import Schema, load_schema
from lmscripts.errors import UserError
from lmscripts.files import built_once, new_folder, remove_leftovers
from lmscripts.text.corpus import find_files
from lmscripts.text.labels import in_words
from lmscripts.text.reading import MAX_LINE_BYTES, DamagedFileError, check_utf8, kind_of, opened
from lmscripts.text.records import BadRow
from lmscripts.text.report import TextReport
from lmscripts.workers import in_order

_BLOCK = 1 << 19  # bytes of text that are parsed together
_RECORDS = 1 << 14  # that are looked at, or copied, together
_KEYS, _PASSES = 1 << 18, 256  # hashes that are sorted together, and how often all are read for it at most
DEFAULT_SCHEMA = "kanachan-v1"
_MARK = b"\xef\xbb\xbf"
_OF_THE_TEXT = ("bad_records_dropped", "blank_lines", "damaged_files", "repeated_decisions")  # not of its files
U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class DecisionSource:
    """What a store is made of.

    Attributes:
        input_files: files, patterns or folders of text.
        schema: what the columns are.
        validation_share: share of the games held out, by a hash of their id; ignored when there are validation files.
        validation_files: text of its own for the validation part.
        keep_duplicates: keep decisions that stand there more than once. Only a schema with an id tells them from others
            that happen to be alike, so without one they are kept in any case.
        on_bad_row: leave bad lines, and what is missing of damaged files, out and count them; or fail at the first.
    """

    input_files: tuple[str, ...]
    schema: Schema
    validation_share: float = 0.01
    validation_files: tuple[str, ...] = ()
    keep_duplicates: bool = False
    on_bad_row: Literal["skip", "fail"] = "skip"

    def options(self) -> dict[str, Any]:
        """The options that change the content of the store."""
        share = 0.0 if self.validation_files else float(self.validation_share)
        return {"validation_share": share, "keep_duplicates": self.keep_duplicates or not self.schema.of_kind("id")}

    def files(self, report: TextReport | None = None) -> dict[str, list[Path]]:
        """The files of each part.

        Raises:
            UserError: one is missing, or no text; the share is not in [0, 1).
        """
        if not 0 <= self.validation_share < 1:
            raise UserError(f"--validation_share must be at least 0 and less than 1, got {self.validation_share}")
        inputs = dict(zip(PARTS, (self.input_files, self.validation_files)))
        return {part: find_files(names, report) if names else [] for part, names in inputs.items()}


# ---- reading -----------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Whole lines of a file, of which the first has this number; `ends` where the file ends within the last."""

    path: str
    first_line: int
    text: bytes
    ends: bool


class _Text:
    """The lines of some files in order, in blocks; while they are read, their hash and what had to be repaired.

    The hash is of the text alone: it does not depend on how it is cut into files, or on their compression.
    """

    def __init__(self, files: Sequence[Path], on_bad_row: str, report: TextReport) -> None:
        self.files, self.fails, self.report = files, on_bad_row == "fail", report
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[_Block]:
        for path in map(str, self.files):
            try:
                kind_of(path, "txt")
                check_utf8(path)
                yield from self._blocks(path)
            except DamagedFileError as error:
                if self.fails:
                    raise
                self.report.count("damaged_files", 1, str(error).__str__)

    def _blocks(self, path: str) -> Iterator[_Block]:
        self.report.num_files += 1
        number, rest, damage, goes_on = 1, b"", None, True
        with opened(path) as file:
            while goes_on:
                try:
                    piece = file.read1(_BLOCK)  # type: ignore[attr-defined]
                except Exception as error:  # what came before the damage is good
                    damage, piece = error, b""
                goes_on, rest = bool(piece), rest + piece
                if goes_on and len(rest) < _BLOCK:
                    continue
                if number == 1 and rest.startswith(_MARK):
                    rest = rest.removeprefix(_MARK)
                    self.report.count("byte_order_marks", 1, path.__str__)
                if end := rest.rfind(b"\n") + 1:
                    yield self._block(path, number, rest[:end], False)
                    number += rest.count(b"\n")
                # No record is so long: of a line without an end its beginning is enough to name it.
                rest = rest[end:][:MAX_LINE_BYTES]
            if damage:
                raise damage
        if rest:
            yield self._block(path, number, rest, True)

    def _block(self, path: str, number: int, text: bytes, ends: bool) -> _Block:
        self.digest.update(text + b"\n" * ends)
        self.report.num_bytes += len(text)
        return _Block(path, number, text, ends)

    def hash(self) -> str:
        """Of all that was read."""
        return self.digest.hexdigest()


class _Parsed(NamedTuple):
    """What a worker makes of a block; `keys` as `parse_with_keys` has them."""

    records: DecisionPart
    keys: U64
    bad: list[BadRow]
    blank: list[int]
    path: str
    size: int


def _parsed(block: _Block, schema: Schema) -> _Parsed:
    lines = block.text.split(b"\n")
    if not block.ends:
        lines.pop()  # what is behind the last line end
    blank = [number for number, line in enumerate(lines) if not line.strip(b"\r \t")]
    records, bad, keys = parse_with_keys(lines, schema, block.first_line)
    passed = {block.first_line + number for number in blank}
    bad = [row for row in bad if row.line not in passed]
    if block.ends and bad and bad[-1].line == block.first_line + len(lines) - 1:
        last = bad.pop()
        bad.append(BadRow(last.line, last.reason, f"{last.details}; the file ends within this line", last.raw))
    return _Parsed(records, keys, bad, sorted(passed), block.path, len(block.text))


def _all_parsed(
    text: _Text, schema: Schema, num_workers: int, progress: Callable[[int], None]
) -> Iterator[tuple[DecisionPart, U64]]:
    """Records of a text in order, with their keys; what is no record is counted, or the reason to stop."""
    report = text.report

    def place(block: _Block) -> Callable[[], str]:
        return partial("{}:{}".format, block.path, block.first_line)

    for parsed in in_order(partial(_parsed, schema=schema), text, num_workers, place=place):
        for row in parsed.bad:
            if text.fails:
                raise row.error(parsed.path)
            report.count_bad(row.reason, row.details, partial("{}:{}".format, parsed.path, row.line))
        for line in parsed.blank:
            report.count("blank_lines", 1, partial("{}:{}".format, parsed.path, line))
        progress(parsed.size)
        yield parsed.records, parsed.keys


# ---- writing -----------------------------------------------------------------------------------------------------


class _PartWriter:
    """Appends records to the arrays of one part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, ArrayWriter(folder, ARRAYS)
        self.facts: dict[str, Any] = {"records": 0, "tokens": 0, "games": 0, "duplicates": 0}
        self.files.write("offsets", np.zeros(1, np.int64))

    def append(self, records: DecisionPart) -> None:
        """Append records, in memory."""
        for name in ARRAYS:
            array = getattr(records, name)
            self.files.write(name, array[1:] + self.facts["tokens"] if name == "offsets" else array)
        self.facts["records"] += records.num_records
        self.facts["tokens"] += records.ids.size

    def close(self) -> None:
        """Finish the arrays."""
        self.facts["files"] = self.files.close()


def _by_hash(file: Path, number: int, passes: int) -> Iterator[tuple[U64, NDArray[np.int64]]]:
    """Some of the (number,) hashes in a file with their places at a time, in sorted order, equal ones together."""
    for each in range(passes):
        found, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for at in range(0, number, _KEYS):
            hashes = np.fromfile(file, np.uint64, min(_KEYS, number - at), offset=8 * at)
            places = np.flatnonzero(hashes % np.uint64(passes) == each)
            found.append(hashes[places])
            rows.append(places + at)
        values = np.concatenate(found)
        order = np.argsort(values, kind="stable")
        yield values[order], np.concatenate(rows)[order]


def _num_passes(number: int) -> int:
    return min(_PASSES, max(1, -(-number // _KEYS)))


def _are_alike(part: DecisionPart, one: NDArray[np.int64], two: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether two records are the same in all but what is extra, for (n,) pairs of rows."""
    alike: NDArray[np.bool_] = (part.labels[one] == part.labels[two]) & (part.games[one] == part.games[two])
    for table in (part.counts, part.numeric):
        alike &= np.all(table[one] == table[two], axis=1)
    pairs = np.flatnonzero(alike)
    sizes = part.offsets[one[pairs] + 1] - part.offsets[one[pairs]]  # of the other too, as the counts are the same
    starts = np.cumsum(sizes) - sizes
    within = np.arange(sizes.sum()) - np.repeat(starts, sizes)
    first, second = (part.ids[np.repeat(part.offsets[rows[pairs]], sizes) + within] for rows in (one, two))
    if pairs.size:
        alike[pairs] = np.logical_and.reduceat(first == second, starts)  # none is without candidates
    return alike


def _mark_duplicates(opened: Callable[[], DecisionPart], keys: Path, gone: NDArray[np.bool_]) -> int:
    """Mark, in (R,) bool, all but the first of records that are alike; their number."""
    number = 0
    for found, rows in _by_hash(keys, gone.size, _num_passes(gone.size)):
        again = np.flatnonzero(found[1:] == found[:-1]) + 1
        first = np.arange(found.size)
        first[again] = 0
        first = np.maximum.accumulate(first)  # of those with the same key
        for at in range(0, again.size, _RECORDS):
            some = again[at : at + _RECORDS]
            alike = _are_alike(opened(), rows[first[some]], rows[some])
            gone[rows[some][alike]] = True
            number += int(alike.sum())
    return number


def _without_duplicates(writer: _PartWriter, schema: Schema, beside: Path) -> dict[str, Any]:
    """The facts of a part in which each decision stands once; it is written again if it has to be.

    Arrays are mapped anew for each piece, as what was once looked at stays in memory as long as it is mapped.
    """
    folder, facts = writer.folder, writer.facts
    if not facts["records"]:
        return facts
    gone = np.memmap(beside / "gone.bin", np.bool_, mode="w+", shape=(facts["records"],))
    number = _mark_duplicates(partial(map_part, folder, schema, facts), beside / "keys.bin", gone)
    if not number:
        return facts
    folder.rename(before := beside / "before")
    once = _PartWriter(folder)
    for at in range(0, facts["records"], _RECORDS):
        end = min(at + _RECORDS, facts["records"])
        once.append(map_part(before, schema, facts).slice(at, end).taken(~gone[at:end]))
    once.close()
    return once.facts | {"duplicates": number}


def _count_games(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Write down how many games each part has, and how many of those held out are in training too."""
    passes, shared = _num_passes(max(part["records"] for part in parts.values())), 0
    files = ((folder / name / "games.bin", parts[name]["records"]) for name in PARTS)
    for found in zip(*(_by_hash(file, number, passes) for file, number in files)):
        train, held_out = (np.unique(values) for values, _ in found)
        parts["train"]["games"] += train.size
        parts["validation"]["games"] += held_out.size
        shared += int(np.isin(held_out, train, assume_unique=True).sum())
    if shared:
        parts["validation"]["games_in_training"] = shared


def _build(
    source: DecisionSource, folder: Path, num_workers: int, report: TextReport, progress: Callable[[int], None]
) -> DecisionStore:
    files, schema, settings = source.files(report), source.schema, source.options()
    limit = np.uint64(int(settings["validation_share"] * 2**64))
    with new_folder(folder) as aside:
        writers = {name: _PartWriter(aside / name) for name in PARTS}
        keys_of = {name: ArrayWriter(aside / f"{name}.keys", ["keys"]) for name in PARTS}
        texts = {name: _Text(files[name], source.on_bad_row, report) for name in PARTS}
        for name, text in texts.items():
            for records, keys in _all_parsed(text, schema, num_workers, progress):
                held_out = records.games < limit if name == "train" else np.ones(records.num_records, np.bool_)
                for part, wanted in (("train", ~held_out), ("validation", held_out)):
                    writers[part].append(records.taken(wanted))
                    keys_of[part].write("keys", keys[wanted])
        parts = {}
        for name, writer in writers.items():
            writer.close()
            keys_of[name].close()
            parts[name] = writer.facts
            if not settings["keep_duplicates"]:
                parts[name] = _without_duplicates(writer, schema, aside / f"{name}.keys")
        if not parts["train"]["records"]:
            raise _no_records(files["train"], parts["validation"]["records"], report)
        _count_games(aside, parts)
        for name in PARTS:
            shutil.rmtree(aside / f"{name}.keys")
        if duplicates := sum(part["duplicates"] for part in parts.values()):
            report.count("repeated_decisions", duplicates)
        hashes = {name: text.hash() for name, text in texts.items()}
        manifest = {"format": "lmscripts decision store", "format_version": FORMAT_VERSION, "text": hashes}
        # Without the places, which say how the text is cut into files.
        counted = {kind: number for kind, number in report.changes.items() if kind in _OF_THE_TEXT}
        manifest |= {"options": settings, "parts": parts, "report": {"changes": counted, "reasons": report.reasons}}
        manifest["fingerprint"] = store_fingerprint(hashes, schema, settings)
        for name, content in (("manifest", manifest), ("schema", schema.as_json())):
            text_of = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=name == "manifest")
            (aside / f"{name}.json").write_text(text_of, encoding="utf-8")
    return open_decisions(folder)


def _no_records(files: Sequence[Path], held_out: int, report: TextReport) -> UserError:
    if held_out:
        return UserError(f"all {held_out:,} decisions fell to the validation part, none is for training")
    names = in_words([path.name for path in files])
    return UserError("; ".join([f"there is no decision in {names}", *map(str.strip, report.sentences()[1:])]))


# ---- what is called ----------------------------------------------------------------------------------------------


def fingerprint_of(source: DecisionSource) -> str:
    """Fingerprint of the store that a source would give; reads all of its text.

    Raises:
        UserError: a file is missing or unreadable.
    """
    texts = {name: _Text(files, source.on_bad_row, TextReport()) for name, files in source.files().items()}
    for text in texts.values():
        for _ in text:
            pass
    return store_fingerprint({name: text.hash() for name, text in texts.items()}, source.schema, source.options())


def first_records(source: DecisionSource, number: int, report: TextReport) -> DecisionPart:
    """About `number` records from the beginning of a text, in memory; none where there is none.

    Raises:
        UserError: as `prepare_decisions`.
    """
    text = _Text(source.files(report)["train"], source.on_bad_row, report)
    records = parse_with_keys([], source.schema)[0]
    for records, _ in _all_parsed(text, source.schema, 1, lambda _: None):
        if records.num_records:
            break
    return records.slice(0, min(number, records.num_records))


def prepare_decisions(
    source: DecisionSource,
    folder: Path,
    num_workers: int,
    report: TextReport | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> DecisionStore:
    """Build the store of a source in `folder`, or open it if it stands there already.

    Args:
        source: text, schema and options.
        folder: where it is; what else may be there is left alone.
        num_workers: processes that parse; the result does not depend on it.
        report: is added to while reading.
        progress: called with the bytes of text of each finished block.

    Raises:
        UserError: another store or anything else is at `folder`, the source is unusable, or no record was left.
    """
    if not folder.exists():
        remove_leftovers(folder)
        return _build(source, folder, num_workers, report or TextReport(), progress)
    store = open_decisions(folder)
    if (wanted := fingerprint_of(source)) != store.fingerprint:
        raise UserError(
            f"the store {folder} was made from another text or with other options (its fingerprint is "
            f"{store.fingerprint[:16]}, this text and these options give {wanted[:16]}); choose another folder"
        )
    left_out = store.manifest["report"].get("changes", {}).get("bad_records_dropped", 0)
    if source.on_bad_row == "fail" and left_out:
        raise UserError(f"the store {folder} leaves {left_out:,} bad lines out, which --on_bad_row fail does not allow")
    return store


def prepare_decisions_beside(
    source: DecisionSource, run_dir: Path, num_workers: int, report: TextReport | None = None
) -> DecisionStore:
    """The store of a source, beside a run's folder under a name with its fingerprint; see `files.built_once`.

    To a `report` is added on the process that builds.
    """
    folder = run_dir.parent / f"decision_store-{fingerprint_of(source)[:12]}"
    build = partial(prepare_decisions, source, folder, num_workers, report)
    return built_once(folder, build, lambda: open_decisions(folder))


class Decisions(NamedTuple):
    """What a policy is trained on, and judged by.

    Attributes:
        schema: of both parts.
        train: records to train on.
        held_out: records to judge by; None for none.
        fingerprints: of the stores, by what is read of them.
        sentences: what a user should know.
    """

    schema: Schema
    train: DecisionPart
    held_out: DecisionPart | None
    fingerprints: dict[str, str]
    sentences: list[str]


def open_parts(
    training_data: Sequence[str],
    validation_data: Sequence[str],
    run_dir: Path,
    *,
    schema: str | None,
    validation_share: float,
    num_workers: int,
    **how: Any,
) -> Decisions:
    """Decisions to train on and to judge by; called before the processes join, by all of them.

    Args:
        training_data: a store, or text, of which a store is made beside the run's folder.
        validation_data: likewise; of a store its held-out part, if it has one. Nothing: the held-out part of the other.
        run_dir: folder of the run.
        schema: of text (kanachan-v1), and to compare stores with.
        validation_share: of text for training, where there is no validation data.
        num_workers: processes that parse text.
        how: further fields of `DecisionSource`.

    Raises:
        UserError: what is given cannot be used, or has other fields than the rest.
    """
    wanted = load_schema(schema) if schema else None
    report = TextReport()
    open_one: Callable[..., DecisionStore] = partial(
        open_or_prepare, run_dir=run_dir, num_workers=num_workers, report=report, **how
    )
    if validation_data and not any(is_store(Path(name)) for name in (*training_data, *validation_data)):
        both = {"validation_share": 0.0, "validation_files": tuple(validation_data)}
        store = other = open_one(training_data, wanted, **both)
    else:
        store = open_one(training_data, wanted, validation_share=0.0 if validation_data else validation_share)
        other = open_one(validation_data, store.schema, validation_share=0.0) if validation_data else store
    held_out = other.part("validation")
    if not held_out.num_records and other is not store:
        held_out = other.part("train")
    fingerprints = {"training_data": store.fingerprint, "validation_data": other.fingerprint}
    sentences = list(dict.fromkeys([*report.sentences()[1:], *store.sentences(), *other.sentences()]))
    usable = held_out if held_out.num_records else None
    if validation_data and usable is None:
        raise UserError("; ".join([f"{' and '.join(validation_data[:3])}: no decision to validate on", *sentences]))
    return Decisions(store.schema, store.part("train"), usable, fingerprints, sentences)


def open_or_prepare(
    names: Sequence[str],
    wanted: Schema | None,
    *,
    run_dir: Path,
    num_workers: int,
    report: TextReport | None = None,
    **fields: Any,
) -> DecisionStore:
    """A store, or that of text, whose fields are the wanted ones; for `report` see `prepare_decisions_beside`.

    `fields` are further ones of `DecisionSource`, for text.

    Raises:
        UserError: a store is given and more than it, or one with other fields.
    """
    if stores := [name for name in names if is_store(Path(name))]:
        if len(names) > 1:
            raise UserError(f"{stores[0]} is a decision store, which is read alone, but {len(names)} names are given")
        store = open_decisions(Path(stores[0]))
        check_decisions(store)
    else:
        source = DecisionSource(tuple(names), wanted or load_schema(DEFAULT_SCHEMA), **fields)
        store = prepare_decisions_beside(source, run_dir, num_workers, report)
    has = store.schema
    if wanted and (has.layout(), has.scales) != (wanted.layout(), wanted.scales):
        raise UserError(
            f"{store.folder} has the schema {has.name}, whose fields, sizes or scales are others than those of "
            f"{wanted.name}"
        )
    return store
