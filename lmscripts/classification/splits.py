"""Train, validation and test parts of a table, by document, so that nothing of a test document is seen in training.

Documents of one group, and documents with the same text (after NFKC, white space aside), are one unit, and a unit is
never taken apart. Units are put in the order of a hash of the seed and their name, class by class; the first of them
are for testing, the last for validation, and those between for training. Hence

- the same table, seed and shares always give the same parts, whatever the order of the rows;
- a part's rows of a class differ from its share by at most the rows of the largest unit of the class (half of it at
  each end, and one unit where the share of a part would be none), if the units hold one class each;
- rows that are added move only what stands near the ends, not everything.

A document with several labels, and a unit with several classes, counts for its rarest class. Every class has rows for
training.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmscripts.classification.tables import PARTS
from lmscripts.errors import UserError

_FLOOR_UNITS = 4  # classes of that many units are in every part


@dataclass(frozen=True)
class SplitSettings:
    """How documents are given to parts.

    Attributes:
        method: "stratified", or "given" for what the table or its files say.
        seed: another seed gives other parts.
        train, validation, test: shares; they are divided by their sum, which must be 1 (or 100) but for rounding. With
            "given" only `validation` matters: where no document is given for validation, that share of the documents
            for training is taken.
        use_groups: whether documents of one group stay together.
    """

    method: Literal["stratified", "given"] = "stratified"
    seed: int = 1
    train: float = 0.8
    validation: float = 0.1
    test: float = 0.1
    use_groups: bool = True

    def shares(self) -> tuple[float, float, float]:
        """Shares of train, validation and test that sum to 1.

        Raises:
            UserError: a share below 0, none for training, or a sum that is neither 1 nor 100.
        """
        given = (self.train, self.validation, self.test)
        total = sum(given)
        shown = f"train {self.train}, validation {self.validation}, test {self.test}"
        if not all(math.isfinite(share) and share >= 0 for share in given) or self.train <= 0:
            raise UserError(f"the shares of a split must be 0 or more, and more than 0 for training, not {shown}")
        if not (0.99 <= total <= 1.01 or 99 <= total <= 101):
            raise UserError(f"the shares of a split must sum to 1: {shown} sum to {total:g}")
        return self.train / total, self.validation / total, self.test / total


@dataclass(frozen=True, slots=True)
class SplitDocument:
    """What a split needs to know of a document: labels, the hash of its text, its group, and a part it was given."""

    labels: tuple[int, ...]
    text_hash: bytes
    group: str | None = None
    given_part: str | None = None


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that are equal after NFKC and with any white space taken for one space."""
    normal = " ".join(unicodedata.normalize("NFKC", text).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def split_documents(documents: Sequence[SplitDocument], settings: SplitSettings) -> list[str]:
    """The part of every document: "train", "validation" or "test".

    Raises:
        UserError: shares that make no sense, a part that was asked for and gets nothing, no part for a document where
            the table was to give it, or a class without a row for training.
    """
    train, validation, test = settings.shares()
    if settings.method == "given":
        return _given(documents, settings)
    units = _units(documents, settings.use_groups)
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
    counts = Counter((part, label) for document, part in zip(documents, parts) for label in document.labels)
    totals = Counter(label for document in documents for label in document.labels)
    lines = []
    for part in PARTS:
        shares = ", ".join(
            f"{name} {counts[part, label]:,} ({counts[part, label] / max(totals[label], 1):.1%})"
            for label, name in enumerate(labels[:20])
        )
        more = f", and {len(labels) - 20:,} more labels" if len(labels) > 20 else ""
        lines.append(f"{part}: {sizes[part]:,} documents ({sizes[part] / max(len(parts), 1):.1%}): {shares}{more}")
        if sizes[part] and (absent := [name for label, name in enumerate(labels) if not counts[part, label]]):
            lines.append(f"{part} has no row of {', '.join(map(repr, absent[:10]))}; too few rows or groups")
    seen: dict[bytes, set[str]] = defaultdict(set)
    classes: dict[bytes, set[tuple[int, ...]]] = defaultdict(set)
    groups: dict[str, set[str]] = defaultdict(set)
    for document, part in zip(documents, parts):
        seen[document.text_hash].add(part)
        classes[document.text_hash].add(document.labels)
        if document.group is not None:
            groups[document.group].add(part)
    for found, what in (
        (sum(len(each) > 1 for each in seen.values()), "texts stand in more than one part"),
        (sum(len(each) > 1 for each in groups.values()), "groups stand in more than one part"),
        (sum(len(each) > 1 for each in classes.values()), "texts occur with different labels"),
    ):
        if found:
            lines.append(f"beware: {found:,} {what}")
    return lines


def _given(documents: Sequence[SplitDocument], settings: SplitSettings) -> list[str]:
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
        units = _units(chosen, settings.use_groups)
        for place, part in zip(places, _assign(chosen, units, settings.seed, validation, 0.0)):
            parts[place] = part
    classes = {label for document in documents for label in document.labels}
    trained = {label for document, part in zip(documents, parts) if part == "train" for label in document.labels}
    if classes - trained or not trained:
        raise UserError(
            f"the given parts leave {len(classes - trained)} of {len(classes)} labels without a row for training "
            f"({parts.count('train'):,} documents are for training)"
        )
    return parts


# ---- units ----


def _units(documents: Sequence[SplitDocument], use_groups: bool) -> list[str]:
    """A name for each document's unit: documents that share a group or a text, directly or by others, share it.

    The name is the smallest group of the unit, or the hash of its text, so that further rows hardly ever change it.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        root = name
        while leader[root] != root:
            root = leader[root]
        while leader[name] != root:
            leader[name], name = root, leader[name]
        return root

    names = []
    for document in documents:
        text = f"text {document.text_hash.hex()}"
        leader.setdefault(text, text)
        if use_groups and document.group is not None:
            group = f"group {document.group}"  # sorts before "text", and so names the unit
            leader.setdefault(group, group)
            low, high = sorted((find(group), find(text)))
            leader[high] = low
        names.append(text)
    return [find(name) for name in names]


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
    part_of: dict[str, str] = {}
    for stratum in strata.values():
        ordered = sorted(stratum, key=lambda unit: _order(unit, seed))
        rows = np.array([sizes[unit] for unit in ordered], np.int64)
        part_of.update(zip(ordered, _cut(rows, validation, test)))
    _let_train_see(totals, held, part_of, seed)
    return [part_of[unit] for unit in units]


def _cut(rows: NDArray[np.int64], validation: float, test: float) -> list[str]:
    """Parts of units in their order: a unit goes where its middle lies; every part gets one of four units or more."""
    middles = (np.cumsum(rows) - rows / 2) / rows.sum()
    # A middle that lies on the border, as far as floats tell, is for training.
    parts = np.where(middles < test - 1e-9, "test", np.where(middles > 1 - validation + 1e-9, "validation", "train"))
    if len(rows) >= _FLOOR_UNITS:
        smallest = np.argsort(rows, kind="stable")
        for part, share in (("test", test), ("validation", validation), ("train", 1 - test - validation)):
            if share > 0 and part not in parts:
                spare = (place for place in smallest if (parts == parts[place]).sum() > 1)
                parts[next(spare)] = part
    if "train" not in parts:
        parts[np.argmax(rows)] = "train"
    return [str(part) for part in parts]


def _let_train_see(classes: Iterable[int], held: dict[str, set[int]], part_of: dict[str, str], seed: int) -> None:
    """Give training a unit of every class; one that stands only in units of several classes may have none."""
    trained = {label for unit, part in part_of.items() if part == "train" for label in held[unit]}
    for label in sorted(set(classes) - trained):
        if label not in trained:
            unit = max((unit for unit in held if label in held[unit]), key=lambda unit: _order(unit, seed))
            part_of[unit] = "train"
            trained |= held[unit]
