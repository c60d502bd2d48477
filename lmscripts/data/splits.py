"""Train, validation and test parts of a table, by document, so that nothing of a test document is seen in training.

Documents of one group, those with the same text (after NFKC, white space aside) and those with the same id are one
unit, and a unit is never taken apart. Units are put in the order of a hash of the seed and their name, class by class;
the first of them are for testing, the last for validation, and those between for training. Where a class is cut, above
or below its share, depends on what the classes before it have left over. Hence

- the same table, seed and shares give the same parts whatever the order of the rows, and rows that are added move only
  what stands near the ends of a class;
- a part's rows, of a class and of all, differ from its share by about the largest unit at most;
- a class of four units or more is in every part, unless a part would exceed its share by far;
- every class has rows for training.

A document with several labels, and a unit with several classes, counts for its rarest class.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lmscripts.errors import UserError
from lmscripts.text.labels import in_words, shown
from lmscripts.text.records import PARTS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_LISTED = 20  # labels in a sentence
_FLOOR_UNITS = 4  # classes of that many units are in every part ...
_SPARE_UNITS, _SPARE_SHARE = 10, 0.1  # ... while it exceeds its share by no more: units, or of the smallest part's rows


@dataclass(frozen=True)
class SplitSettings:
    """How documents are given to parts.

    Attributes:
        method: "stratified", or "given" for what the table or its files say.
        seed: another seed gives other parts.
        train, validation, test: shares; they are divided by their sum, which must be 1 (or 100) but for rounding. With
            "given" only `validation` is looked at: where no document is given for validation, that share of the
            documents for training is taken.
        use_groups: whether documents of one group stay together.
    """

    method: Literal["stratified", "given"] = "stratified"
    seed: int = 1
    train: float = 0.8
    validation: float = 0.1
    test: float = 0.1
    use_groups: bool = True

    def shares(self) -> tuple[float, float, float]:
        """Shares of train, validation and test that sum to 1; of what is given for training with "given".

        Raises:
            UserError: a share below 0, none for training, or a sum that is neither 1 nor 100.
        """
        if self.method == "given":
            validation = self.validation / 100 if self.validation > 1 else self.validation
            if not 0 <= validation < 1:
                raise UserError(f"the share for validation must be 0 or more and below 1, not {self.validation}")
            return 1 - validation, validation, 0.0
        given = (self.train, self.validation, self.test)
        total = sum(given)
        said = f"train {self.train}, validation {self.validation}, test {self.test}"
        if not all(math.isfinite(share) and share >= 0 for share in given) or self.train <= 0:
            raise UserError(f"the shares of a split must be 0 or more, and more than 0 for training, not {said}")
        if not (0.99 <= total <= 1.01 or 99 <= total <= 101):
            raise UserError(f"the shares of a split must sum to 1: {said} sum to {total:g}")
        return self.train / total, self.validation / total, self.test / total


@dataclass(frozen=True, slots=True)
class SplitDocument:
    """What a split needs to know of a document: labels, hash of its text, group, the part it was given, and its id."""

    labels: tuple[int, ...]
    text_hash: bytes
    group: str | None = None
    given_part: str | None = None
    name: str | None = None


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that are equal after NFKC and with any white space taken for one space."""
    normal = " ".join(unicodedata.normalize("NFKC", text).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_documents(
    documents: Sequence[SplitDocument], settings: SplitSettings, labels: Sequence[str] = ()
) -> list[str]:
    """The part of every document: "train", "validation" or "test"; `labels` are words for theirs.

    Raises:
        UserError: shares that make no sense or have no effect, a part that was asked for and gets nothing, no part for
            a document where the table was to give it, or a class without a row for training.
    """
    train, validation, test = settings.shares()
    if settings.method == "given":
        return _given(documents, settings, labels)
    units = units_of_documents(documents, settings.use_groups)
    parts = _assign(documents, units, settings.seed, validation, test)
    for part, share in zip(PARTS, (train, validation, test)):
        if share > 0 and part not in parts:
            raise UserError(
                f"{len(documents):,} documents in {len(set(units)):,} groups of their own are too few for a part "
                f"{part!r} of {share:g}: add rows, give another share, or 0 for no such part"
            )
    return parts


def split_report(documents: Sequence[SplitDocument], parts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """What a split gives, as sentences: rows and shares of each part and class, and what to beware of."""
    sizes = Counter(parts)
    counts = Counter((part, label) for document, part in zip(documents, parts) for label in document.labels or (None,))
    totals = Counter(label for document in documents for label in document.labels or (None,))
    known: list[tuple[int | None, str]] = [(label, shown(name)) for label, name in enumerate(labels)]
    listed = known[:_LISTED] + [(None, "no label")] * (None in totals)
    lines = []
    for part in PARTS:
        shares = ", ".join(
            f"{name} {counts[part, label]:,} ({counts[part, label] / max(totals[label], 1):.1%})"
            for label, name in listed
        )
        more = f", and {len(labels) - _LISTED:,} more labels" if len(labels) > _LISTED else ""
        lines.append(f"{part}: {sizes[part]:,} documents ({sizes[part] / max(len(parts), 1):.1%}): {shares}{more}")
        if sizes[part] and (absent := [name for label, name in known if not counts[part, label]]):
            lines.append(f"{part} has no row of {in_words(absent)}; too few rows or groups")
    return [*lines, *_warnings(documents, parts)]


def _warnings(documents: Sequence[SplitDocument], parts: Sequence[str]) -> list[str]:
    """What stands in more than one part, as only given parts may have it, and texts of more than one label."""
    keys = ("text_hash", "group", "name")
    seen: dict[str, dict[Any, set[str]]] = {key: defaultdict(set) for key in keys}
    classes: dict[bytes, set[tuple[int, ...]]] = defaultdict(set)
    for document, part in zip(documents, parts):
        classes[document.text_hash].add(document.labels)
        for key in keys:
            if (value := getattr(document, key)) is not None:
                seen[key][value].add(part)
    found = {
        f"{word} stand in more than one part": sum(len(each) > 1 for each in seen[key].values())
        for key, word in zip(keys, ("texts", "groups", "ids"))
    }
    found["texts occur with different labels"] = sum(len(each) > 1 for each in classes.values())
    return [f"beware: {number:,} {what}" for what, number in found.items() if number]


def _given(documents: Sequence[SplitDocument], settings: SplitSettings, labels: Sequence[str]) -> list[str]:
    if missing := sum(document.given_part is None for document in documents):
        raise UserError(
            f"{missing:,} of {len(documents):,} documents have no part of their own: name the column that says train, "
            "validation or test, give a file for each part, or take the stratified split"
        )
    parts = [document.given_part or "" for document in documents]
    _, validation, _ = settings.shares()
    if "validation" not in parts and validation > 0:
        places = [place for place, part in enumerate(parts) if part == "train"]
        chosen = [documents[place] for place in places]
        units = units_of_documents(chosen, settings.use_groups)
        for place, part in zip(places, _assign(chosen, units, settings.seed, validation, 0.0)):
            parts[place] = part
    elif "validation" in parts and settings.validation not in (0, SplitSettings.validation):
        raise UserError(
            f"{parts.count('validation'):,} documents were given to validation, beside which --validation_share "
            f"{settings.validation:g} has no effect: leave it out"
        )
    classes = {label for document in documents for label in document.labels}
    trained = {label for document, part in zip(documents, parts) if part == "train" for label in document.labels}
    if untrained := sorted(classes - trained):
        named = in_words([labels[label] if label < len(labels) else str(label) for label in untrained], str)
        raise UserError(
            f"{len(untrained)} of {len(classes)} labels are in no document for training, of which there are "
            f"{parts.count('train'):,}: {named}; add some, or leave those rows out: give --labels with the others"
        )
    if not trained:
        raise UserError(f"none of the {parts.count('train'):,} documents for training has a label")
    return parts


# ---- units ----


def units_of_documents(documents: Sequence[SplitDocument], use_groups: bool) -> list[str]:
    """A name for each document's unit: documents that share a group, a text or an id, directly or by others, share it.

    The name is the smallest group of the unit, or the hash of its text, so that further rows hardly ever change it.
    """
    numbers: dict[str, int] = {}
    texts, owners, held = list[int](), list[int](), list[int]()
    for document in documents:
        keys = [f"text {document.text_hash.hex()}"]
        if use_groups and document.group is not None:
            keys.append(f"group {document.group}")  # sorts before "text", and so names the unit
        if document.name is not None:
            keys.append(f"titled {document.name}")  # sorts behind it
        texts.append(numbers.setdefault(keys[0], len(numbers)))
        owners += texts[-1:] * len(keys)
        held += [numbers.setdefault(key, len(numbers)) for key in keys]
    edges = np.array((owners, held), np.int64)
    graph = coo_array((np.ones(len(held)), edges), (len(numbers), len(numbers)))
    units = connected_components(graph)[1].tolist() if numbers else []
    names: dict[int, str] = {}
    for key, unit in zip(numbers, units):
        names[unit] = min(key, names.get(unit, key))
    return [names[units[text]] for text in texts]


def _order(name: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


# ---- units to parts ----


def _assign(
    documents: Sequence[SplitDocument], units: Sequence[str], seed: int, validation: float, test: float
) -> list[str]:
    """The part of every document, unit by unit, class by class, rarest class first."""
    totals = Counter(label for document in documents for label in document.labels)
    rarity = {label: (number, label) for label, number in totals.items()}
    sizes = Counter(units)
    held: dict[str, set[int]] = defaultdict(set)
    for unit, document in zip(units, documents):
        held[unit].update(document.labels)
    strata: dict[int, list[str]] = defaultdict(list)
    for unit in sizes:
        strata[min(held[unit], key=lambda label: rarity[label], default=-1)].append(unit)
    shares = np.array([1 - validation - test, validation, test])
    part_of: dict[str, str] = {}
    due, given = np.zeros(3), np.zeros(3)  # rows of all classes so far: what the parts should have, and have
    for label in sorted(strata):
        ordered = sorted(strata[label], key=lambda unit: _order(unit, seed))
        rows = np.array([sizes[unit] for unit in ordered], np.int64)
        due += rows.sum() * shares
        places = _cut(rows, shares, due - given, due)
        given += np.bincount(places, rows, 3)
        part_of.update((unit, PARTS[place]) for unit, place in zip(ordered, places))
    _let_train_see(totals, held, part_of, seed)
    return [part_of[unit] for unit in units]


def _cut(rows: Ints, shares: Floats, wanted: Floats, due: Floats) -> Ints:
    """Place in PARTS of every unit of a class, in their order.

    Args:
        rows: (U,) of each unit.
        shares: (3,) of train, validation and test.
        wanted: (3,) rows that would make up for the classes before.
        due: (3,) rows that all classes up to this one should have.
    """
    total, largest = int(rows.sum()), rows.max()
    ends = {1: _ends(rows[::-1], shares[1]), 2: _ends(rows, shares[2])}
    choices = []
    for (tested, last), (validated, first) in itertools.product(ends[2], ends[1]):
        got = np.array([total - tested - validated, validated, tested])
        # Above and below the share at either end: one of the four ways is always within a unit of the shares.
        if got[0] > 0 and abs(got[0] - shares[0] * total) <= largest + 1e-6:
            distance = round(float(np.square(got - wanted).sum()), 6)
            choices.append((distance, -got[0], tested, last, len(rows) - first))
    places = np.zeros(len(rows), np.int64)
    if choices:
        *_, last, first = min(choices)
        places[:last], places[first:] = 2, 1
    for part in (2, 1) if len(rows) >= _FLOOR_UNITS else ():
        if shares[part] > 0 and part not in places:
            _give_smallest(places, rows, part, wanted[part], _SPARE_SHARE * due[shares > 0].min())
    return places


def _ends(rows: Ints, share: float) -> list[tuple[int, int]]:
    """(rows, units) from the beginning on that are next to a share of all: below it and above it, or exactly it."""
    sums = np.append(0, np.cumsum(rows))
    aim = share * sums[-1]
    below = int(np.searchsorted(sums, aim + 1e-6, "right")) - 1
    exact = abs(sums[below] - aim) < 1e-6
    return [(int(sums[end]), end) for end in ((below,) if exact else (below, below + 1))]


def _give_smallest(places: Ints, rows: Ints, part: int, wanted: float, spare: float) -> None:
    """Give a part that got nothing of a class the smallest unit, unless that takes it far from its share.

    The rows to spare are the same for all parts, as those of one that has too many go to another.
    """
    for place in np.argsort(rows, kind="stable"):
        if (places == places[place]).sum() > 1:
            if rows[place] - wanted <= max(_SPARE_UNITS * rows[place], spare):
                places[place] = part
            return


def _let_train_see(classes: Iterable[int], held: dict[str, set[int]], part_of: dict[str, str], seed: int) -> None:
    """Give training a unit of every class; one that stands only in units of several classes may have none."""
    trained = {label for unit, part in part_of.items() if part == "train" for label in held[unit]}
    for label in sorted(set(classes) - trained):
        if label not in trained:
            unit = max((unit for unit in held if label in held[unit]), key=lambda unit: _order(unit, seed))
            part_of[unit] = "train"
            trained |= held[unit]
