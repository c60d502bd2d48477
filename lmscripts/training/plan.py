"""What a pretraining run is going to do: its phases, opened before the processes join, and the plan in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmscripts.counters import stream_key
from lmscripts.data.packing import Packing
from lmscripts.data.preparation import Source, prepare_beside
from lmscripts.data.steps import Phase, Phases, RowSource
from lmscripts.data.token_store import TokenStore, open_store
from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import find_tokenizer, load_encoder
from lmscripts.training.processes import nodes_of_processes, process_shares

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class PhaseSettings:
    """What one phase is asked to be.

    Attributes:
        store: its text.
        sequence_length: tokens per row.
        batch_size: rows of an optimizer step over all processes.
        micro_batch_size: most rows of one forward pass.
        steps: optimizer steps; None for as many as `epochs` passes over the rows take.
        epochs: passes over the rows.
        objective: settings of the objective.
    """

    store: TokenStore
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    steps: int | None
    epochs: float | None
    objective: Any


def open_stores(
    dataset_dirs: Sequence[str], tokenizer_dir: str | None, source: Source | None, run_dir: Path, num_workers: int
) -> dict[str, TokenStore]:
    """The stores by the name that was given; "" for the one that is made of text here, before the processes join.

    Args:
        dataset_dirs: token stores.
        tokenizer_dir: folder or Hub name of the tokenizer that must be the stores'; None for any.
        source: text instead of stores.
        run_dir: folder of the run, beside which a store is made.
        num_workers: processes that tokenise.

    Raises:
        UserError: a store or a text that cannot be used, or stores of different tokenizers.
    """
    if source is not None:
        return {"": prepare_beside(source, run_dir, num_workers)}
    wanted = load_encoder(find_tokenizer(tokenizer_dir)).fingerprint if tokenizer_dir else None
    stores = {name: open_store(Path(name), wanted) for name in dict.fromkeys(dataset_dirs)}
    if len({store.manifest["tokenizer"]["fingerprint"] for store in stores.values()}) > 1:
        raise UserError(f"the stores {' and '.join(map(str, stores))} were made with different tokenizers")
    return stores


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


def open_sources(
    phases: Sequence[PhaseSettings], objective: Any, tokenizer: Any, packing: Packing
) -> list[tuple[RowSource, RowSource | None]]:
    """Training rows and held-out rows of every phase.

    Called before the processes join, by all of them: the first of each machine builds an index that is missing and
    the others wait for it to appear, so that no collective operation is waiting meanwhile.

    Args:
        phases: what each phase is asked to be.
        objective: its module, see `lmscripts.objectives`.
        tokenizer: from transformers.
        packing: whether documents of a row see each other.

    Raises:
        UserError: the tokenizer lacks a special token, or a store has no training text.
    """
    opened = []
    for phase in phases:
        shape = (tokenizer, phase.sequence_length, packing, phase.objective)
        rows, held_out = (objective.rows(phase.store, part, *shape) for part in ("train", "validation"))
        if rows is None:
            raise UserError(f"{phase.store.folder} holds no training text")
        opened.append((rows, held_out))
    return opened


def open_phases(
    phases: Sequence[PhaseSettings],
    sources: Sequence[tuple[RowSource, RowSource | None]],
    objective: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    *,
    with_ends: bool,
    seed: int,
    most_eval_rows: int,
    node_rank: int | None,
    node_batch_sizes: Mapping[int, int] | None,
    weights: Sequence[int] | None,
) -> Phases:
    """What each process computes in every phase.

    Args:
        phases: what each phase is asked to be.
        sources: their rows, from `open_sources`.
        objective: its module.
        tokenizer: from transformers.
        accelerator: the running processes.
        with_ends: batches bring the ends of segments, for varlen attention.
        seed: decides order and masks.
        most_eval_rows: held-out rows to evaluate on, at most.
        node_rank: number of this machine; None takes the launcher's.
        node_batch_sizes: rows per node, of which the proportions are taken.
        weights: relative share of each process instead.

    Raises:
        UserError: shares or nodes do not match the processes.
    """
    nodes, made = nodes_of_processes(accelerator, node_rank), []
    for number, (phase, (rows, held_out)) in enumerate(zip(phases, sources, strict=True)):
        plan = objective.plan(tokenizer, rows.layout, phase.objective)
        total = phase.batch_size * phase.steps if phase.steps else round((phase.epochs or 0) * rows.num_rows)
        made.append(
            Phase(
                rows,
                held_out,
                make=partial(objective.batches, plan=plan, with_ends=with_ends),
                slots=objective.slots(plan, rows.layout),
                words=objective.words(plan, rows),
                seed=stream_key(seed, number) if number else seed,  # no phase repeats the order of another
                batch_size=phase.batch_size,
                total_rows=max(1, total),
                shares=process_shares(phase.batch_size, nodes, node_batch_sizes, weights),
                micro_batch_size=phase.micro_batch_size,
                most_eval_rows=most_eval_rows,
                pin_memory=accelerator.device.type == "cuda",
            )
        )
    return Phases(made)


def plan_text(
    data: Phases,
    rate: Callable[[int], float],
    accelerator: Accelerator,
    *,
    parameters: int,
    attention: str,
    schedule: str = "",
    corners: Sequence[int] = (),
) -> str:
    """The plan of a run in words: model, rows, steps, rates, processes, memory, disk.

    Args:
        data: of the run.
        rate: learning rate of a step, counted from 0.
        accelerator: the running processes.
        parameters: of all models.
        attention: how attention is computed.
        schedule: name of the schedule.
        corners: steps whose rates are shown besides those at the ends of phases, such as the end of the warmup.
    """
    several = len(data.phases) > 1
    lines, begin = [("model", f"{parameters:,} parameters")], 0
    for number, (phase, end) in enumerate(zip(data.phases, data.ends, strict=True)):
        lines += [("phase", f"{number + 1}: steps {begin + 1:,} to {end:,}")] if several else []
        lines += _phase_lines(phase)
        begin = end
    rates = rates_text(rate, data.num_steps, corners, [step for end in data.ends[:-1] for step in (end - 1, end)])
    processes = f"{accelerator.num_processes} on {accelerator.device.type}; precision {accelerator.mixed_precision}"
    lines += [
        ("rates", f"{schedule}: {rates}" if schedule else rates),
        ("processes", f"{processes}, attention {attention}"),
        ("memory", f"about {16 * parameters / 2**20:,.0f} MiB per process for weights, gradients and moments"),
        ("disk", f"about {12 * parameters / 2**20:,.0f} MiB a checkpoint"),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def rates_text(
    rate: Callable[[int], float], num_steps: int, corners: Sequence[int] = (), others: Sequence[int] = ()
) -> str:
    """The rates of some steps in words: the first, the middle, the last, corners of the schedule and others."""
    last = num_steps - 1
    marks = sorted({min(mark, last) for mark in (0, *corners, last // 2, last, *others)})
    rates = ", ".join(f"step {step + 1:,} {rate(step):.2e}" for step in marks)
    if corners and max(corners) > last:
        rates += f"; the warmup of {max(corners):,} steps is longer than the run"
    return rates


def _phase_lines(data: Phase) -> list[tuple[str, str]]:
    index, layout = data.train, data.layout
    positions = data.total_rows * layout.sequence_length
    epochs = data.total_rows / index.num_rows
    text = f"{index.real_tokens:,} tokens in {index.num_rows:,} rows of {layout.sequence_length}, "
    text += f"{index.fill():.2%} full, {layout.packing}; {data.num_eval_rows:,} rows held out"
    steps = f"{data.num_steps:,} of {data.batch_size} rows, {epochs:.2f} epochs of "
    steps += f"{index.num_rows / data.batch_size:,.1f} steps; {positions:,} positions, "
    return [
        ("text", text),
        ("objective", data.words),
        ("steps", f"{steps}{epochs * index.real_tokens:,.0f} tokens"),
        ("shares", f"rows of a step {data.shares} by process, at most {data.micro_batch_size} at once"),
    ]
