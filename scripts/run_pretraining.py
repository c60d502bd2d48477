"""Pretrain a language model: a token store (or text and a tokenizer) in, a transformers model folder out.

accelerate launch --config_file accelerate_configs/gpu4_bf16.yaml scripts/run_pretraining.py --config recipe.yaml

Writes config.yaml, checkpoint-STEP/, log.jsonl, curves.png, TensorBoard files, and final/: model, tokenizer, card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lmscripts import objectives
from lmscripts.errors import UserError, leave, user_errors
from lmscripts.options import (
    PRETRAINING,
    Further,
    OlderNames,
    check_numbers,
    check_useless,
    dump_options,
    option,
    parse_duration,
    parse_options,
    refuse_given,
    sizes_of_config,
)
from lmscripts.training import plan

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.swa_utils import AveragedModel
    from transformers import PreTrainedModel

    from lmscripts.data.steps import Phases
    from lmscripts.evaluation.downstream import EvalTask
    from lmscripts.models.building import Dropouts
    from lmscripts.objectives.module import Objective
    from lmscripts.options.presets import Preset
    from lmscripts.training.folder import RunFolder
    from lmscripts.training.hub import Hub
    from lmscripts.training.log import Meter, Reporter
    from lmscripts.training.processes import StopRequest
    from lmscripts.training.state import TrainingState

STARTED = monotonic()  # the time of a job counts from here, not from when the imports are done
Packing = Literal["isolated", "contiguous"]
Attention = Literal["auto", "sdpa", "eager", "varlen"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
Optimizer = Literal["adamw", "adam", "radam", "lamb", "sgd", "muon"]
Precision = Literal["no", "fp16", "bf16", "fp16_on_gpu"]
Balance = Literal["even", "auto"]
CarryOver = Literal["weights", "moments", "everything"]
Every = int | Literal["epoch"]
POSITIVE = [
    "batch_size", "batch_ramp", "micro_batch_size", "micro_batch_tokens", "max_steps", "epochs", "save_steps",
    "logging_steps", "eval_every", "stop_at_step", "learning_rate", "sequence_length", "decay_steps",
    "expected_processes", "timeout",
    "num_workers", "phase_steps", "n_layer", "n_head", "n_embd"
]  # fmt: skip
NOT_NEGATIVE = [
    "warmup_steps", "eval_rows", "keep_last", "keep_every", "weight_decay", "epsilon", "max_grad_norm",
    "max_unknown_share"
]  # fmt: skip
BELOW_ONE = ["hidden_dropout", "attention_dropout", "beta1", "beta2", "final_lr_ratio", "validation_fraction"]
PER_PHASE = "give these once or once for each: dataset_dir sequence_length mask_probability batch_size micro_batch_*"
OBJECTIVES = " or ".join(objectives.names())
SETTINGS = [*(objectives.objective(name).Settings for name in objectives.names()), OlderNames]
# What the preset decides where no option does, and what of it an option may say otherwise.
FROM_PRESET = ("learning_rate", "warmup_steps", "save_steps", "keep_last", "logging_steps", "frozen_layers")
PRETRAINED = {
    "pretrained_model_name_or_path": "pretrained_model",
    "pretrained_generator_model_name_or_path": "pretrained_generator",
    "pretrained_discriminator_model_name_or_path": "pretrained_discriminator",
}
INPUTS = ("dataset_dir", "input_file", "validation_file", "tokenizer_dir", "parameter_file", *PRETRAINED)
OFTEN = ("save_steps", "keep_last", "keep_every", "eval_every", "logging_steps")
SIZES = {"n_layer": "layers", "n_head": "heads", "n_embd": "hidden_size"}
# What must stay as it was when a run is continued.
FIXED = [
    "model_type", "seed", "sequence_length", "packing", "phase_steps", "batch_size", "batch_ramp", "optimizer",
    "weight_decay", "beta1", "beta2", "epsilon", "ema_decay", "frozen_layers"
]  # fmt: skip


# ---- options -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="folder of the run", required=True, group="run", writes="folder")
    do_continue: bool = option(False, help="go on from the newest whole checkpoint in --model_dir", group="run")
    dry_run: bool = option(False, help="print the plan and exit", group="run")
    decay_from: str | None = option(None, help="branch off a wsd run's checkpoint: --decay_steps to 0", group="run")
    start_from: str | None = option(None, help="checkpoint (or run) of another run to begin with", group="run")
    carry_over: CarryOver | None = option(None, help="what to take; moments = weights too", group="run")
    stop_at_step: int | None = option(None, help="end this job after so many steps, checkpoint saved", group="run")
    max_time: str | None = option(None, help="end this job after this time, such as 90m or 11h30m", group="run")
    save_steps: Every | None = option(None, help="steps between checkpoints; default: the preset's", group="run")
    keep_last: int | None = option(None, help="newest checkpoints to keep; default: the preset's", group="run")
    keep_every: int = option(0, help="also keep checkpoints at multiples of so many steps; 0 = none", group="run")
    eval_every: Every | None = option(None, help="steps between evaluations; default: save_steps", group="run")
    eval_rows: int = option(2048, help="held-out rows to evaluate on, at most", group="run")
    eval_task: tuple[str, ...] = option(
        (), help="[NAME=]FILE:TEXT:LABEL, columns of a table: probed at evaluations, fine-tuned at the end", group="run"
    )
    sample_prompts: tuple[str, ...] = option(
        (), help="texts, or a .txt of them, to go on from (or with masks to fill) at every evaluation", group="run"
    )
    logging_steps: int | None = option(None, help="steps between log lines; default: the preset's", group="run")
    tracker: tuple[str, ...] = option(
        ("tensorboard",), help="none, or any that accelerate knows: wandb trackio mlflow ...", group="run"
    )
    tracker_project: str | None = option(None, help="where it is not tensorboard (lmscripts)", group="run")
    seed: int = option(
        42, help="decides the initial weights, the order, the masks and the dropout", group="run", most=2**63 - 1
    )

    dataset_dir: tuple[str, ...] = option((), help="token store made by prepare_corpus.py", group="data")
    input_file: tuple[str, ...] = option((), help="text files (or folders, hub:NAME) instead of a store", group="data")
    tokenizer_dir: str | None = option(None, help="tokenizer folder or Hub name; must be the store's", group="data")
    validation_fraction: float | None = option(None, help="share of documents held out (0.01)", group="data")
    validation_file: tuple[str, ...] = option((), help="with --input_file: text held out instead", group="data")
    num_workers: int | None = option(None, help="processes that tokenise --input_file (2)", group="data", most=1024)
    max_unknown_share: float = option(0.5, help="refuse text with a larger share of unknown characters", group="data")
    sequence_length: tuple[int, ...] = option(
        (), help="tokens per row; default: the preset's", group="data", most=65536
    )
    packing: Packing = option("isolated", help="documents of a row see only themselves, or the whole row", group="data")

    parameter_file: str | None = option(None, help="presets; default: the project's parameter.json", group="model")
    model_type: str = option(help="preset in the parameter file", required=True, group="model")
    pretrained_model_name_or_path: str | None = option(None, help="model to go on from", group="model")
    pretrained_generator_model_name_or_path: str | None = option(None, help="ELECTRA: generator", group="model")
    pretrained_discriminator_model_name_or_path: str | None = option(None, help="ELECTRA: the other", group="model")
    objective: str | None = option(None, help=f"default: the family's; {OBJECTIVES}", group="model")
    n_layer: int | None = option(None, help="layers instead of the preset's", group="model", most=1000)
    n_head: int | None = option(None, help="attention heads instead of the preset's", group="model", most=1_000_000)
    n_embd: int | None = option(
        None, help="width; the feed-forward layers are 4 times as wide", group="model", most=1_000_000
    )
    frozen_layers: int | None = option(None, help="freeze embeddings and so many layers; -1 = none", group="model")
    hidden_dropout: float | None = option(None, help="of hidden states; default: the preset's", group="model")
    attention_dropout: float | None = option(None, help="of attention weights (0); takes eager", group="model")
    attention: Attention = option("auto", help="auto = varlen on CUDA in half precision, else sdpa", group="model")

    phase_steps: tuple[int, ...] = option((), help=f"several phases: steps of each; {PER_PHASE}", group="optimizer")
    batch_size: tuple[int, ...] = option(
        (), help="rows per step, all processes; or the preset's", group="optimizer", most=10**9
    )
    batch_ramp: tuple[int, ...] = option(
        (), help="8 500: first 8 rows a step, rising to batch_size in 500 steps", group="optimizer", most=10**9
    )
    micro_batch_size: tuple[int, ...] = option(
        (), help="rows of one forward pass on one process; 32, on a GPU what fits", group="optimizer", most=10**6
    )
    micro_batch_tokens: tuple[int, ...] = option((), help="the same in tokens", group="optimizer", most=10**9)
    process_shares: tuple[int, ...] = option((), help="relative rows of each process: 3 1", group="optimizer")
    balance: Balance = option("even", help="auto: divide them by measured speed", group="optimizer")
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

    precision: Precision | None = option(
        None, help="or the Accelerate config's, the preset's, the GPU's", group="machine"
    )
    deterministic: bool = option(False, help="only operations that give the same bits again", group="machine")
    compile: bool | None = option(None, help="torch.compile the model; default: on CUDA", group="machine")
    activation_checkpointing: bool = option(False, help="save memory, recompute activations", group="machine")
    shard: bool | None = option(
        None, help="divide weights, gradients and moments among processes (FSDP2); or the config's", group="machine"
    )
    node_rank: int | None = option(None, help="number of this machine; default: the launcher's", group="machine")
    expected_processes: int | None = option(None, help="stop unless so many processes started", group="machine")
    timeout: int = option(600, help="seconds that a process may keep the others waiting", group="machine")
    send_inputs: bool = option(
        False, help="hand what only the first machine has of the inputs to the others", group="machine"
    )

    push_to_hub: str | None = option(None, help="USER/NAME: upload checkpoints and model there", group="hub")
    hub_private: bool | None = option(None, help="nobody else sees them; default: the Hub's", group="hub")
    language: tuple[str, ...] = option((), help="for the card: ja en; default: the tokenizer's", group="hub")
    license: str | None = option(None, help="for the card: apache-2.0", group="hub")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        values = vars(self)
        check_numbers(values, positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
        if self.push_to_hub is None:
            check_useless(values, "without --push_to_hub", "hub_private")
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
        if self.attention == "varlen" and self.attention_dropout:
            raise UserError(f"--attention varlen has no dropout, but --attention_dropout is {self.attention_dropout}")
        if self.process_shares and (min(self.process_shares) < 0 or sum(self.process_shares) == 0):
            given = " ".join(map(str, self.process_shares))
            raise UserError(f"--process_shares must be at least 0 and not all 0, got {given}")
        if self.micro_batch_size:
            check_useless(values, "with --micro_batch_size, which says the same in rows", "micro_batch_tokens")
        if self.batch_ramp and len(self.batch_ramp) != 2:
            given = " ".join(map(str, self.batch_ramp))
            raise UserError(f"--batch_ramp takes the rows of the first step and the steps of the rise, got {given}")
        if self.balance == "auto":
            check_useless(values, "with --balance auto, which measures them", "process_shares")
        if self.schedule == "constant":
            check_useless(values, "with --schedule constant", "final_lr_ratio")
        if self.dataset_dir:
            check_useless(values, "with --dataset_dir", "validation_fraction", "validation_file", "num_workers")
        if self.validation_file:
            check_useless(values, "with --validation_file, which is what is held out", "validation_fraction")
        if bool(self.dataset_dir) == bool(self.input_file):
            raise UserError("give either --dataset_dir (a token store) or --input_file with --tokenizer_dir")
        parse_duration(self.max_time)
        if self.input_file and self.tokenizer_dir is None:
            raise UserError("--input_file needs --tokenizer_dir")


# ---- what is asked for: before the processes join, as text may have to be tokenised ----------------------------------


class Inputs(NamedTuple):
    """Options with the preset's values where none were given, and what goes with them."""

    options: Options
    older: OlderNames
    is_branch: bool  # with --decay_from, which stands in start_from from here on
    preset: Preset
    family: Any  # its module
    name: str  # of the objective
    objective: Any  # its module
    settings: Any  # of the objective
    phases: list[plan.PhaseSettings]
    tasks: list[EvalTask]  # of the main process
    as_yaml: str  # the options that repeat the run, as they were given
    notices: list[str]

    @property
    def fixed(self) -> dict[str, Any]:
        """What must be the same on all processes, and stay as it was when the run is continued."""
        values = {name: value for name, value in vars(self.options).items() if name in FIXED} | asdict(self.settings)
        other = "" if self.name == self.family.default_objective else self.name
        return values | {"objective": other, "token store": [phase.store.fingerprint for phase in self.phases]}


def read_inputs(options: Options, further: Further, notices: list[str]) -> Inputs:
    """Preset, objective and text, put together with the options; to the notices others may come."""
    from lmscripts.evaluation import downstream
    from lmscripts.models import building
    from lmscripts.training import processes

    processes.check_trackers(options.tracker)
    preset, family = building.read_preset(options.parameter_file, options.model_type)
    name = options.objective or family.default_objective
    objective, older, is_branch = objectives.objective(name), further.settings[OlderNames], bool(options.decay_from)
    settings = further.settings[objective.Settings]
    refuse_given({**vars(settings), **vars(older)}, further.given, f"on the objective {name}")
    as_yaml = dump_options(options, settings, older)
    given = {field: getattr(options, option) for option, field in PRETRAINED.items() if getattr(options, option)}
    sizes = {field: getattr(options, option) for option, field in SIZES.items() if getattr(options, option)}
    if older.bert_config_file:
        of_file, said = sizes_of_config(older.bert_config_file)
        sizes, notices = of_file | sizes, [*notices, said]
    frozen = preset.frozen_layers if options.frozen_layers is None else options.frozen_layers
    preset = building.as_asked(preset, name, sizes=sizes, **given, frozen_layers=frozen)
    if options.start_from is not None and (origin := building.origin(preset)):
        raise UserError(f"--start_from {options.start_from} and {origin} are both a beginning: give one of them")
    values: dict[str, Any] = {name: getattr(preset, name) for name in FROM_PRESET}
    values |= {"beta2": family.defaults.get("beta2", 0.999), "eval_every": options.save_steps or preset.save_steps}
    values["shard"] = processes.asked_of_launcher()
    values["sequence_length"] = options.sequence_length or row_lengths(options, preset, bool(given))
    values["batch_size"] = (preset.batch_size * preset.accumulation_steps,)  # the older way to say it
    if options.decay_from is not None:  # everything of that checkpoint; the parser has read its schedule
        options = replace(options, start_from=options.decay_from, carry_over="everything", decay_from=None)
    elif not options.phase_steps:
        values["max_steps"] = None if options.epochs else preset.train_steps
    options = replace(options, **{name: v for name, v in values.items() if getattr(options, name) in (None, ())})
    if options.shard:
        why = "with --shard, where no process has a whole model to ask"
        check_useless(vars(options), why, "sample_prompts", "eval_task")
    settings = objective.resolved(settings, preset)
    tasks = downstream.read_tasks(options.eval_task, Path(__file__))  # before text is tokenised, which may take long
    known = (options, older, is_branch, preset, family, name, objective, settings)
    return Inputs(*known, ask_phases(options, settings), tasks, as_yaml, notices)


def row_lengths(options: Options, preset: Preset, is_given: bool) -> tuple[int, ...]:
    """Tokens of a row: the preset's; with a model that was named those of the run, else no more than it reads."""
    from lmscripts.models import building

    if preset.sequence_length and not is_given:
        return (preset.sequence_length,)
    if options.do_continue and (own := plan.lengths_of_run(Path(options.model_dir))):
        return own
    lengths = [length for length in (preset.sequence_length, building.longest_pretrained(preset)) if length]
    if not lengths:
        raise UserError(f"the model {building.origin(preset)} says no longest input: give --sequence_length")
    return (min(lengths),)


def ask_phases(options: Options, settings: Any) -> list[plan.PhaseSettings]:
    """What each phase is asked to be; one phase without --phase_steps."""
    steps = options.phase_steps or (options.max_steps,)
    of_objective = {name: value for name, value in asdict(settings).items() if isinstance(value, tuple)}
    names = ("dataset_dir", "sequence_length", "batch_size", "micro_batch_size", "micro_batch_tokens")
    values = plan.by_phase({name: getattr(options, name) for name in names} | of_objective, len(steps))
    stores = plan.open_stores(
        options.dataset_dir,
        options.tokenizer_dir,
        Path(options.model_dir),
        input_files=options.input_file,
        num_workers=options.num_workers or 2,
        sample=options.dry_run,
        validation_fraction=options.validation_fraction or 0.01,
        validation_files=options.validation_file,
    )
    phases = list[plan.PhaseSettings]()
    for number, value in zip(steps, values, strict=True):
        own = replace(settings, **{name: (value.pop(name),) for name in of_objective if name in value})
        store, tokens = stores[value.pop("dataset_dir", "")], value.pop("micro_batch_tokens", 0)
        value.setdefault("micro_batch_size", max(1, tokens // value["sequence_length"]) if tokens else None)
        ramp = () if phases else options.batch_ramp  # of the first phase alone
        value |= {"store": store, "steps": number, "epochs": options.epochs, "objective": own, "ramp": ramp}
        phases.append(plan.PhaseSettings(**value))
    return phases


# ---- the run, from top to bottom -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is trained, on what, and where it stands."""

    accelerator: Accelerator
    data: Phases
    rate: Callable[[int], float]  # learning rate of a step
    folder: RunFolder
    objective: Objective  # the models, and their loss
    model: Any  # the same, wrapped for the processes
    optimizer: Optimizer
    average: AveragedModel | None  # of the weights
    state: TrainingState
    stop_step: int  # where this job ends
    tasks: list[EvalTask]  # of the main process
    answer: Callable[[Objective], dict[str, list[str]]] | None = None  # what the models make of prompts


def main() -> None:
    """Parse, prepare, train, export."""
    from lmscripts.training.processes import agree, join, open_hub

    also = {**PRETRAINING, "beneath": plan.branch_options, "more": SETTINGS}
    with user_errors(only_words=True), join():
        options, further = parse_options(Options, description=__doc__ or "", **also)
        options = replace(options, **agree(vars(options), INPUTS))
        about = (options.push_to_hub, options.hub_private, options.language, options.license)
        run(options, further, *open_hub(*about, is_tried=options.dry_run))


def run(options: Options, further: Further, hub: Hub | None, of_hub: list[str]) -> None:
    """The whole run; ends the process with its exit code."""
    from transformers import logging

    from lmscripts.models import building
    from lmscripts.training import folder, optim, processes

    logging.disable_progress_bar()  # of transformers, at every save
    asked = read_inputs(options, further, of_hub)
    options, run_dir = asked.options, Path(options.model_dir)
    plan.check_unknown(asked.phases, options.max_unknown_share)
    wanted = {name: getattr(asked.older, name) for name in ("tokenizer_type", "mecab_dic", "word_tokenizer_type")}
    tokenizer, sources = plan.open_sources(asked.phases, asked.objective, options.packing, **wanted)
    accelerator = start(asked)
    if folder.goes_on_by_itself(accelerator, run_dir):
        options = replace(options, do_continue=True)
        asked = asked._replace(options=options)
    processes.only_deterministic(options.deterministic)
    like = folder.built_like(run_dir, options.do_continue, options.start_from if asked.is_branch else None)
    dropouts = building.choose_dropouts(asked.preset, like, options.hidden_dropout, options.attention_dropout)
    attention, notices = building.choose_attention(
        asked.preset,
        asked.name,
        options.attention,
        device=accelerator.device.type,
        precision=accelerator.mixed_precision,
        attention_dropout=dropouts.attention,
        like=like,
    )
    asked, of_compiling = decide_on_compiling(asked, accelerator)
    data = lay_out(asked, tokenizer, sources, accelerator, with_ends=attention == "varlen")
    prompts = read_prompts(asked, tokenizer, data, accelerator)
    rate = optim.Schedule(
        options.schedule,
        peak=options.learning_rate,
        warmup_steps=options.warmup_steps,
        max_steps=data.num_steps,
        decay_steps=options.decay_steps,
        final_ratio=options.final_lr_ratio or 0.0,
    )
    models, of_models = build_models(asked, tokenizer, data, attention, dropouts, like)
    autos = {export.subfolder: export.auto for export in asked.objective.EXPORTS}
    beside = folder.tokenizer_beside(tokenizer, models, autos, data.longest.layout.sequence_length)
    objective = objectives.trained(asked.name, asked.family, models, attention, asked.settings)
    words = {"attention": attention, "dropout": dropouts.words, "average": bool(options.ema_decay)}
    words |= {"sharded": options.shard, "schedule": options.schedule, "corners": [options.warmup_steps]}
    words["often"] = {name: value for name, value in vars(options).items() if name in OFTEN}
    words["unknown"] = [phase.store.unknown_share() for phase in asked.phases]
    said = plan.plan_text(data, rate, accelerator, objective=objective, **words)
    accelerator.print("\n".join([said, *notices, *of_compiling, *of_models, *remarks(asked, tokenizer)]), flush=True)
    if options.dry_run:
        return
    run_folder = folder.RunFolder(run_dir, asked.fixed, rate, beside, hub=hub)
    run = begin(asked, accelerator, data, rate, run_folder, objective, tokenizer)
    run.answer = (lambda trained: trained.answers(prompts, tokenizer, options.seed)) if prompts else None
    stopped_by = finish(asked, run, train(options, run))
    leave(processes.stopped_early(stopped_by) if stopped_by else 0)  # here, where model and processes still stand


def start(asked: Inputs) -> Accelerator:
    """Join the processes that the launcher started, once they are found to be asked for the same."""
    from lmscripts.training import processes

    options, preset, fp16_type = asked.options, asked.preset, asked.older.fp16_type
    accelerator = processes.start_processes(
        mixed_precision=processes.choose_precision(fp16_type, preset.fp16_type, preset.bf16, options.precision),
        timeout_seconds=options.timeout,
        trackers=options.tracker,
        project_dir=options.model_dir,
    )
    processes.check_agreement(asked.fixed | {"--shard": options.shard})
    if options.shard:
        processes.check_sharded(accelerator, options.optimizer, options.balance)
    return accelerator


def decide_on_compiling(asked: Inputs, accelerator: Accelerator) -> tuple[Inputs, list[str]]:
    """The options with an answer to --compile, and a sentence for the user."""
    from lmscripts.training import processes

    options, names = asked.options, ("deterministic", "activation_checkpointing", "shard")
    against = {name: bool(getattr(options, name)) for name in names} | {"balance auto": options.balance == "auto"}
    compiled, said = processes.choose_compile(options.compile, accelerator, **against)
    return asked._replace(options=replace(options, compile=compiled)), said


def lay_out(asked: Inputs, tokenizer: Any, sources: Any, accelerator: Accelerator, *, with_ends: bool) -> Phases:
    """Which process computes which rows of which step."""
    options = asked.options
    return plan.open_phases(
        asked.phases,
        sources,
        asked.objective,
        tokenizer,
        accelerator,
        with_ends=with_ends,
        seed=options.seed,
        most_eval_rows=options.eval_rows,
        node_rank=options.node_rank,
        node_batch_sizes=asked.preset.node_batch_sizes,
        weights=options.process_shares or None,
        aligned=options.shard,
        same_keys=bool(options.compile),
    )


def read_prompts(asked: Inputs, tokenizer: Any, data: Phases, accelerator: Accelerator) -> dict[str, list[int]]:
    """Ids of --sample_prompts by their text."""
    from lmscripts.training import processes

    if not (given := asked.options.sample_prompts):
        return {}
    if not any(phase.num_eval_rows for phase in data.phases):
        check_useless(
            {"sample_prompts": given}, "without held-out rows, whose evaluation it goes with", "sample_prompts"
        )
    length = data.longest.layout.sequence_length
    return processes.from_main(accelerator, partial(objectives.read_prompts, given, asked.objective, tokenizer, length))


def build_models(
    asked: Inputs, tokenizer: Any, data: Phases, attention: Attention, dropouts: Dropouts, like: Path | None
) -> tuple[dict[str, PreTrainedModel], list[str]]:
    """The models, anew or from another model, and sentences for the user; a checkpoint's weights come later."""
    from lmscripts.models import building
    from lmscripts.training import folder

    models, notices = building.build(
        asked.preset,
        asked.name,
        tokenizer,
        data.longest.layout,
        like=like,
        seed=asked.options.seed,
        path=attention,
        dropouts=dropouts,
        origin=folder.carried_from(asked.options.start_from) if like is None and len(tokenizer) % 64 else None,
    )
    if asked.options.activation_checkpointing:
        building.recompute_activations(models)
    return models, notices


def remarks(asked: Inputs, tokenizer: Any) -> list[str]:
    """What a user should know of options, tokenizer and text."""
    of_objective = asked.objective.remarks(tokenizer) if hasattr(asked.objective, "remarks") else []
    of_stores = [sentence for phase in asked.phases for sentence in phase.store.sentences()]
    return list(dict.fromkeys([*asked.notices, *of_objective, *of_stores, *map(str, asked.tasks)]))


def begin(
    asked: Inputs,
    accelerator: Accelerator,
    data: Phases,
    rate: Callable[[int], float],
    run_folder: RunFolder,
    objective: Objective,
    tokenizer: Any,
) -> Run:
    """Take the run's folder; models, optimizer and state as the newest checkpoint has them, or as at a beginning."""
    from lmscripts.evaluation import downstream
    from lmscripts.models import building
    from lmscripts.training import optim, processes

    options = asked.options
    which = {"start_from": options.start_from, "carry_over": options.carry_over, "branch": asked.is_branch}
    for notice in run_folder.enter(accelerator, objective.models, options.do_continue, **which, tokenizer=tokenizer):
        accelerator.print(notice, flush=True)
    if options.compile:
        objective.compile(dynamic=False)
    average = optim.start_average(objective, options.ema_decay)
    model = processes.prepare(accelerator, objective, average, sharded=options.shard)
    optimizer = optim.build_optimizer(
        options.optimizer,
        objective,
        learning_rate=options.learning_rate,
        betas=(options.beta1, options.beta2),
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
    )
    optimizer = optim.with_scaler(accelerator, optimizer)
    kept = {"average": average, "optimizer_name": options.optimizer}
    state = run_folder.restore(accelerator, objective, optimizer, **kept)
    stop_step = min(data.num_steps, options.stop_at_step or data.num_steps)
    if not run_folder.continued:
        if state.step >= stop_step:
            raise UserError(
                f"the run that was carried over is at step {state.step:,}, and this one ends at step {stop_step:,}: "
                "give a longer --max_steps, or --carry_over moments to count steps anew"
            )
        state.origin = options.start_from or building.origin(asked.preset)
    if accelerator.is_main_process:
        run_folder.write_options(asked.as_yaml)
    data, said = plan.fit_rows(accelerator, data, objective, state)
    accelerator.print("".join(f"{sentence}\n" for sentence in said), end="", flush=True)
    tasks = downstream.with_rows(asked.tasks, tokenizer, data.longest.layout.sequence_length)
    return Run(accelerator, data, rate, run_folder, objective, model, optimizer, average, state, stop_step, tasks)


def train(options: Options, run: Run) -> str:
    """The loop; what stopped it before its last step, empty where nothing did."""
    from accelerate.utils import send_to_device

    from lmscripts.training import log, optim, processes

    accelerator, data, state, objective, model = run.accelerator, run.data, run.state, run.objective, run.model
    rank, device, has_scaler = accelerator.process_index, accelerator.device, accelerator.scaler is not None
    stop_asked = processes.StopRequest(STARTED + parse_duration(options.max_time))
    meter = log.Meter(device, *state.open_window(rank), model)
    report = log.Reporter(accelerator, run.folder.path, state.step, run.stop_step, run.folder.continued)
    batches = meter.batches(accelerator, data, state, run.stop_step, report, options.balance)
    model.train()
    stopped = stopped_while_evaluating(options, run, meter, report, stop_asked)
    while state.step < run.stop_step and not stopped:
        micro_batches, counts = next(batches)
        with meter.waiting():
            *totals, stops = processes.sum_over_processes(accelerator, [*counts.values(), float(stop_asked())])
        targets = dict(zip(counts, totals, strict=True))
        learning_rate = run.rate(state.step)
        optim.set_rate(run.optimizer, learning_rate)
        processes.seed_dropout(options.seed, state.step, rank)
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                sums = model(send_to_device(batch, device, non_blocking=True))
                # DDP takes the mean of the gradients over the processes; wanted is the sum over all targets.
                accelerator.backward(objective.loss(sums, targets) * accelerator.num_processes)
            meter.add_sums(sums)
        norm = optim.clip_gradients(accelerator, model, options.max_grad_norm or inf)
        finite = optim.step(run.optimizer, norm, state, has_scaler=has_scaler, at_once=run.average is not None)
        if finite and run.average:
            optim.update_average(run.average, objective)
        phase = data.of_step(state.step)
        state.step += 1
        state.real_tokens += targets["tokens"]
        length = phase.layout.sequence_length
        meter.add_step(targets, data.positions(state.step - 1) * objective.flops_per_position(length, phase.slots))
        report.advance(state.step)

        if state.step % options.logging_steps == 0 or state.step == data.num_steps:
            record = meter.read(accelerator, objective.metrics)
            state.settle()  # the norm is waited for here
            more = {"learning_rate": learning_rate, "gradient_norm": float(norm), "tokens": state.real_tokens}
            report(state.step, record | more | {"skipped_steps": state.skipped_steps}, log.in_words(record))
        stopped = stops > 0 or stopped_while_evaluating(options, run, meter, report, stop_asked)
        if stopped or state.step == run.stop_step or data.is_due(state.step, options.save_steps):
            with meter.paused():
                state.window_sums, state.window_counts = meter.open_window(accelerator)
                run.folder.save(accelerator, objective, run.optimizer, state, run.average)
            if accelerator.is_main_process:
                run.folder.prune(options.keep_last, options.keep_every)
    batches.close()
    report.bar.close()
    run.folder.wait(accelerator)
    return stop_asked.words() if stopped else ""


def stopped_while_evaluating(
    options: Options, run: Run, meter: Meter, report: Reporter, stop_asked: StopRequest
) -> bool:
    """Evaluate on held-out rows and tasks where that is due; whether a process was asked to stop meanwhile."""
    from lmscripts.evaluation import downstream
    from lmscripts.training import log

    state, phase = run.state, run.data.of_step(run.state.step - 1)
    asked_for = phase.num_eval_rows or options.eval_task or run.answer
    if not asked_for or state.evaluated_step == state.step:
        return False
    if not run.data.is_due(state.step, options.eval_every) and state.step != run.data.num_steps:
        return False
    judged = run.average.module if run.average else run.objective
    held_out = (phase.eval_batch, phase.num_eval_rows, phase.micro_batch_size)
    with meter.paused():
        result, _ = downstream.evaluate(run.accelerator, judged, *held_out, stop_asked)
        probed: downstream.Scored | None = []
        if options.eval_task and result is not None:
            probed = downstream.probe(run.accelerator, judged, run.tasks, stop_asked)
    if result is None or probed is None:
        return True
    state.evaluated_step = state.step
    if result:
        report(state.step, {f"eval_{name}": v for name, v in result.items()}, f"held-out {log.in_words(result)}")
        if not isfinite(result["loss"]):
            raise UserError(
                f"the held-out loss after step {state.step:,} is no finite number: lower the learning rate; the last "
                "checkpoint is from before"
            )
    for record, words in probed:
        report(state.step, record, words)
    if run.answer:
        with meter.paused():
            if run.accelerator.is_main_process:
                report.texts(state.step, partial(run.answer, judged))
            run.accelerator.wait_for_everyone()
    return False


def finish(asked: Inputs, run: Run, stopped_by: str) -> str:
    """Draw the curves, and export the model where the schedule was run to its end; what stopped that, if anything."""
    from lmscripts.training import log

    accelerator, data, state, run_dir = run.accelerator, run.data, run.state, run.folder.path
    complete = not stopped_by and state.step == data.num_steps
    if stopped_by:
        accelerator.print(
            f"stopped by {stopped_by} at step {state.step:,}; everything is saved, go on with --do_continue"
        )
    elif not complete:
        accelerator.print(f"--stop_at_step {run.stop_step} is reached; go on with --do_continue")
    elif state.nonfinite_streak and accelerator.scaler is None:
        raise UserError(f"the last {state.nonfinite_streak} steps had no finite gradient: no model was written")
    elif accelerator.is_main_process:
        final = run.folder.export(state.step, None, partial(describe, asked, run), run.average)
        places = f"the curves in {run_dir / 'curves.png'}, the numbers in {run_dir / 'log.jsonl'}"
        accelerator.print(f"the model is in {final}, {places}")
    if accelerator.is_main_process:  # last, as nothing depends on it
        log.draw_curves(run_dir, data.ends[:-1])
    if complete and asked.options.eval_task:
        stopped_by = fine_tune(asked, run)
    if not stopped_by:
        run.folder.publish(accelerator, run_dir / "final" if complete else None, state.step)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return stopped_by


def describe(asked: Inputs, run: Run, model_dir: Path) -> str:
    """The text of the model card."""
    from lmscripts.evaluation import downstream
    from lmscripts.training import folder

    run_dir, options = run.folder.path, asked.options
    about = folder.About(run.folder.hub, options.language, options.license)
    what = (run.state.origin, asked.objective, run.data, [phase.store for phase in asked.phases], run_dir)
    title = f"{run_dir.name}: {options.model_type}"
    more = downstream.card_rows(run_dir) if options.eval_task else {}
    return folder.pretraining_card(title, *what, asked.as_yaml, about, model_dir, more)


def fine_tune(asked: Inputs, run: Run) -> str:
    """A classifier of each task from the exported model; what stopped it, if anything."""
    from lmscripts.evaluation import downstream
    from lmscripts.training import processes

    accelerator, run_dir, final = run.accelerator, run.folder.path, run.folder.path / "final"
    stop_asked = processes.StopRequest(STARTED + parse_duration(asked.options.max_time))
    width = run.objective.models[""].config.hidden_size
    stopped_by = ""
    if downstream.finetune(accelerator, run.tasks, run_dir, Path(__file__), run.state.step, width, stop_asked):
        stopped_by = stop_asked.words()
        accelerator.print(f"fine-tuning was stopped by {stopped_by}; the model is whole, go on with --do_continue")
    if accelerator.is_main_process:
        (final / "README.md").write_text(describe(asked, run, final), encoding="utf-8")
    return stopped_by


if __name__ == "__main__":
    main()
