"""Phases of a run: stretches of steps with their own rows under one learning-rate schedule.

BERT was trained on rows of 128 tokens for nine tenths of its steps and on rows of 512 for the rest (arXiv:1810.04805,
appendix A.2). Every phase packs the same text anew, or has a store of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lmscripts.counters import stream_key
from lmscripts.data.pretraining import Batch, Counts, PretrainingData, RowSource, mlm_masking, open_family_rows
from lmscripts.data.token_store import TokenStore
from lmscripts.errors import UserError
from lmscripts.models import DECODERS
from lmscripts.objectives import CORRUPTION
from lmscripts.training.optim import lr_at
from lmscripts.training.processes import nodes_of_processes, process_shares

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.data.masking import Unit
    from lmscripts.data.packing import Packing
    from lmscripts.models.attention import AttentionPath

# Options that take one value, or one for each phase.
BY_PHASE = ("dataset_dir", "sequence_length", "mask_probability", "batch_size", "micro_batch_size")


@dataclass(frozen=True)
class Phase:
    """What one phase is asked to be; the names are those of the options.

    Attributes:
        store: its text.
        sequence_length: tokens per row.
        mask_probability: share of the tokens to predict.
        batch_size: rows of an optimizer step over all processes.
        micro_batch_size: most rows of one forward pass.
        steps: optimizer steps; None for as many as `epochs` passes over the rows take.
        epochs: passes over the rows.
    """

    store: TokenStore
    sequence_length: int
    mask_probability: float
    batch_size: int
    micro_batch_size: int
    steps: int | None
    epochs: float | None = None


def by_phase(values: Mapping[str, Sequence[Any]], num_phases: int) -> list[dict[str, Any]]:
    """The options of each phase.

    Args:
        values: option names and what was given: nothing, one value for all phases, or one for each.
        num_phases: number of phases.

    Raises:
        UserError: an option has another number of values.
    """
    for name, given in values.items():
        if len(given) not in (0, 1, num_phases):
            raise UserError(
                f"--{name} has {len(given)} values for {num_phases} phase{'s' * (num_phases > 1)} (--phase_steps): "
                "give one for all, or one for each"
            )
    spread = {name: given if len(given) == num_phases else [*given] * num_phases for name, given in values.items()}
    return [{name: given[number] for name, given in spread.items() if given} for number in range(num_phases)]


@dataclass(frozen=True)
class PhasedData:
    """The rows of a run as a function of the step, phase after phase.

    Attributes:
        phases: the rows of each phase, whose steps count from 0.
    """

    phases: Sequence[PretrainingData]

    @property
    def ends(self) -> list[int]:
        """The step after the last of each phase."""
        return list(accumulate(phase.num_steps for phase in self.phases))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.ends[-1]

    @property
    def longest(self) -> PretrainingData:
        """The phase with the longest rows, for which the model is built."""
        return max(self.phases, key=lambda phase: phase.layout.sequence_length)

    def of_step(self, step: int) -> PretrainingData:
        """The phase of a step; the last one for a step after the end."""
        return next((p for p, end in zip(self.phases, self.ends, strict=True) if step < end), self.phases[-1])

    def is_due(self, step: int, every: int | str) -> bool:
        """Whether what is done every so many steps, or at the end of every "epoch", is done after so many steps."""
        if step == 0 or not isinstance(every, str):
            return step == 0 or step % int(every) == 0
        phase, begin = self.of_step(step - 1), max((end for end in self.ends[:-1] if end < step), default=0)
        rows = [min(number * phase.batch_size, phase.total_rows) for number in (step - 1 - begin, step - begin)]
        before, after = (number // phase.train.num_rows for number in rows)
        return after > before

    def step_batches(self, first: int, stop: int, process: int) -> Iterator[tuple[list[Batch], Counts]]:
        """As `PretrainingData.step_batches`, for the steps [first, stop) of the run."""
        begin = 0
        for phase, end in zip(self.phases, self.ends, strict=True):
            if first < end and begin < stop:
                yield from phase.step_batches(max(first, begin) - begin, min(stop, end) - begin, process)
            begin = end


Opened = tuple[RowSource, RowSource | None]


def index_rows(phases: Sequence[Phase], tokenizer: Any, family: str, packing: Packing) -> list[Opened]:
    """Training rows and held-out rows of every phase.

    Called before the processes join, by all of them: the first of each machine builds an index that is missing and
    the others wait for it to appear, so that no collective operation is waiting meanwhile.

    Args:
        phases: what each phase is asked to be.
        tokenizer: from transformers.
        family: of the model.
        packing: whether documents of a row see each other.

    Raises:
        UserError: the tokenizer lacks a special token, or a store has no training text.
    """
    opened = []
    for phase in phases:
        shape = (family, tokenizer, phase.sequence_length, packing)
        rows, held_out = (open_family_rows(phase.store, part, *shape) for part in ("train", "validation"))
        if rows is None:
            raise UserError(f"{phase.store.folder} holds no training text")
        opened.append((rows, held_out))
    return opened


def open_phases(
    phases: Sequence[Phase],
    opened: Sequence[Opened],
    tokenizer: Any,
    family: str,
    accelerator: Accelerator,
    *,
    unit: Unit,
    attention: AttentionPath,
    seed: int,
    most_eval_rows: int,
    node_rank: int | None,
    node_batch_sizes: Mapping[int, int] | None,
    weights: Sequence[int] | None,
) -> PhasedData:
    """What each process computes in every phase.

    Args:
        phases: what each phase is asked to be.
        opened: their rows, from `index_rows`.
        tokenizer: from transformers.
        family: of the model; decides what is predicted.
        accelerator: the running processes.
        unit: what is masked as a whole.
        attention: the path of attention.
        seed: decides order and masks.
        most_eval_rows: held-out rows to evaluate on, at most.
        node_rank: number of this machine; None takes the launcher's.
        node_batch_sizes: rows per node, of which the proportions are taken.
        weights: relative share of each process instead.

    Raises:
        UserError: shares or nodes do not match the processes.
    """
    nodes, made = nodes_of_processes(accelerator, node_rank), []
    for number, (phase, (rows, held_out)) in enumerate(zip(phases, opened, strict=True)):
        steps, masking = phase.steps, None
        if family not in DECODERS:
            masking = mlm_masking(tokenizer, rows.layout, phase.mask_probability, unit, **CORRUPTION.get(family, {}))
        data = PretrainingData(
            rows,
            held_out,
            masking=masking,
            attention=attention,
            seed=stream_key(seed, number) if number else seed,  # no phase repeats the order of another
            batch_size=phase.batch_size,
            shares=process_shares(phase.batch_size, nodes, node_batch_sizes, weights),
            micro_batch_size=phase.micro_batch_size,
            total_rows=phase.batch_size * steps if steps else max(1, round((phase.epochs or 0) * rows.num_rows)),
            most_eval_rows=most_eval_rows,
            pin_memory=accelerator.device.type == "cuda",
        )
        made.append(data)
    return PhasedData(made)


def plan_text(data: PhasedData, schedule: dict[str, Any], accelerator: Accelerator, parameters: int) -> str:
    """The plan of a run in words: model, rows, steps, rates, processes, memory, disk."""
    attention, last, several = data.phases[0].attention, data.num_steps - 1, len(data.phases) > 1
    lines = [("model", f"{parameters:,} parameters")]
    begin = 0
    for number, (phase, end) in enumerate(zip(data.phases, data.ends, strict=True)):
        lines += [("phase", f"{number + 1}: steps {begin + 1:,} to {end:,}")] if several else []
        lines += _phase_lines(phase)
        begin = end
    marks = {0, schedule["warmup_steps"], last // 2, last, *(step for end in data.ends[:-1] for step in (end - 1, end))}
    corners = sorted({min(step, last) for step in marks})
    rates = ", ".join(f"step {step + 1:,} {lr_at(step, **schedule):.2e}" for step in corners)
    if schedule["warmup_steps"] > last:
        rates += f"; the warmup of {schedule['warmup_steps']:,} steps is longer than the run"
    processes = f"{accelerator.num_processes} on {accelerator.device.type}; precision {accelerator.mixed_precision}"
    lines += [
        ("rates", f"{schedule['schedule']}: {rates}"),
        ("processes", f"{processes}, attention {attention}"),
        ("memory", f"about {16 * parameters / 2**20:,.0f} MiB per process for weights, gradients and moments"),
        ("disk", f"about {12 * parameters / 2**20:,.0f} MiB a checkpoint"),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _phase_lines(data: PretrainingData) -> list[tuple[str, str]]:
    index, layout, masking = data.train, data.layout, data.masking
    positions = data.total_rows * layout.sequence_length
    epochs = data.total_rows / index.num_rows
    text = f"{index.real_tokens:,} tokens in {index.num_rows:,} rows of {layout.sequence_length}, "
    text += f"{index.fill():.2%} full, {layout.packing}; {data.num_eval_rows:,} rows held out"
    objective = "every token and the end of every document predicted from what stands before it"
    if masking is not None:
        unit = {"token": "single tokens", "word": "whole words", "span": "spans of words"}[masking.unit]
        objective = f"{masking.probability:.0%} of the tokens masked as {unit}, {masking.slots} slots a row"
    steps = f"{data.num_steps:,} of {data.batch_size} rows, {epochs:.2f} epochs of "
    steps += f"{index.num_rows / data.batch_size:,.1f} steps; {positions:,} positions, "
    return [
        ("text", text),
        ("objective", objective),
        ("steps", f"{steps}{epochs * index.real_tokens:,.0f} tokens"),
        ("shares", f"rows of a step {data.shares} by process, at most {data.micro_batch_size} at once"),
    ]
