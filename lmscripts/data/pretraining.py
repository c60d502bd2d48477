"""The data side of a pretraining run: which rows each process computes in each step, and the fixed held-out rows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from lmscripts.counters import rows_at, stream_key
from lmscripts.data.loader import pin
from lmscripts.data.masking import MaskingPlan, Unit, expand_ranges, prediction_slots
from lmscripts.data.packing import Layout, PackedRows, Packing, row_index
from lmscripts.data.stream import StreamRows
from lmscripts.data.token_store import TokenStore
from lmscripts.errors import UserError
from lmscripts.models import DECODERS
from lmscripts.models.attention import AttentionPath, segment_ends
from lmscripts.objectives import masked_batches
from lmscripts.objectives.causal import boundary_ids, causal_batches
from lmscripts.tokenizer.encoder import UNUSED
from lmscripts.tokenizer.folder import read_record
from lmscripts.training.processes import micro_batches

Batch = dict[str, Tensor]
Counts = dict[str, float]
RowSource = PackedRows | StreamRows
_TOKENS_AT_ONCE = 1 << 17  # tokens laid out and masked together
_EVAL_SEED = 0x5EED  # held-out masks are the same for every run, whatever its seed


@dataclass(frozen=True)
class PretrainingData:
    """Rows of a run as a function of the step.

    Attributes:
        train: rows of the training part. held_out: those of the validation part, if it has any.
        masking: what is masked; None for a causal model.
        attention: the path, which decides what a batch must bring.
        seed: decides order and masks.
        batch_size: rows of an optimizer step over all processes.
        shares: rows of each process in a full step.
        micro_batch_size: most rows of one forward pass.
        total_rows: rows of the whole schedule; the last step may be smaller than the others.
        most_eval_rows: held-out rows to evaluate on, at most.
        pin_memory: put batches where a GPU can fetch them without blocking.
    """

    train: RowSource
    held_out: RowSource | None
    masking: MaskingPlan | None
    attention: AttentionPath
    seed: int
    batch_size: int
    shares: list[int]
    micro_batch_size: int
    total_rows: int
    most_eval_rows: int
    pin_memory: bool = False

    @property
    def layout(self) -> Layout:
        """How documents lie in rows."""
        return self.train.layout

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return -(-self.total_rows // self.batch_size)

    @property
    def positions(self) -> int:
        """Positions of a full optimizer step over all processes."""
        return self.batch_size * self.layout.sequence_length

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and prediction slots of a row."""
        length = self.layout.sequence_length
        return length, self.masking.slots if self.masking else length

    @property
    def num_eval_rows(self) -> int:
        """Held-out rows to evaluate on; 0 without a validation part."""
        return 0 if self.held_out is None else min(self.most_eval_rows, self.held_out.num_rows)

    def step_batches(self, first: int, stop: int, process: int) -> Iterator[tuple[list[Batch], Counts]]:
        """Micro-batches of one process for the steps [first, stop), with the counts of their targets.

        A process without rows in a step gets one row of weight 0, so that the collective operations stay aligned.
        """
        pieces = self._pieces(first, stop, process)
        for _, group in groupby(self._batches(pieces), key=lambda piece: piece[0]):
            made = [(batch, counts) for _, batch, counts in group]
            counts = {name: sum(c[name] for _, c in made) for name in made[0][1]}
            yield [batch for batch, _ in made], counts

    def _pieces(self, first: int, stop: int, process: int) -> Iterator[tuple[int, int, int]]:
        """Micro-batches as (step, position of the first row, rows); no rows for an idle process."""
        before = sum(self.shares[:process])
        for step in range(first, stop):
            begin = step * self.batch_size
            left = max(0, min(self.batch_size, self.total_rows - begin) - before)
            position = begin + before
            for size in micro_batches(min(self.shares[process], left), self.micro_batch_size) or [0]:
                yield step, position, size
                position += size

    def _batches(self, pieces: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, Batch, Counts]]:
        """The batches of the pieces. Many are laid out and masked at once, which is several times faster."""
        at_once = max(1, _TOKENS_AT_ONCE // (self.layout.sequence_length * self.micro_batch_size))
        while chunk := list(islice(pieces, at_once)):
            sizes = [max(1, size) for _, _, size in chunk]
            starts = np.array([position for _, position, _ in chunk])
            positions = expand_ranges(starts, np.array(sizes))
            rows, epochs = rows_at(positions, self.train.num_rows, self.seed)
            made = self._made(self.train, rows, epochs, self.seed, sizes)
            for (step, _, size), (batch, counts) in zip(chunk, made, strict=True):
                if size == 0:
                    for name in batch.keys() & {"weights", "row_weights"}:
                        batch[name].zero_()
                yield step, batch, (counts if size else dict.fromkeys(counts, 0.0))

    def eval_batch(self, rows: NDArray[np.int64]) -> tuple[Batch, Counts]:
        """Held-out rows by number, with masks that never change."""
        assert self.held_out is not None
        return self._made(self.held_out, rows, np.zeros_like(rows), _EVAL_SEED, [rows.size])[0]

    def _made(
        self,
        source: RowSource,
        rows: NDArray[np.int64],
        epochs: NDArray[np.int64],
        seed: int,
        sizes: list[int],
    ) -> list[tuple[Batch, Counts]]:
        laid_out = source.read(rows)
        if self.masking is not None:
            made = masked_batches(laid_out, rows, epochs, stream_key(seed, 0x3A5C), self.masking, sizes)
        else:
            made = causal_batches(laid_out, sizes)
        if isinstance(source, StreamRows):
            for _, counts in made:
                counts["bytes"] = counts["clm"] * source.bytes_per_target
        if self.attention == "varlen":
            begin = 0
            for (batch, _), size in zip(made, sizes, strict=True):
                segments = from_numpy(laid_out.segments[begin : begin + size])
                batch["segment_ends"] = segment_ends(segments, size * source.most_segments + 1)
                begin += size
        return [(pin(batch), counts) for batch, counts in made] if self.pin_memory else made


def special_ids(tokenizer: Any, needed: tuple[str, ...] = ("pad", "cls", "sep", "mask")) -> dict[str, int]:
    """Ids of the special tokens that an objective needs.

    Raises:
        UserError: the tokenizer lacks one.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in needed}
    if missing := [name for name, number in ids.items() if number is None]:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no {missing[0]} token, which this objective needs")
    return ids


def check_tokenizer(tokenizer: Any, **wanted: str | None) -> None:
    """Compare options that describe the tokenizer with the tokenizer there is.

    Args:
        tokenizer: from transformers.
        wanted: tokenizer_type and mecab_dic as the user gave them; None is not checked.

    Raises:
        UserError: they differ.
    """
    settings = tokenizer.init_kwargs
    kind = (read_record(Path(tokenizer.name_or_path)) or {}).get("tokenizer_type")  # of a tokenizer of ours
    kind = kind or settings.get("subword_tokenizer_type")
    if kind is None and tokenizer.is_fast:
        kind = type(tokenizer.backend_tokenizer.model).__name__.lower()
    found = {"tokenizer_type": "unigram" if kind == "sentencepiece" else kind}
    found["mecab_dic"] = (settings.get("mecab_kwargs") or {}).get("mecab_dic")
    for name, value in wanted.items():
        if value is not None and value != found[name]:
            raise UserError(f"--{name} is {value}, but the tokenizer says {found[name]}")


def replacement_ids(tokenizer: Any) -> NDArray[np.int32]:
    """Ids that a masked token may be replaced by: the vocabulary without special and reserved tokens."""
    special = set(tokenizer.all_special_ids)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ids = sorted(i for token, i in vocabulary.items() if i not in special and not UNUSED.fullmatch(token))
    return np.array(ids, np.int32)


def open_rows(store: TokenStore, part_name: str, layout: Layout) -> PackedRows | None:
    """Rows of one part of a store by their index, which is built on first use; None when the part is empty.

    The index is kept in `rows/` inside the store or, where the store may not be written, among the temporary files.
    """
    part = store.part(part_name)
    if part.tokens.size == 0:
        return None
    cache_dir = store.folder / "rows"
    if not os.access(store.folder, os.W_OK):
        cache_dir = Path(tempfile.gettempdir()) / f"lmscripts_rows_{store.fingerprint[:16]}"
    return PackedRows(part, row_index(part, store.fingerprint, layout, cache_dir), layout)


def open_stream(store: TokenStore, part_name: str, layout: Layout) -> StreamRows | None:
    """One part of a store as a stream for a causal model; None when the part is empty."""
    part = store.part(part_name)
    if part.tokens.size == 0:
        return None
    return StreamRows(part, layout, int(store.manifest["parts"][part_name]["text_bytes"]))


def open_family_rows(
    store: TokenStore, part_name: str, family: str, tokenizer: Any, sequence_length: int, packing: Packing
) -> RowSource | None:
    """Rows of one part of a store as the models of a family read them; None when the part is empty.

    Raises:
        UserError: the tokenizer lacks a special token that the family needs.
    """
    if family in DECODERS:
        begin, end = boundary_ids(tokenizer)
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return open_stream(store, part_name, Layout(sequence_length, packing, begin, end, pad))
    return open_rows(store, part_name, mlm_layout(tokenizer, sequence_length, packing))


def mlm_layout(tokenizer: Any, sequence_length: int, packing: Packing) -> Layout:
    """Rows of [CLS] text [SEP].

    Raises:
        UserError: the tokenizer lacks a special token.
    """
    ids = special_ids(tokenizer)
    return Layout(sequence_length, packing, begin_id=ids["cls"], end_id=ids["sep"], pad_id=ids["pad"])


def mlm_masking(tokenizer: Any, layout: Layout, probability: float, unit: Unit, **corruption: Any) -> MaskingPlan:
    """A corruption with a fixed number of slots per row.

    Args:
        tokenizer: from transformers.
        layout: of the rows.
        probability: share of the text tokens to predict.
        unit: what is masked as a whole.
        corruption: other fields of the plan, see `lmscripts.objectives.CORRUPTION`.

    Raises:
        UserError: the probability is not in (0, 1).
    """
    if not 0 < probability < 1:
        raise UserError(f"--mask_probability must lie between 0 and 1, got {probability}")
    slots = prediction_slots(probability, layout.most_real_tokens)
    return MaskingPlan(probability, slots, tokenizer.mask_token_id, replacement_ids(tokenizer), unit, **corruption)
