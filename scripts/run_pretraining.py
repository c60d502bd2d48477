"""Pretrain a language model: a token store (or text and a tokenizer) in, a transformers model folder out.

accelerate launch --config_file accelerate_configs/gpu4_bf16.yaml scripts/run_pretraining.py --config recipe.yaml

Writes config.yaml, checkpoint-STEP/, log.jsonl, curves.png, TensorBoard files, and final/: model, tokenizer, card.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lmscripts import objectives
from lmscripts.errors import UserError, leave, user_errors
from lmscripts.options import language_pretraining, lightning
from lmscripts.options.checks import check_numbers, check_useless, refuse_given
from lmscripts.options.parsing import dump_options, option, parse_options
from lmscripts.training.branch import branch_options

if TYPE_CHECKING:
    from lmscripts.data.token_store import TokenStore
    from lmscripts.options.parsing import Further
    from lmscripts.options.presets import Preset
    from lmscripts.training.plan import PhaseSettings

STARTED = monotonic()  # the time of a job counts from here, not from when the imports are done
Packing = Literal["isolated", "contiguous"]
Attention = Literal["auto", "sdpa", "eager", "varlen"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
Optimizer = Literal["adamw", "adam", "radam", "lamb", "sgd", "muon"]
Precision = Literal["no", "fp16", "bf16", "fp16_on_gpu"]
CarryOver = Literal["weights", "moments", "everything"]
TokenizerType = Literal["wordpiece", "unigram", "bpe", "character"]
Every = int | Literal["epoch"]
POSITIVE = [
    "batch_size", "micro_batch_size", "max_steps", "epochs", "save_steps", "logging_steps", "eval_every",
    "stop_at_step", "learning_rate", "sequence_length", "decay_steps", "expected_processes", "timeout",
    "num_workers", "phase_steps", "n_layer", "n_head", "n_embd"
]  # fmt: skip
NOT_NEGATIVE = [
    "warmup_steps", "eval_rows", "keep_last", "keep_every", "weight_decay", "epsilon", "max_grad_norm"
]  # fmt: skip
BELOW_ONE = ["hidden_dropout", "attention_dropout", "beta1", "beta2", "final_lr_ratio", "validation_fraction"]
PER_PHASE = "give these once or once for each: dataset_dir sequence_length mask_probability batch_size micro_batch_size"
OBJECTIVES = " or ".join(objectives.names())
SETTINGS = [objectives.objective(name).Settings for name in objectives.names()]
# What the preset decides where no option does, and what of it an option may say otherwise.
FROM_PRESET = ("learning_rate", "warmup_steps", "save_steps", "logging_steps", "frozen_layers")
PRETRAINED = {
    "pretrained_model_name_or_path": "pretrained_model",
    "pretrained_generator_model_name_or_path": "pretrained_generator",
    "pretrained_discriminator_model_name_or_path": "pretrained_discriminator",
}
SIZES = {"n_layer": "layers", "n_head": "heads", "n_embd": "hidden_size"}
# What must stay as it was when a run is continued.
FIXED = [
    "model_type", "seed", "sequence_length", "packing", "phase_steps", "batch_size", "optimizer", "weight_decay",
    "beta1", "beta2", "epsilon", "ema_decay", "frozen_layers"
]  # fmt: skip


# ---- options -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="folder of the run", required=True, group="run")
    do_continue: bool = option(False, help="go on from the newest whole checkpoint in --model_dir", group="run")
    dry_run: bool = option(False, help="print the plan and exit", group="run")
    decay_from: str | None = option(None, help="branch off a wsd run's checkpoint: --decay_steps to 0", group="run")
    start_from: str | None = option(None, help="checkpoint (or run) of another run to begin with", group="run")
    carry_over: CarryOver | None = option(None, help="what to take; moments = weights too", group="run")
    stop_at_step: int | None = option(None, help="end this job after so many steps, checkpoint saved", group="run")
    max_time: str | None = option(None, help="end this job after this time, such as 90m or 11h30m", group="run")
    save_steps: Every | None = option(None, help="steps between checkpoints; default: the preset's", group="run")
    keep_last: int = option(3, help="checkpoints to keep", group="run")
    keep_every: int = option(0, help="also keep checkpoints at multiples of so many steps; 0 = none", group="run")
    eval_every: Every | None = option(None, help="steps between evaluations; default: save_steps", group="run")
    eval_rows: int = option(2048, help="held-out rows to evaluate on, at most", group="run")
    logging_steps: int | None = option(None, help="steps between log lines; default: the preset's", group="run")
    tracker: Literal["tensorboard", "none"] = option("tensorboard", help="experiment tracker", group="run")
    seed: int = option(42, help="decides the initial weights, the order, the masks and the dropout", group="run")

    dataset_dir: tuple[str, ...] = option((), help="token store made by prepare_corpus.py", group="data")
    input_file: tuple[str, ...] = option((), help="text files instead of a store", group="data")
    tokenizer_dir: str | None = option(None, help="tokenizer folder or Hub name; must be the store's", group="data")
    validation_fraction: float | None = option(None, help="share of documents held out (0.01)", group="data")
    validation_file: tuple[str, ...] = option((), help="with --input_file: text held out instead", group="data")
    num_workers: int | None = option(None, help="processes that tokenise --input_file (2)", group="data")
    sequence_length: tuple[int, ...] = option((), help="tokens per row; default: the preset's", group="data")
    packing: Packing = option("isolated", help="documents of a row see only themselves, or the whole row", group="data")

    parameter_file: str | None = option(None, help="presets; default: the project's parameter.json", group="model")
    model_type: str = option(help="preset in the parameter file", required=True, group="model")
    pretrained_model_name_or_path: str | None = option(None, help="model to go on from", group="model")
    pretrained_generator_model_name_or_path: str | None = option(None, help="ELECTRA: generator", group="model")
    pretrained_discriminator_model_name_or_path: str | None = option(None, help="ELECTRA: the other", group="model")
    objective: str | None = option(None, help=f"default: the family's; {OBJECTIVES}", group="model")
    n_layer: int | None = option(None, help="layers instead of the preset's", group="model")
    n_head: int | None = option(None, help="attention heads instead of the preset's", group="model")
    n_embd: int | None = option(None, help="width; the feed-forward layers are 4 times as wide", group="model")
    frozen_layers: int | None = option(None, help="freeze embeddings and so many layers; -1 = none", group="model")
    hidden_dropout: float = option(0.1, help="dropout of the hidden states", group="model")
    attention_dropout: float = option(0.0, help="dropout of the attention weights; not with varlen", group="model")
    attention: Attention = option("auto", help="auto = varlen on CUDA in half precision, else sdpa", group="model")

    phase_steps: tuple[int, ...] = option((), help=f"several phases: steps of each; {PER_PHASE}", group="optimizer")
    batch_size: tuple[int, ...] = option((), help="rows per step, all processes; or the preset's", group="optimizer")
    micro_batch_size: tuple[int, ...] = option((32,), help="rows of one forward pass on one process", group="optimizer")
    process_shares: tuple[int, ...] = option((), help="relative rows of each process: 3 1", group="optimizer")
    optimizer: Optimizer = option("adamw", help="muon is for the layers' matrices, with adamw", group="optimizer")
    learning_rate: float | None = option(None, help="peak; default: the preset's", group="optimizer")
    schedule: Schedule = option("linear", help="after the warmup; wsd = stable, then decay", group="optimizer")
    warmup_steps: int | None = option(None, help="default: the preset's", group="optimizer")
    decay_steps: int | None = option(None, help="with --schedule wsd: steps of the decay", group="optimizer")
    final_lr_ratio: float | None = option(None, help="where the decay ends, as a share of the peak", group="optimizer")
    max_steps: int | None = option(None, help="length of the schedule; default: the preset's", group="optimizer")
    epochs: float | None = option(None, help="the same in passes over the text", group="optimizer")
    weight_decay: float = option(0.01, help="on matrices only", group="optimizer")
    beta1: float = option(0.9, help="decay of the first moment", group="optimizer")
    beta2: float | None = option(None, help="of the second; default: the family's, or 0.999", group="optimizer")
    epsilon: float = option(1e-6, help="added to the root of the second moment", group="optimizer")
    ema_decay: float | None = option(None, help="evaluate and export an average of the weights", group="optimizer")
    max_grad_norm: float = option(1.0, help="clip the global gradient norm; 0 = never", group="optimizer")

    precision: Precision | None = option(None, help="or the Accelerate config's, or the preset's", group="machine")
    deterministic: bool = option(False, help="only operations that give the same bits again", group="machine")
    compile: bool = option(False, help="torch.compile the model", group="machine")
    activation_checkpointing: bool = option(False, help="save memory, recompute activations", group="machine")
    fp16_type: int | None = option(None, help="older: 1 to 3 = fp16, 0 = the Accelerate config's", group="machine")
    node_rank: int | None = option(None, help="number of this machine; default: the launcher's", group="machine")
    expected_processes: int | None = option(None, help="stop unless so many processes started", group="machine")
    timeout: int = option(600, help="seconds that a process may keep the others waiting", group="machine")
    tokenizer_type: TokenizerType | None = option(None, help="older: checked against the tokenizer", group="machine")
    mecab_dic: str | None = option(None, help="older: checked against the tokenizer", group="machine")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        values = vars(self)
        check_numbers(values, positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
        if self.max_steps is not None and self.epochs is not None:
            raise UserError(f"--max_steps {self.max_steps} and --epochs {self.epochs} both say how long: give one")
        if self.phase_steps:
            check_useless(values, "with --phase_steps, which says how long", "max_steps", "epochs")
        if self.frozen_layers is not None and self.frozen_layers < -1:
            raise UserError(f"--frozen_layers must be at least -1 (none), got {self.frozen_layers}")
        if self.start_from is not None and self.carry_over is None:
            raise UserError(f"--start_from {self.start_from} needs --carry_over weights, moments or everything")
        if self.start_from is None:
            check_useless(values, "without --start_from", "carry_over")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema_decay must lie between 0 and 1, got {self.ema_decay}")
        if self.decay_from is not None:
            names = ("start_from", "carry_over", "phase_steps")
            check_useless(values, "with --decay_from, which takes everything", *names)
        if (self.decay_steps is not None) != (self.schedule == "wsd"):
            raise UserError(f"--decay_steps {self.decay_steps} is not for --schedule {self.schedule}; wsd needs it")
        if self.attention == "varlen" and self.attention_dropout > 0:
            raise UserError(f"--attention varlen has no dropout, but --attention_dropout is {self.attention_dropout}")
        if self.process_shares and (min(self.process_shares) < 0 or sum(self.process_shares) == 0):
            given = " ".join(map(str, self.process_shares))
            raise UserError(f"--process_shares must be at least 0 and not all 0, got {given}")
        if self.schedule == "constant":
            check_useless(values, "with --schedule constant", "final_lr_ratio")
        if self.dataset_dir:
            check_useless(values, "with --dataset_dir", "validation_fraction", "validation_file", "num_workers")
        if self.validation_file:
            check_useless(values, "with --validation_file, which is what is held out", "validation_fraction")
        if self.fp16_type and self.precision not in (None, "fp16"):
            raise UserError(f"--fp16_type {self.fp16_type} and --precision {self.precision} differ: give one")


# ---- what is asked for: before the processes join, as text may have to be tokenised ----------------------------------


class Inputs(NamedTuple):
    """Options with the preset's values where none were given, and what goes with them."""

    options: Options
    preset: Preset
    objective: str
    settings: Any  # of the objective
    phases: list[PhaseSettings]
    other_objective: str  # than the family's; empty for that


def read_inputs(options: Options, further: Further) -> Inputs:
    """Preset, objective and text, put together with the options."""
    from lmscripts.models import building, families
    from lmscripts.options.presets import default_parameter_file, load_preset

    preset = load_preset(options.parameter_file or default_parameter_file(), options.model_type, families.preset_keys())
    family = families.family(preset.family)
    name = options.objective or family.default_objective
    kind = objectives.objective(name)
    refuse_given(further.settings[kind.Settings], further.given, f"on the objective {name}")
    given = {field: getattr(options, option) for option, field in PRETRAINED.items() if getattr(options, option)}
    sizes = {field: getattr(options, option) for option, field in SIZES.items() if getattr(options, option)}
    frozen = preset.frozen_layers if options.frozen_layers is None else options.frozen_layers
    preset = building.as_asked(preset, name, sizes=sizes, **given, frozen_layers=frozen)
    if options.start_from is not None and (origin := building.origin(preset)):
        raise UserError(f"--start_from {options.start_from} and {origin} are both a beginning: give one of them")
    values: dict[str, Any] = {name: getattr(preset, name) for name in FROM_PRESET}
    values |= {"beta2": family.defaults.get("beta2", 0.999), "eval_every": options.save_steps or preset.save_steps}
    values["sequence_length"] = options.sequence_length or row_lengths(options, preset, bool(given))
    values["batch_size"] = (preset.batch_size * preset.accumulation_steps,)  # the older way to say it
    if options.decay_from is not None:  # everything of that checkpoint; the parser has read its schedule
        options = replace(options, start_from=options.decay_from, carry_over="everything", decay_from=None)
    elif not options.phase_steps:
        values["max_steps"] = None if options.epochs else preset.train_steps
    options = replace(options, **{name: v for name, v in values.items() if getattr(options, name) in (None, ())})
    settings = kind.resolved(further.settings[kind.Settings], preset)
    other = "" if name == family.default_objective else name
    return Inputs(options, preset, name, settings, ask_phases(options, settings), other)


def row_lengths(options: Options, preset: Preset, is_given: bool) -> tuple[int, ...]:
    """Tokens of a row: the preset's; with a model that was named those of the run, else no more than it reads."""
    from lmscripts.models import building, finding

    if preset.sequence_length and not is_given:
        return (preset.sequence_length,)
    own = finding.look_for_whole(Path(options.model_dir))[0] if options.do_continue else None
    if own is not None:
        return tuple(finding.read_state(own)["fixed"]["sequence_length"])
    lengths = [length for length in (preset.sequence_length, building.longest_pretrained(preset)) if length]
    if not lengths:
        raise UserError(f"the model {building.origin(preset)} says no longest input: give --sequence_length")
    return (min(lengths),)


def ask_phases(options: Options, settings: Any) -> list[PhaseSettings]:
    """What each phase is asked to be; one phase without --phase_steps."""
    from lmscripts.training import plan

    steps = options.phase_steps or (options.max_steps,)
    of_objective = {name: value for name, value in asdict(settings).items() if isinstance(value, tuple)}
    names = ("dataset_dir", "sequence_length", "batch_size", "micro_batch_size")
    values = plan.by_phase({name: getattr(options, name) for name in names} | of_objective, len(steps))
    stores, phases = open_stores(options), []
    for number, value in zip(steps, values, strict=True):
        own = replace(settings, **{name: (value.pop(name),) for name in of_objective if name in value})
        store = stores[value.pop("dataset_dir", "")]
        phases.append(plan.PhaseSettings(store=store, steps=number, epochs=options.epochs, objective=own, **value))
    return phases


def open_stores(options: Options) -> dict[str, TokenStore]:
    """Token stores by the name that was given, or the one that is made of text."""
    from lmscripts.data.preparation import Source
    from lmscripts.tokenizer.encoder import find_tokenizer
    from lmscripts.training import plan

    if bool(options.dataset_dir) == bool(options.input_file):
        raise UserError("give either --dataset_dir (a token store) or --input_file with --tokenizer_dir")
    source = None
    if options.input_file:
        if options.tokenizer_dir is None:
            raise UserError("--input_file needs --tokenizer_dir")
        if options.dry_run:
            raise UserError("--dry_run reads a token store: give --dataset_dir (prepare_corpus.py makes one)")
        held_out = (options.validation_fraction or 0.01, options.validation_file)
        source = Source(options.input_file, find_tokenizer(options.tokenizer_dir), *held_out)
    where = (Path(options.model_dir), options.num_workers or 2)
    return plan.open_stores(options.dataset_dir, options.tokenizer_dir, source, *where)


# ---- the run -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, prepare, train, export."""
    also = {"foreign": lightning, "one_of": [lightning.LENGTHS], "beneath": branch_options, "more": SETTINGS}
    options, further = parse_options(Options, description=__doc__ or "", **also, **language_pretraining.PRETRAINING)
    with user_errors():
        run(options, further)


def run(options: Options, further: Further) -> None:
    """The whole run; ends the process with its exit code."""
    import torch
    from transformers import AutoTokenizer, logging

    from lmscripts.data.steps import Prefetcher, to_device
    from lmscripts.evaluation.sums import evaluate
    from lmscripts.models import building, families
    from lmscripts.tokenizer.folder import check_tokenizer
    from lmscripts.training import average, card, folder, log, optim, plan, processes, resume

    # ---- processes and data
    logging.disable_progress_bar()  # of transformers, at every save
    deadline = STARTED + (processes.parse_duration(options.max_time) if options.max_time else inf)
    run_dir, branch = Path(options.model_dir), bool(options.decay_from)
    asked = read_inputs(options, further)
    saved_options = dump_options(options, further.settings[objectives.objective(asked.objective).Settings])
    options, preset, kind = asked.options, asked.preset, objectives.objective(asked.objective)
    tokenizer_dir = asked.phases[0].store.tokenizer_dir
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    check_tokenizer(tokenizer, tokenizer_type=options.tokenizer_type, mecab_dic=options.mecab_dic)
    sources = plan.open_sources(asked.phases, kind, tokenizer, options.packing)
    accelerator = processes.start_processes(
        mixed_precision=processes.choose_precision(options.fp16_type, preset.fp16_type, preset.bf16, options.precision),
        expected_processes=options.expected_processes,
        timeout_seconds=options.timeout,
        trackers=() if options.tracker == "none" else (options.tracker,),
        project_dir=options.model_dir,
    )
    say, world, rank = accelerator.print, accelerator.num_processes, accelerator.process_index
    fixed = {name: value for name, value in vars(options).items() if name in FIXED} | asdict(asked.settings)
    fixed |= {"objective": asked.other_objective, "token store": [phase.store.fingerprint for phase in asked.phases]}
    processes.check_agreement(fixed)
    torch.use_deterministic_algorithms(options.deterministic)
    like = resume.built_like(run_dir, options.do_continue, options.start_from if branch else None)
    attention = building.choose_attention(
        preset,
        asked.objective,
        options.attention,
        device=accelerator.device.type,
        precision=accelerator.mixed_precision,
        attention_dropout=options.attention_dropout,
        like=like,
    )
    data = plan.open_phases(
        asked.phases,
        sources,
        kind,
        tokenizer,
        accelerator,
        with_ends=attention == "varlen",
        seed=options.seed,
        most_eval_rows=options.eval_rows,
        node_rank=options.node_rank,
        node_batch_sizes=preset.node_batch_sizes,
        weights=options.process_shares or None,
    )
    rate = optim.Schedule(
        options.schedule,
        peak=options.learning_rate,
        warmup_steps=options.warmup_steps,
        max_steps=data.num_steps,
        decay_steps=options.decay_steps,
        final_ratio=options.final_lr_ratio or 0.0,
    )
    batches = [(phase.shares, phase.batch_size, phase.total_rows) for phase in data.phases]
    processes.check_sharded(accelerator, options.optimizer, batches)

    # ---- model, from the beginning, from another model or from a checkpoint
    models, notices = building.build(
        preset,
        asked.objective,
        tokenizer,
        data.longest.layout,
        like=like,
        seed=options.seed,
        path=attention,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
    )
    if options.activation_checkpointing:
        building.recompute_activations(models)
    autos = {export.subfolder: export.auto for export in kind.EXPORTS}
    beside = folder.tokenizer_beside(tokenizer, models, autos, data.longest.layout.sequence_length)
    parameters = building.num_parameters(models)
    said = plan.plan_text(
        data,
        rate,
        accelerator,
        parameters=parameters,
        attention=attention,
        schedule=options.schedule,
        corners=[options.warmup_steps],
    )
    say("\n".join([said, *notices]), flush=True)
    if options.dry_run:
        return
    run_folder = folder.RunFolder(run_dir, fixed, rate, beside)
    claim = partial(run_folder.claim, options.do_continue, options.start_from, branch)
    source, continued, notices = processes.from_main(accelerator, claim)
    processes.check_agreement({"checkpoint found": source is None or source.is_dir()})
    carry_over = None if continued else options.carry_over
    if source:
        notices = [*notices, *resume.load_weights(models, source, tokenizer if carry_over else None)]
    say("\n".join(notices), end="\n" * bool(notices))
    objective = objectives.trained(asked.objective, families.family(preset.family), models, attention, asked.settings)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each phase, size of batch, and evaluation
        objective.compile(dynamic=False)
    optimizer = optim.build_optimizer(
        options.optimizer,
        objective,
        learning_rate=options.learning_rate,
        betas=(options.beta1, options.beta2),
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
    )
    model, optimizer = accelerator.prepare(objective, optimizer)
    moving = average.start(objective, options.ema_decay)
    state = resume.restore(
        accelerator,
        objective,
        optimizer,
        resume.TrainingState(),
        source,
        average=moving,
        carry_over=carry_over,
        optimizer_name=options.optimizer,
    )

    stop_step = min(data.num_steps, options.stop_at_step or data.num_steps)
    if not continued:
        resume.check_steps(state.step, stop_step)
        state.origin = options.start_from or building.origin(preset)
    if rank == 0:
        run_folder.write_options(saved_options)

    # ---- what is shown and written down
    stop_asked = processes.StopRequest(deadline)
    meter = log.Meter(accelerator.device, *state.open_window(rank))
    report = log.Reporter(accelerator, run_dir, state.step, stop_step, continued)
    judged = moving.module if moving else objective

    def stopped_while_evaluating() -> bool:
        phase = data.of_step(state.step - 1)
        if phase.num_eval_rows == 0 or state.evaluated_step == state.step:
            return False
        if not data.is_due(state.step, options.eval_every) and state.step != data.num_steps:
            return False
        held_out = (phase.eval_batch, phase.num_eval_rows, phase.micro_batch_size)
        with meter.paused():
            result, _ = evaluate(accelerator, judged, *held_out, stop_asked)
        state.evaluated_step = state.evaluated_step if result is None else state.step
        if result:
            report(state.step, {f"eval_{name}": v for name, v in result.items()}, f"held-out {log.in_words(result)}")
        return result is None

    # ---- loop
    batches = Prefetcher(data.step_batches(state.step, stop_step, rank))
    model.train()
    stopped = stopped_while_evaluating()
    while state.step < stop_step and not stopped:
        micro_batches, counts = next(batches)
        *totals, stops = processes.sum_over_processes(accelerator, [*counts.values(), float(stop_asked())])
        targets = dict(zip(counts, totals, strict=True))
        learning_rate = rate(state.step)
        optim.set_rate(optimizer, learning_rate)
        processes.seed_dropout(options.seed, state.step, rank)
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                sums = model(to_device(batch, accelerator.device))
                # DDP takes the mean of the gradients over the processes; wanted is the sum over all targets.
                accelerator.backward(objective.loss(sums, targets) * world)
            meter.add_sums(sums)
        norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or inf)
        finite = state.judge(norm, has_scaler=accelerator.scaler is not None)
        if finite or accelerator.scaler is not None:  # which has to see the others too, to find its scale
            optimizer.step()
        if finite and moving:
            average.update(moving, objective)
        optimizer.zero_grad(set_to_none=True)
        phase = data.of_step(state.step)
        state.step += 1
        state.real_tokens += targets["tokens"]
        length = phase.layout.sequence_length
        meter.add_step(targets, phase.positions * objective.flops_per_position(length, phase.slots))
        report.bar.update()

        if state.step % options.logging_steps == 0 or state.step == data.num_steps:
            record = meter.read(accelerator, objective.metrics)
            words = f"{log.in_words(record)}, {record['tokens_per_second']:,.0f} tokens/s"
            record |= {"learning_rate": learning_rate, "gradient_norm": float(norm), "tokens": state.real_tokens}
            report(state.step, record | {"skipped_steps": state.skipped_steps}, words)
        stopped = stops > 0 or stopped_while_evaluating()
        if stopped or state.step == stop_step or data.is_due(state.step, options.save_steps):
            state.window_sums, state.window_counts = meter.open_window(accelerator)
            with meter.paused():
                run_folder.save(accelerator, objective, objective.models, optimizer, state, moving)
            if rank == 0:
                run_folder.prune(options.keep_last, options.keep_every)
    batches.close()
    report.bar.close()

    # ---- end
    if rank == 0:
        log.draw_curves(report.file, run_dir / "curves.png", data.ends[:-1])
    if stopped:
        reason = stop_asked.reason or "a signal to another process"
        say(f"stopped by {reason} at step {state.step:,}; everything is saved, go on with --do_continue")
    elif state.step < data.num_steps:
        say(f"--stop_at_step {stop_step} is reached; go on with --do_continue")
    elif rank == 0:
        title = f"{run_dir.name}: {options.model_type}"
        describe = partial(card.pretraining_card, title, state.origin, kind, data, report.file, saved_options)
        final = run_folder.export(state.step, moving and moving.module.models, describe)
        say(f"the model is in {final}, the curves in {run_dir / 'curves.png'}, the numbers in {report.file}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    leave(processes.STOPPED_EARLY if stopped else 0)  # here, where model and processes still stand


if __name__ == "__main__":
    main()
