"""The decision store: annotated decisions on disk, memory-mapped; and the parser that makes them of lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.data.schema import Schema


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
        games: (R,) uint64, hash of the id field.
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
        return self.offsets[rows + 1] - self.offsets[rows] + self.numeric.shape[1]


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
        raise NotImplementedError

    def sentences(self) -> list[str]:
        """What a user should know of its parts."""
        raise NotImplementedError


def parse(lines: Sequence[bytes], schema: Schema) -> tuple[DecisionPart, list[tuple[int, str]]]:
    """Records of lines of text, without their line ends; and for each line that is none: its index and what is wrong."""
    raise NotImplementedError


def open_decisions(folder: Path) -> DecisionStore:
    """Open a store and check that it is whole."""
    raise NotImplementedError
