"""What a pretraining run is going to do: its phases, opened before the processes join, and the plan in words.

A decay branch takes from the run that it leaves what is not said anew.
Heavy modules are imported where they are used: scripts ask `branch_options` while they read their options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmscripts.errors import UserError
from lmscripts.options.checks import duration_text
from lmscripts.options.yaml_text import shown

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.data.packing import Packing
    from lmscripts.data.steps import Phase, Phases, RowSource
    from lmscripts.data.token_store import TokenStore
    from lmscripts.objectives.module import Objective
    from lmscripts.training.state import TrainingState

# Of a run's config.yaml, what belongs to that job and its machines and not to what comes after it.
_ITS_OWN = {
    *("model_dir", "do_continue", "dry_run", "decay_from", "start_from", "carry_over", "stop_at_step", "max_time"),
    *("node_rank", "expected_processes", "process_shares", "balance"),
}
# Where one of the first is given, the others are not taken either: they say the same in another way, or more of it.
_TOGETHER: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("dataset_dir", "input_file"), ("validation_fraction", "validation_file", "num_workers")),
    (("precision", "fp16_type"), ()),
    (("micro_batch_size", "micro_batch_tokens"), ()),
)
_ROWS_AT_ONCE = 32
_PRETRAINED = [f"pretrained_{half}model_name_or_path" for half in ("", "generator_", "discriminator_")]
# Of the settings in a checkpoint, what is no option, or none of the family's: config.yaml has it as it was given.
_LENGTHS = ("max_steps", "epochs")
_NOT_TAKEN = ("format", "token store", "phase_steps", "mask_unit", "mask_probability")


@dataclass(frozen=True)
class PhaseSettings:
    """What one phase is asked to be.

    Attributes:
        store: its text.
        sequence_length: tokens per row.
        batch_size: rows of an optimizer step over all processes.
        micro_batch_size: most rows of one forward pass; None where nobody said: as many as fit on a GPU, else 32.
        steps: optimizer steps; None for as many as `epochs` passes over the rows take.
        epochs: passes over the rows.
        objective: settings of the objective.
        ramp: rows of the first steps, see `lmscripts.data.steps.rows_before`.
    """

    store: TokenStore
    sequence_length: int
    batch_size: int
    micro_batch_size: int | None
    steps: int | None
    epochs: float | None
    objective: Any
    ramp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.ramp and self.ramp[0] > self.batch_size:
            raise UserError(f"--batch_ramp begins with {self.ramp[0]} rows, more than --batch_size {self.batch_size}")

    def as_asked(self, can_try: bool) -> dict[str, Any]:
        """What a phase has as it was asked for; rows of a pass are tried where that needs no other process."""
        given = self.micro_batch_size
        at_once = {"micro_batch_size": given or _ROWS_AT_ONCE, "is_tried": can_try and given is None}
        return at_once | {"batch_size": self.batch_size, "whole": self.store.whole, "ramp": self.ramp}

    def total_rows(self, num_rows: int) -> int:
        """Rows of the phase, where the text has so many."""
        from lmscripts.data.steps import rows_before

        if self.steps:
            return rows_before(self.steps, self.batch_size, self.ramp)
        return max(1, round((self.epochs or 0) * num_rows * self.store.whole))


def open_stores(
    dataset_dirs: Sequence[str],
    tokenizer_dir: str | None,
    run_dir: Path,
    *,
    input_files: tuple[str, ...] = (),
    num_workers: int = 2,
    sample: bool = False,
    **held_out: Any,
) -> dict[str, TokenStore]:
    """The stores by the name that was given; "" for the one that is made of text here, before the processes join.

    Args:
        dataset_dirs: token stores.
        tokenizer_dir: folder or Hub name of the tokenizer; it must be the stores', None for any.
        run_dir: folder of the run, beside which a store is made.
        input_files: text instead of stores.
        num_workers: processes that tokenise it.
        sample: look at a sample of the text only.
        held_out: what of it is held out, by fields of `lmscripts.data.preparation.Source`.

    Raises:
        UserError: a store or a text that cannot be used, or stores of different tokenizers.
    """
    from lmscripts.data.preparation import Source, prepare_beside, prepare_sample
    from lmscripts.data.token_store import open_store
    from lmscripts.tokenizer.encoder import find_tokenizer, load_encoder

    if input_files:
        source = Source(input_files, find_tokenizer(str(tokenizer_dir)), **held_out)
        return {"": prepare_sample(source) if sample else prepare_beside(source, run_dir, num_workers)}
    wanted = load_encoder(find_tokenizer(tokenizer_dir)).fingerprint if tokenizer_dir else None
    stores = {name: open_store(Path(name), wanted) for name in dict.fromkeys(dataset_dirs)}
    if len({store.manifest["tokenizer"]["fingerprint"] for store in stores.values()}) > 1:
        raise UserError(f"the stores {' and '.join(map(str, stores))} were made with different tokenizers")
    return stores


def check_unknown(phases: Sequence[PhaseSettings], most: float) -> None:
    """Refuse text of which the tokenizer knows too little: the unknown token alone gives a low loss then."""
    for phase in phases:
        if (share := phase.store.unknown_share() or 0.0) > most:
            raise UserError(
                f"{share:.1%} of the characters of {phase.store.folder} are unknown to its tokenizer, more than "
                f"--max_unknown_share {most}: make a tokenizer of this text with train_tokenizer.py and a store with "
                f"it, or give --max_unknown_share 1 to train on it all the same"
            )


def lengths_of_run(run_dir: Path) -> tuple[int, ...]:
    """Tokens of a row in each phase of a run, from its newest whole checkpoint; empty if it has none."""
    from lmscripts.models.finding import look_for_whole, read_state
    from lmscripts.training import handing

    own = look_for_whole(handing.run_folder(run_dir, True))[0]
    lengths = None if own is None else read_state(own, "fixed")["fixed"].get("sequence_length")
    return tuple(lengths) if isinstance(lengths, list) else ()


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
    phases: Sequence[PhaseSettings], objective: Any, packing: Packing, **wanted: str | None
) -> tuple[Any, list[tuple[RowSource, RowSource | None]]]:
    """The tokenizer of the text, and training rows and held-out rows of every phase.

    Called before the processes join, by all of them: the first of each machine builds an index that is missing and
    the others wait for it to appear, so that no collective operation is waiting meanwhile.

    Args:
        phases: what each phase is asked to be.
        objective: its module, see `lmscripts.objectives`.
        packing: whether documents of a row see each other.
        wanted: what the tokenizer has to be, see `lmscripts.tokenizer.folder.check_tokenizer`.

    Raises:
        UserError: the tokenizer is another or lacks a special token, or a store is damaged or has no training text.
    """
    from lmscripts.data.token_store import check_store
    from lmscripts.tokenizer.folder import check_tokenizer

    for store in {phase.store.folder: phase.store for phase in phases}.values():
        check_store(store)
    tokenizer = phases[0].store.load_tokenizer()
    check_tokenizer(tokenizer, **wanted)
    opened = []
    for phase in phases:
        shape = (tokenizer, phase.sequence_length, packing, phase.objective)
        rows, held_out = (objective.rows(phase.store, part, *shape) for part in ("train", "validation"))
        if rows is None:
            raise UserError(f"{phase.store.folder} holds no training text")
        opened.append((rows, held_out))
    return tokenizer, opened


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
    aligned: bool = False,
    same_keys: bool = False,
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
        aligned: all processes make the same number of forward passes.
        same_keys: see `lmscripts.data.steps.Phase`.

    Raises:
        UserError: shares or nodes do not match the processes.
    """
    from lmscripts.counters import stream_key
    from lmscripts.data.steps import Phase, Phases
    from lmscripts.training.processes import nodes_of_processes, process_shares

    nodes, made = nodes_of_processes(accelerator, node_rank), []
    for number, (phase, (rows, held_out)) in enumerate(zip(phases, sources, strict=True)):
        plan = objective.plan(tokenizer, rows.layout, phase.objective)
        one = Phase(
            rows,
            held_out,
            make=partial(objective.batches, plan=plan, with_ends=with_ends),
            slots=objective.slots(plan, rows.layout),
            words=objective.words(plan, rows),
            seed=stream_key(seed, number) if number else seed,  # no phase repeats the order of another
            total_rows=phase.total_rows(rows.num_rows),
            shares=process_shares(phase.batch_size, nodes, node_batch_sizes, weights),
            **phase.as_asked(can_try=accelerator.device.type == "cuda" and not aligned),
            most_eval_rows=most_eval_rows,
            pin_memory=accelerator.device.type == "cuda",
            aligned=aligned,
            same_keys=same_keys,
        )
        made.append(one)
    return Phases(made)


def fit_rows(
    accelerator: Accelerator, data: Phases, objective: Objective, state: TrainingState
) -> tuple[Phases, list[str]]:
    """As many rows at once as fit, see `lmscripts.training.passes.fit`."""
    from lmscripts.training.passes import fit

    return fit(accelerator, data, objective, state)


def plan_text(
    data: Phases,
    rate: Callable[[int], float],
    accelerator: Accelerator,
    *,
    objective: Objective,
    attention: str,
    dropout: str = "",
    average: bool = False,
    sharded: bool = False,
    schedule: str = "",
    corners: Sequence[int] = (),
    often: Mapping[str, Any] | None = None,
    unknown: Sequence[float | None] = (),
) -> str:
    """The plan of a run in words: model, rows, steps, rates, processes, memory, disk.

    Args:
        data: of the run.
        rate: learning rate of a step, counted from 0.
        accelerator: the running processes.
        objective: what is trained.
        attention: how attention is computed.
        average: an average of the weights is kept.
        sharded: weights, gradients, moments and average are divided among the processes.
        dropout: of hidden states and attention weights, and who says so.
        schedule: name of the schedule.
        corners: steps whose rates are shown besides those at the ends of phases, such as the end of the warmup.
        often: logging_steps, eval_every, save_steps, keep_last and keep_every, by name; the last two decide which
            checkpoints stay.
        unknown: share of the characters of each phase's text that the tokenizer does not know; None: not counted.
    """
    from lmscripts.training.optim import rates_text
    from lmscripts.training.processes import guessed_time, in_words

    parameters = sum(p.numel() for p in objective.parameters())
    several = len(data.phases) > 1
    lines, begin = [("model", f"{parameters:,} parameters")], 0
    for number, (phase, end) in enumerate(zip(data.phases, data.ends, strict=True)):
        lines += [("phase", f"{number + 1}: steps {begin + 1:,} to {end:,}")] if several else []
        lines += _phase_lines(phase)
        if (share := dict(enumerate(unknown)).get(number)) is not None:
            warning = "; warning: the model learns to write the unknown token for them" if share > 0.01 else ""
            lines.append(("unknown", f"{share:.2%} of the characters of the text{warning}"))
        begin = end
    rates = rates_text(rate, data.num_steps, corners, [step for end in data.ends[:-1] for step in (end - 1, end)])
    seconds, words = guessed_time(
        _operations(data, objective, accelerator.process_index), accelerator, "fewer --max_steps"
    )
    lines += [
        ("time", words),
        *([("often", _often(data, often, seconds / data.num_steps))] if often else []),
        ("rates", f"{schedule}: {rates}" if schedule else rates),
        ("processes", f"{in_words(accelerator)}, attention {attention}{', weights divided (FSDP2)' * sharded}"),
        *([("dropout", dropout)] if dropout else []),
        ("memory", _memory_text(data, objective, accelerator, parameters, average, sharded)),
        ("disk", _disk(12 * parameters / 2**20, data, often or {})),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _operations(data: Phases, objective: Objective, process: int) -> float:
    """Floating-point operations of a process in the whole run."""
    return sum(
        objective.flops_per_position(length, phase.slots) * length * phase.total_rows * share / phase.batch_size
        for phase in data.phases
        for length, share in [(phase.layout.sequence_length, phase.shares[process])]
    )


def _often(data: Phases, often: Mapping[str, Any], seconds: float) -> str:
    """How often something is heard of a run whose steps take so many seconds."""

    def every(steps: int | str) -> str:
        if isinstance(steps, str):
            return f"after every {steps}"
        if steps >= data.num_steps:
            return "at the end"
        return f"every {steps:,} step{'s' * (steps > 1)} (about {duration_text(steps * seconds)})"

    heard = {"logging_steps": "a line", "eval_every": "held-out rows are judged", "save_steps": "a checkpoint"}
    if not any(phase.num_eval_rows for phase in data.phases):
        del heard["eval_every"]
    return "; ".join(f"{what} {every(often[name])}" for name, what in heard.items() if often.get(name))


def _memory_text(
    data: Phases, objective: Objective, accelerator: Accelerator, parameters: int, average: bool, sharded: bool
) -> str:
    """Memory of a process; what a micro-batch keeps is that of the largest share."""
    from lmscripts.training.processes import product_dtype

    kept, moments = 0, ", moments and average" if average else " and moments"
    size = (20 if average else 16) * parameters / (accelerator.num_processes if sharded else 1)
    text = f"about {size / 2**20:,.0f} MiB per process for weights, gradients{moments}"
    if accelerator.device.type != "cpu" and not sharded:
        copy = (16 if average else 12) * parameters / 2**20
        text += f"; {copy:,.0f} MiB of process 0 on the CPU, from where checkpoints are written meanwhile"
    if not accelerator.is_main_process:  # which alone shows it
        return text
    for phase in data.phases:
        micro_batches, _ = next(phase.step_batches(0, 1, phase.shares.index(max(phase.shares))))
        try:
            kept = max(kept, objective.kept_bytes(micro_batches[0], product_dtype(accelerator)))
        except Exception:  # a model of any kind, whose shapes depend on what it computes
            return text
    return f"{text}; {kept / 2**20:,.0f} MiB for what a micro-batch keeps for the gradient"


def _disk(size: float, data: Phases, kept: Mapping[str, Any]) -> str:
    """What checkpoints of so many MiB take, and which of them are deleted."""
    text, every = f"about {size:,.0f} MiB a checkpoint", kept.get("save_steps")
    newest, milestone = max(1, kept.get("keep_last") or 1), kept.get("keep_every")
    if every is None:
        return text
    saved = [*range(every, data.num_steps, every), data.num_steps] if isinstance(every, int) else []
    stay = [step for step in saved[:-newest] if milestone and step % milestone == 0] + saved[-newest:]
    if saved and len(saved) <= newest:
        return f"{text}, {len(saved) * size:,.0f} MiB in all"
    total = f", {len(stay) * size:,.0f} MiB in all" if saved else ""
    others = f"; older ones are deleted{f', but for multiples of {milestone:,}' if milestone else ''}"
    return f"{text}; the newest {newest:,} stay{total}{others}"


def _phase_lines(data: Phase) -> list[tuple[str, str]]:
    index, layout = data.train, data.layout
    positions = data.total_rows * layout.sequence_length
    num_rows, tokens = index.num_rows * data.whole, index.real_tokens * data.whole
    epochs = data.total_rows / num_rows
    sampled = data.whole > 1
    text = f"about {1 / data.whole:.1%} of it was read; " if sampled else ""
    text += f"{tokens:,.0f} tokens in {num_rows:,.0f} rows of {layout.sequence_length}, "
    text += f"{index.fill():.2%} full, {layout.packing}; "
    text += f"{data.num_eval_rows:,} rows {'of what was read ' if sampled else ''}held out"
    at_once = "as many as fit, which is tried," if data.is_tried else f"at most {data.micro_batch_size}"
    rising = f"{data.ramp[0]} rows, rising to {data.batch_size} at step {data.ramp[1] + 1:,}" if data.ramp else ""
    steps = f"{data.num_steps:,} of {rising or f'{data.batch_size} rows'}, {epochs:.2f} epochs of "
    steps += f"{num_rows / data.batch_size:,.1f} steps; {positions:,} positions, "
    return [
        ("text", text),
        ("objective", data.words),
        ("steps", f"{steps}{epochs * tokens:,.0f} tokens"),
        ("shares", f"rows of a step {data.shares} by process, {at_once} at once"),
    ]


# ---- a decay branch: options that it takes from the run it leaves, and those that the checkpoint has settled --------


def branch_options(given: Mapping[str, tuple[Any, bool]], read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Options of a run with --decay_from beside those that were given, in the form of `options.parsing.Beneath`.

    Model and text, and all else that was not given, are those of the run: of the settings in the checkpoint, and of
    config.yaml in its folder. The schedule follows from the checkpoint's step; it is one of the options from here on,
    so that what is written down says what was run. A branch that is continued knows all of this itself; the checkpoint
    that it left may be gone.

    Args:
        given: name to value and whether it stands on the line.
        read: gives the options of a file.

    Returns:
        Name to value, settled ones among them; empty without --decay_from.

    Raises:
        UserError: the checkpoint is none or not one of a stable rate, or an option was given that has no effect.
    """
    from lmscripts.models.finding import find_checkpoint, read_state
    from lmscripts.training import handing

    decay_from, steps = (given.get(name, (None, False))[0] for name in ("decay_from", "decay_steps"))
    if decay_from is None:
        return {}
    own = _own_checkpoint(given)
    if own is None and steps is None:
        raise UserError(f"--decay_from {decay_from} needs --decay_steps")
    checkpoint = own or find_checkpoint(handing.checkpoint(Path(decay_from)))[0]
    state = read_state(checkpoint, "fixed", "progress")
    plan, fixed, step = state.get("schedule"), state["fixed"], state["progress"]["step"]
    if not isinstance(plan, dict):
        raise UserError(f"{checkpoint} does not say its schedule: it was saved by an older version")
    if fixed.get("phase_steps"):
        raise UserError(
            f"{checkpoint} is of a run with --phase_steps {shown(tuple(fixed['phase_steps']))}: no branches"
        )
    numbers = {name: plan.get(name) for name in ("warmup_steps", "max_steps", "peak")}
    if not all(isinstance(value, (int, float)) for value in (*numbers.values(), plan.get("decay_steps") or 0)):
        raise UserError(f"{checkpoint} does not say its schedule in numbers, which a branch needs")
    decay = {"wsd": plan["decay_steps"] or 0, "constant": 0}.get(plan["schedule"])
    if decay is None:
        raise UserError(f"{checkpoint} was trained with --schedule {plan['schedule']}, whose rate is never stable")
    begin, end = plan["warmup_steps"], plan["max_steps"] - decay
    if own is None and not begin <= step <= end:
        raise UserError(f"{checkpoint} is at step {step}, but its rate was stable from step {begin} to {end} only")
    settled = {"schedule": "wsd", "learning_rate": plan["peak"], "warmup_steps": begin}
    settled |= {"epochs": None, "phase_steps": ()}
    settled |= {"max_steps": plan["max_steps"] if own else step + steps, "decay_steps": decay if own else steps}
    file = checkpoint.parent / "config.yaml"
    before = read(str(file)) if file.is_file() else {}
    if file.is_file():
        settled |= {name: before.get(name) for name in _PRETRAINED}
    _refuse_others(given, settled, before)
    settled |= _of_that_job(given, before)
    before |= {name: tuple(v) if isinstance(v, list) else v for name, v in fixed.items() if name not in _NOT_TAKEN}
    left_out = {*given, *_ITS_OWN}
    for names, more in _TOGETHER:
        left_out |= {*names, *more} if left_out & {*names} else set()
    taken = {name: value for name, value in before.items() if name not in left_out}
    return taken | settled | ({} if own else {"decay_from": str(checkpoint)})


def _of_that_job(given: Mapping[str, tuple[Any, bool]], before: Mapping[str, Any]) -> dict[str, None]:
    """Options of the file that say where the run's own job began and ended, if the file is that run's config.yaml."""
    names = ("start_from", "carry_over", "stop_at_step", "max_time")
    of_file = {name: given[name][0] for name in names if name in given and not given[name][1]}
    return {name: None for name, value in of_file.items() if value == before.get(name)}


def _own_checkpoint(given: Mapping[str, tuple[Any, bool]]) -> Path | None:
    """The newest checkpoint of a branch that is continued, be it damaged: its state has to be readable."""
    from lmscripts.models.finding import list_checkpoints, read_state
    from lmscripts.training import handing

    run_dir, goes_on = (given.get(name, (None, False))[0] for name in ("model_dir", "do_continue"))
    own = list_checkpoints(handing.run_folder(Path(run_dir), True)) if run_dir and goes_on else []
    for checkpoint in reversed(own):
        try:
            read_state(checkpoint, "fixed", "progress")
        except (OSError, ValueError):
            continue  # damaged: which is said where the run takes its folder
        return checkpoint
    return None


def _refuse_others(
    given: Mapping[str, tuple[Any, bool]], settled: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Refuse options that would be ignored; a file may repeat those of the run that is left, and name any length."""
    for name, value in settled.items():
        written, on_line = given.get(name, (None, False))
        of_file = not on_line and (written == before.get(name) or name in _LENGTHS)
        if written not in (None, value) and not of_file:
            there = "this branch has none" if value in (None, ()) else f"in this branch it is {shown(value)}"
            raise UserError(f"--{name} {shown(written)} has no effect with --decay_from: {there}")
