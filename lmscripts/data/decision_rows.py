"""Decisions as batches: set, numbers, events and candidates of a record in one row of tokens; who computes which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmscripts.data.masking import expand_ranges
from lmscripts.data.steps import Batch, Counts, Ints, InWindows, Made, Prefetcher, step_batches

if TYPE_CHECKING:
    from lmscripts.data.decisions import DecisionPart
    from lmscripts.data.schema import Schema

_LOOKED_AT = 10_000  # records
_POSITIONS_AT_ONCE = 1 << 15  # made together, where batches are small


def make_batch(part: DecisionPart, rows: Ints, schema: Schema, with_value: bool) -> Batch:
    """Records of a part by number as one batch, filled up to the longest of them. B records, T positions.

    A record's tokens stand in the order of the schema's columns; at the end is the token that stands for the value,
    where that is asked for.

    Returns:
        input_ids (B, T) int64, numeric token i being `schema.num_ids` + i; values (B, T) float32, scaled, of numeric
        tokens; position_ids (B, T) int64, 1 + the place within its sequence, 0 elsewhere; attention_mask (B, T) int64;
        candidates (B, K) int64, places of the K candidates in the row, 0 where there is none; candidate_mask (B, K)
        bool; labels (B,) int64, which of the candidates was chosen; weights (B,) float32, ones. With the value also
        value_places (B,) int64 and outcome (B,) float32, scaled.
    """
    counts, number, batch = part.counts[rows].astype(np.int64), np.arange(len(rows)), {}
    lengths = counts.sum(1) + schema.num_numeric + with_value
    places = np.arange(lengths.max())
    mask = places < lengths[:, None]
    input_ids = np.where(mask, schema.value_id, schema.pad_id)
    values, position_ids = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.int64)
    stored = mask.copy()  # where ids of the records stand
    if with_value:
        stored[number, lengths - 1] = False
    numbers = part.numeric[rows] / np.array(schema.scales, np.float32)
    column, numeric, begin = 0, 0, np.zeros((len(rows), 1), np.int64)
    for field in schema.fields:
        if field.kind == "numeric":
            which = np.arange(numeric, numeric + field.max_length)
            at = (number[:, None], begin + which - numeric)
            input_ids[at], stored[at] = schema.num_ids + which, False
            values[at] = numbers[:, which]
            begin, numeric = begin + len(which), numeric + len(which)
        elif field.kind in ("set", "sequence", "candidates"):
            length = counts[:, column, None]
            if field.kind == "sequence":
                inside = places + 1 - begin
                position_ids += inside * ((inside > 0) & (inside <= length))
            elif field.kind == "candidates":
                batch["candidate_mask"] = np.arange(length.max()) < length
                batch["candidates"] = np.where(batch["candidate_mask"], begin + np.arange(length.max()), 0)
            begin, column = begin + length, column + 1
    input_ids[stored] = part.ids[expand_ranges(part.offsets[rows], counts.sum(1))]
    batch |= {"input_ids": input_ids, "values": values, "position_ids": position_ids}
    batch |= {"attention_mask": mask.astype(np.int64), "labels": part.labels[rows].astype(np.int64)}
    batch["weights"] = np.ones(len(rows), np.float32)
    if with_value and schema.value:
        outcome = part.extra[rows][:, schema.value.index] / schema.value.scale
        batch |= {"value_places": lengths - 1, "outcome": outcome.astype(np.float32)}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def made_batches(part: DecisionPart, rows: Ints, sizes: Sequence[int], schema: Schema, with_value: bool) -> Made:
    """Batches of so many rows each, with their counts: "choice" and "value" records, "tokens" that are no padding."""
    made: Made = []
    for mine in np.split(rows, np.cumsum(sizes)[:-1]):
        batch = make_batch(part, mine, schema, with_value)
        counts = {"choice": float(len(mine)), "tokens": float(batch["attention_mask"].sum())}
        made.append((batch, counts | ({"value": counts["choice"]} if with_value else {})))
    return made


class Steps:
    """Which process computes which records of a part in which step, see `lmscripts.data.steps`.

    Attributes:
        per_epoch: steps of an epoch.
        shares: records of each process in a full step.
        micro_batch_size: most records of one forward pass on one process.
        mean_candidates: candidates of a record, rounded, of the first records.
    """

    def __init__(
        self,
        part: DecisionPart,
        schema: Schema,
        with_value: bool,
        *,
        batch_size: int,
        micro_batch_size: int,
        shares: Sequence[int],
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            part: the records.
            schema: of the records.
            with_value: batches also have what the value head is to say.
            batch_size: records of a step.
            micro_batch_size: most records of one forward pass on one process.
            shares: records of each process in a full step.
            seed: of the order.
            pin_memory: put batches where a GPU can fetch them without blocking.
        """
        self._order = InWindows(part.num_records, part.lengths, batch_size, seed)
        self._part, self._schema, self._with_value, self._pin = part, schema, with_value, pin_memory
        self.micro_batch_size, self.shares = micro_batch_size, shares
        self.per_epoch = self._order.per_epoch
        column = [f.kind for f in schema.fields if f.kind in ("set", "sequence", "candidates")].index("candidates")
        self.mean_candidates = round(float(part.counts[:_LOOKED_AT, column].mean()))

    def records(self, step: int) -> int:
        """Records that were trained on in so many steps."""
        return self._order.bounds(step - 1)[1] if step else 0

    def is_due(self, step: int, every: int) -> bool:
        """Whether a snapshot is due after so many steps: at the end of an epoch, and every so many records; 0: never.

        A step that goes beyond a multiple of `every` is the one.
        """
        passed = every and self.records(step) // every > self.records(step - 1) // every
        return step > 0 and (step % self.per_epoch == 0 or bool(passed))

    def snapshot(self, step: int, digits: int) -> str:
        """Name of the snapshot after so many steps: EE at the end of epoch EE, EE.RECORDS after EE whole epochs.

        It is a checkpoint's in a run's folder, see `lmscripts.models.finding.checkpoint_place`.
        """
        epochs, inside = divmod(step, self.per_epoch)
        return f"snapshots/{epochs:0{digits}}" + (f".{self.records(step)}" if inside else "")

    def step_batches(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Iterator[tuple[list[Batch], Counts]]:
        """Micro-batches of one process for the steps [first, stop), with their counts.

        The rows are divided as the shares say, which need not sum to anything; without, as the steps' own.
        """
        longest = self.micro_batch_size * self._schema.max_positions
        return step_batches(
            self._order,
            self._make,
            shares=shares or self.shares,
            process=process,
            micro_batch_size=self.micro_batch_size,
            first=first,
            stop=stop,
            at_once=max(1, _POSITIONS_AT_ONCE // longest),
        )

    def prefetch(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Prefetcher[tuple[list[Batch], Counts]]:
        """As `step_batches`, made in the background, a few steps ahead."""
        return Prefetcher(self.step_batches(first, stop, process, shares))

    def _make(self, rows: Ints, epochs: Ints, sizes: list[int]) -> Made:
        made = made_batches(self._part, rows, sizes, self._schema, self._with_value)
        if not self._pin:
            return made
        return [({name: tensor.pin_memory() for name, tensor in batch.items()}, counts) for batch, counts in made]
