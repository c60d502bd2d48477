"""Train a policy on annotated decisions: what was known, which candidates there were, which of them was chosen.

python scripts/train_policy.py --training-data store --training-batch-size 256 --model-preset tiny --output-prefix runs

Decisions are a store of prepare_annotations.py, or text. Writes PREFIX/NAME/ with config.yaml, log.jsonl, curves.png,
TensorBoard files, snapshots/, and final/: the model with its card. --resume goes on from the newest whole snapshot.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError, leave, user_errors
from lmscripts.options import (
    POLICY,
    check_numbers,
    check_useless,
    dump_options,
    option,
    parse_duration,
    parse_options,
    parse_options_with_origin,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from lmscripts.data.decision_preparation import Decisions
    from lmscripts.data.decision_rows import Steps
    from lmscripts.models.policy import PolicyModel
    from lmscripts.objectives.module import Objective
    from lmscripts.training.folder import RunFolder
    from lmscripts.training.hub import Hub
    from lmscripts.training.log import Meter, Reporter
    from lmscripts.training.processes import StopRequest
    from lmscripts.training.state import TrainingState

STARTED = monotonic()  # the time of a job counts from here, not from when the imports are done
Preset = Literal["tiny", "mini", "small", "base", "large"]
OptimizerName = Literal["sgd", "adam", "radam", "lamb", "adamw", "muon"]
Precision = Literal["no", "fp16", "bf16", "fp16_on_gpu"]
Balance = Literal["even", "auto"]
SIZES = ("dimension", "num_heads", "num_layers", "dim_feedforward", "dim_final_feedforward")
INPUTS = ("training_data", "validation_data", "schema", "initial_encoder", "initial_decoder")
INITIAL = ("initial_encoder", "initial_decoder", "initial_optimizer")
POSITIVE = [
    "dimension", "num_heads", "dim_feedforward", "num_layers", "dim_final_feedforward", "training_batch_size",
    "validation_batch_size", "micro_batch_size", "gradient_accumulation_steps", "learning_rate", "epsilon",
    "num_epoch_digits", "keep_snapshots", "stop_at_step", "logging_steps", "expected_processes", "timeout"
]  # fmt: skip
NOT_NEGATIVE = [
    "snapshot_interval", "num_workers", "weight_decay", "warmup_steps", "max_gradient_norm", "value_weight", "seed"
]  # fmt: skip
BELOW_ONE = [
    "dropout", "attention_dropout", "momentum", "beta1", "beta2", "label_smoothing", "final_lr_ratio",
    "validation_share"
]  # fmt: skip
# What must stay as it was when a run is resumed.
FIXED = [
    "original", "dropout", "attention_dropout", "freeze_encoder", "objective", "value_weight", "label_smoothing",
    "optimizer", "momentum", "learning_rate", "epsilon", "beta1", "beta2", "weight_decay", "schedule", "warmup_steps",
    "final_lr_ratio", "max_gradient_norm", "seed"
]  # fmt: skip
USE = """from lmscripts.models.policy import PolicyModel

model = PolicyModel.from_pretrained("PATH/TO/THIS/FOLDER")"""
LIMITS = """It chooses as those chose whose decisions it has seen, good or bad. What it says of situations that are
rare in them was hardly measured."""


# ---- options -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key, with dashes or underscores."""

    training_data: tuple[str, ...] = option(
        (), help="a store, or text: files, patterns, folders", required=True, group="data"
    )
    validation_data: tuple[str, ...] = option((), help="likewise; default: what the store holds out", group="data")
    schema: str | None = option(None, help="of text: a built-in one (kanachan-v1) or a JSON file", group="data")
    validation_share: float = option(0.0, help="of text: share of the games held out", group="data")
    on_bad_row: Literal["skip", "fail"] = option("skip", help="leave bad lines out, or stop", group="data")
    num_workers: int = option(2, help="processes that parse text; nothing depends on it", group="data", most=1024)

    model_preset: Preset | None = option(None, help="sizes, each of which the next options override", group="model")
    dimension: int | None = option(None, help="width", group="model", most=10**6)
    num_heads: int | None = option(None, help="attention heads of a layer", group="model", most=10**6)
    dim_feedforward: int | None = option(None, help="default: 4 times the width", group="model", most=10**7)
    num_layers: int | None = option(None, help="layers", group="model", most=1000)
    dim_final_feedforward: int | None = option(
        None, help="hidden width of the heads; default: --dim-feedforward", group="model", most=10**7
    )
    activation_function: Literal["relu", "gelu"] = option("gelu", help="of feed-forward networks", group="model")
    dropout: float = option(0.1, help="of hidden states", group="model")
    attention_dropout: float | None = option(None, help="default: 0; with --original the dropout", group="model")
    original: bool = option(False, help="the older trainer's network, exactly", group="model")
    initial_encoder: str | None = option(None, help="begin with the encoder of another model", group="model")
    initial_decoder: str | None = option(None, help="begin with the heads of another model", group="model")

    objective: Literal["choice", "choice+value"] = option("choice", help="also what came of it", group="training")
    value_weight: float = option(1.0, help="of the value in the loss, beside the choice", group="training")
    label_smoothing: float = option(0.0, help="share spread over all candidates", group="training")
    training_batch_size: int = option(
        help="records of a forward pass, all processes", required=True, group="training", most=10**9
    )
    validation_batch_size: int | None = option(
        None,
        help="of validation, on each process, so that figures do not depend on their number; default: the same",
        group="training",
        most=10**9,
    )
    gradient_accumulation_steps: int = option(1, help="such batches per step", group="training", most=10**6)
    micro_batch_size: int | None = option(
        None, help="of one process; default: its equal part of the batch", group="training", most=10**9
    )
    process_shares: tuple[int, ...] = option((), help="relative records of each process: 3 1", group="training")
    balance: Balance = option("even", help="auto: divide them by measured speed", group="training")
    num_epochs: int = option(1, help="in all, also of a resumed run; -1 = endless, 0 = only validate", group="training")
    freeze_encoder: bool = option(False, help="train the heads alone, without dropout below", group="training")
    optimizer: OptimizerName = option("lamb", help="muon is for the layers' matrices, with adamw", group="training")
    momentum: float | None = option(None, help="of sgd (0.9)", group="training")
    learning_rate: float | None = option(None, help="0.1 for sgd, else 0.001", group="training")
    epsilon: float | None = option(None, help="1e-6 for lamb, else 1e-8; sgd has none", group="training")
    beta1: float = option(0.9, help="decay of the first moment", group="training")
    beta2: float = option(0.999, help="of the second", group="training")
    weight_decay: float | None = option(
        None, help="on matrices only; 0.01 for lamb, adamw and muon, else 0", group="training"
    )
    initial_optimizer: str | None = option(
        None, help="run or snapshot whose optimizer's state to take", group="training"
    )
    schedule: Literal["constant", "linear", "cosine"] = option("constant", help="after the warmup", group="training")
    warmup_steps: int = option(0, help="steps of rising rate", group="training")
    final_lr_ratio: float | None = option(None, help="where the decay ends, as a share (0)", group="training")
    max_gradient_norm: float = option(1.0, help="clip the global gradient norm; 0 = never", group="training")
    seed: int = option(42, help="decides weights, order and dropout", group="training", most=2**63 - 1)

    output_prefix: str = option(help="folder of the runs", required=True, group="run", writes="folder")
    experiment_name: str | None = option(None, help="of this run; default: the time it starts", group="run")
    resume: bool = option(False, help="go on from the newest whole snapshot of PREFIX/NAME", group="run")
    num_epoch_digits: int = option(2, help="in the names of snapshots", group="run", most=18)
    snapshot_interval: int = option(0, help="records between snapshots, beside each epoch's; 0 = those", group="run")
    keep_snapshots: int | None = option(None, help="newest ones to keep; default: all", group="run")
    dry_run: bool = option(False, help="print the plan and exit", group="run")
    stop_at_step: int | None = option(None, help="end this job after so many steps, snapshot taken", group="run")
    max_time: str | None = option(None, help="end this job after this time, such as 90m or 11h30m", group="run")
    logging_steps: int = option(10, help="steps between log lines", group="run")
    tracker: tuple[str, ...] = option(
        ("tensorboard",), help="none, or any that accelerate knows: wandb trackio mlflow ...", group="run"
    )
    tracker_project: str | None = option(None, help="where it is not tensorboard (lmscripts)", group="run")

    device: str | None = option(None, help="cpu, cuda or cudaN; default: what there is", group="machine")
    precision: Precision | None = option(None, help="default: the Accelerate config's, or the GPU's", group="machine")
    deterministic: bool = option(False, help="only operations that give the same bits again", group="machine")
    checkpointing: bool = option(False, help="save memory, recompute activations", group="machine")
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
        values, name = vars(self), self.experiment_name
        check_numbers(values, positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
        if self.push_to_hub is None:
            check_useless(values, "without --push_to_hub", "hub_private")
        parse_duration(self.max_time)
        if self.num_epochs < -1:
            raise UserError(f"--num-epochs must be at least 0, or -1 for no end, got {self.num_epochs}")
        if self.resume and name is None:
            raise UserError("--resume goes on with PREFIX/NAME: give --experiment-name too")
        if name is not None and (Path(name).name != name or name in ("", "..") or "\0" in name):
            raise UserError(f"--experiment-name {name!r} is no name of a folder: put folders into --output-prefix")
        if self.optimizer != "sgd":
            check_useless(values, f"on --optimizer {self.optimizer}", "momentum")
        elif self.epsilon is not None:
            check_useless(values, "on --optimizer sgd", "epsilon")
        if self.schedule == "constant":
            check_useless(values, "with --schedule constant", "final_lr_ratio")
        elif self.num_epochs == -1:
            raise UserError(f"--schedule {self.schedule} needs an end, and --num-epochs -1 has none")
        if self.balance == "auto":
            check_useless(values, "with --balance auto, which measures them", "process_shares")
        if self.validation_data and self.validation_share:
            raise UserError("give --validation-data or --validation-share, not both")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:?\d+)?", self.device):
            raise UserError(f"--device must be cpu, cuda or cudaN, got {self.device}")


def settled(options: Options, origins: dict[str, str]) -> Options:
    """The options with what follows from others.

    Raises:
        UserError: a run that is resumed is to begin with something else.
    """
    given = [f"--{name.replace('_', '-')}" for name in INITIAL if origins[name] == "command line"]
    if options.resume and given:
        raise UserError(f"{given[0]} is for a run that begins, --resume for one that goes on: give one of them")
    from lmscripts.training.processes import run_folder

    if options.resume:  # what the run began with stays written down, and counts until it has a snapshot
        file = run_folder(Path(options.output_prefix, str(options.experiment_name)), True) / "config.yaml"
        argv = ["--config", str(file)]
        before = parse_options(Options, description="", argv=argv, **POLICY) if file.is_file() else options
        options = replace(options, **{name: getattr(before, name) for name in INITIAL})
    name = options.optimizer
    usual = {
        "learning_rate": 0.1 if name == "sgd" else 0.001,
        "epsilon": None if name == "sgd" else 1e-6 if name == "lamb" else 1e-8,
        "momentum": 0.9 if name == "sgd" else None,
        "weight_decay": 0.01 if name in ("lamb", "adamw", "muon") else 0.0,
        "validation_batch_size": options.training_batch_size,
    }
    return replace(options, **{name: value for name, value in usual.items() if getattr(options, name) is None})


def choose_device(device: str | None) -> None:
    """Let torch, which is not imported yet, see the device that was asked for and no other."""
    if device is None or device == "cuda":
        return
    number = device.removeprefix("cuda").removeprefix(":")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if device != "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {device} is one GPU, and several processes were started: give --device cuda")
    if device != "cpu" and visible and int(number) >= len(visible):
        raise UserError(f"--device {device} is not there: CUDA_VISIBLE_DEVICES is {','.join(visible)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else visible[int(number)] if visible else number


# ---- the run, from top to bottom -------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The policy's part of `lmscripts.training.state.TrainingState`."""

    records: int = 0  # trained on, those of all epochs
    best_epoch: int = 0  # with the lowest validation loss, from 1; 0 before there is one
    best: dict[str, float] = field(default_factory=dict)  # its figures


@dataclass
class Run:
    """What is trained, on what, and where it stands."""

    accelerator: Accelerator
    data: Decisions
    steps: Steps  # which records make up which step
    rate: Callable[[int], float]  # learning rate of a step
    folder: RunFolder
    objective: Objective  # the model, and its loss
    model: Any  # the same, wrapped for the processes
    optimizer: Optimizer
    state: TrainingState
    num_steps: int
    stop_step: int  # where this job ends


def main() -> None:
    """Parse, prepare, train, export."""
    from lmscripts.training.processes import agree, join, open_hub

    with user_errors(only_words=True), join():
        options = settled(*parse_options_with_origin(Options, description=__doc__ or "", **POLICY))
        options = replace(options, **agree(vars(options), INPUTS))
        about = (options.push_to_hub, options.hub_private, options.language, options.license)
        run(options, *open_hub(*about, is_tried=options.dry_run))


def run(options: Options, hub: Hub | None, of_hub: list[str]) -> None:
    """The whole run; ends the process with its exit code."""
    choose_device(options.device)
    import torch
    from transformers import logging

    from lmscripts.data.decision_preparation import open_parts
    from lmscripts.models import policy
    from lmscripts.training import folder, log, optim, processes

    logging.disable_progress_bar()  # of transformers, at every save
    processes.check_trackers(options.tracker)
    if options.device and options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {options.device} was asked for, and this machine shows no such GPU")
    sizes = policy.sizes(options.model_preset, **{name: getattr(options, name) for name in SIZES})
    how = {name: getattr(options, name) for name in ("schema", "validation_share", "num_workers", "on_bad_row")}
    prefix = Path(options.output_prefix)
    data = open_parts(options.training_data, options.validation_data, prefix / "NAME", **how)
    if data.held_out is None and options.num_epochs == 0:
        raise UserError("--num-epochs 0 validates only, and there is nothing held out: give --validation-data")
    accelerator = start(options, data)
    processes.only_deterministic(options.deterministic)
    started = processes.from_main(accelerator, partial(name_of_run, prefix))
    options = replace(options, experiment_name=options.experiment_name or started)
    run_dir = prefix / str(options.experiment_name)
    if folder.goes_on_by_itself(accelerator, run_dir):
        options = replace(options, resume=True)
    accelerator.project_configuration.logging_dir = str(run_dir)
    network, notices = build_model(options, data, sizes)
    steps = lay_out(options, data, accelerator)
    num_steps = log.ENDLESS if options.num_epochs == -1 else steps.per_epoch * options.num_epochs
    rate = optim.Schedule(
        options.schedule,
        peak=options.learning_rate,
        warmup_steps=options.warmup_steps,
        max_steps=num_steps,
        final_ratio=options.final_lr_ratio or 0.0,
    )
    beside = folder.nothing_beside({"": network}, {"": "AutoModel"})
    shown = steps.per_epoch if options.num_epochs == -1 else max(1, num_steps)
    rates = f"rates: {options.schedule}: {optim.rates_text(rate, shown, [options.warmup_steps])}"
    said = [*of_hub, *data.sentences, *notices, *plan_lines(options, accelerator, data, steps, network), rates]
    accelerator.print("\n".join(said), flush=True)
    if options.dry_run:
        return
    names = partial(steps.snapshot, digits=options.num_epoch_digits)
    run_folder = folder.RunFolder(run_dir, fixed_facts(options, data), rate, beside, names, hub)
    run = begin(options, accelerator, data, steps, rate, run_folder, network, num_steps)
    stopped_by = train(options, run)
    finish(options, run, stopped_by)
    leave(processes.stopped_early(stopped_by) if stopped_by else 0)  # here, where model and processes still stand


def name_of_run(prefix: Path) -> str:
    """The time now, or when this job began its run if an elastic launcher has started it anew."""
    from lmscripts.training import folder

    own = (file.parent for file in prefix.glob(f"*/{folder.LOCK}") if folder.is_started_again(file.parent))
    return next((path.name for path in own), f"{datetime.now():%Y-%m-%d-%H-%M-%S}")


def start(options: Options, data: Decisions) -> Accelerator:
    """Join the processes that the launcher started, once they are found to be asked for the same."""
    from lmscripts.training import processes

    accelerator = processes.start_processes(
        mixed_precision=processes.choose_precision(None, 0, False, options.precision),
        timeout_seconds=options.timeout,
        trackers=options.tracker,
        project_dir=options.output_prefix,
    )
    if processes.asked_of_launcher():
        raise UserError("policies are trained with whole copies of the model: choose a config without FSDP")
    processes.check_agreement(fixed_facts(options, data))
    return accelerator


def fixed_facts(options: Options, data: Decisions) -> dict[str, Any]:
    """What must be the same on all processes, and stay as it was when the run is resumed."""
    fixed = {name: value for name, value in vars(options).items() if name in FIXED} | data.fingerprints
    fixed["step_records"] = options.training_batch_size * options.gradient_accumulation_steps
    return fixed | ({} if options.schedule == "constant" else {"num_epochs": options.num_epochs})


def build_model(options: Options, data: Decisions, sizes: dict[str, int]) -> tuple[PolicyModel, list[str]]:
    """The model, anew or from parts of others, and sentences for the user; a snapshot's weights come later."""
    from lmscripts.models import policy
    from lmscripts.training import folder

    network = policy.build(
        data.schema,
        sizes,
        seed=options.seed,
        original=options.original,
        activation_function=options.activation_function,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        value_head=options.objective == "choice+value",
        recompute=options.checkpointing,
    )
    run_dir = Path(options.output_prefix, str(options.experiment_name))
    begins = folder.built_like(run_dir, options.resume, None) is None
    notices = policy.load_parts(network, options.initial_encoder, options.initial_decoder) if begins else []
    if options.freeze_encoder:
        policy.freeze_encoder(network)
    return network, notices


def lay_out(options: Options, data: Decisions, accelerator: Accelerator) -> Steps:
    """Which process computes which records of which step."""
    from lmscripts.objectives import choice
    from lmscripts.training import processes

    nodes, records = processes.nodes_of_processes(accelerator), options.training_batch_size
    step_records = records * options.gradient_accumulation_steps
    return choice.Steps(
        data.train,
        data.schema,
        options.objective == "choice+value",
        batch_size=step_records,
        micro_batch_size=options.micro_batch_size or -(-records // accelerator.num_processes),
        shares=processes.process_shares(step_records, nodes, weights=options.process_shares or None),
        seed=options.seed,
        pin_memory=accelerator.device.type == "cuda",
    )


def plan_lines(
    options: Options, accelerator: Accelerator, data: Decisions, steps: Steps, network: PolicyModel
) -> list[str]:
    """What is going to be done, in words."""
    from lmscripts.models import policy
    from lmscripts.training import processes

    parameters, records = network.num_parameters(), data.train.num_records
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    tokens = len(data.train.ids) + records * data.schema.num_numeric
    number, share = options.num_epochs, steps.shares[accelerator.process_index] / sum(steps.shares)
    operations = policy.flops(network, round(tokens / records), steps.mean_candidates) * tokens * share
    time = processes.guessed_time(operations * max(1, number), accelerator, "fewer --num-epochs")[1]
    epochs = "epochs without end" if number == -1 else f"{number} epoch{'s' * (number != 1)} in all"
    held_out = f"{data.held_out.num_records:,} held out" if data.held_out else "none held out"
    return [
        f"data: {records:,} decisions ({tokens:,} tokens, {data.schema.name}), {held_out}",
        f"model: {parameters:,} parameters, {trained:,} of them trained",
        f"{epochs}, those of a resumed run included, of {steps.per_epoch:,} steps; a step has "
        f"{options.training_batch_size:,} x {options.gradient_accumulation_steps} decisions, divided among the "
        f"processes as {':'.join(map(str, steps.shares))}, at most {steps.micro_batch_size:,} at once",
        *([f"time{' of an epoch' if number == -1 else ''}: {time}"] if number else []),
        f"memory: about {(8 * parameters + 8 * trained) / 2**20:,.0f} MiB per process for weights, gradients and "
        f"moments; disk: about {(4 * parameters + 8 * trained) / 2**20:,.0f} MiB a snapshot",
        f"processes: {processes.in_words(accelerator)}",
    ]


def begin(
    options: Options,
    accelerator: Accelerator,
    data: Decisions,
    steps: Steps,
    rate: Callable[[int], float],
    run_folder: RunFolder,
    network: PolicyModel,
    num_steps: int,
) -> Run:
    """Take the run's folder; model, optimizer and state as the newest snapshot has them, or as at a beginning."""
    from lmscripts.objectives import choice
    from lmscripts.training import folder, optim

    notices = run_folder.enter(accelerator, {"": network}, options.resume)
    judged = {"value_weight": options.value_weight, "label_smoothing": options.label_smoothing}
    objective = choice.trained(network, choice.Settings(options.objective == "choice+value", **judged))
    optimizer = optim.build_optimizer(
        options.optimizer,
        objective,
        learning_rate=options.learning_rate,
        betas=(options.beta1 if options.momentum is None else options.momentum, options.beta2),
        epsilon=options.epsilon or 0.0,
        weight_decay=options.weight_decay,
    )
    model, optimizer = accelerator.prepare(objective), optim.with_scaler(accelerator, optimizer)
    state = run_folder.restore(accelerator, objective, optimizer, own=Progress())
    if options.initial_optimizer and not run_folder.continued:
        notices += folder.load_moments(options.initial_optimizer, objective, optimizer, options.optimizer)
    accelerator.print("".join(f"{notice}\n" for notice in notices), end="", flush=True)
    if 0 < num_steps < state.step:
        epochs = -(-state.step // steps.per_epoch)
        raise UserError(f"the run is in epoch {epochs}, and --num-epochs {options.num_epochs} counts all of them")
    if options.num_epochs == 0:
        state.evaluated_step = -1  # whatever was judged before, this is what was asked for
    if not run_folder.continued:
        state.origin = " and ".join(dict.fromkeys(filter(None, (options.initial_encoder, options.initial_decoder))))
    if accelerator.is_main_process:
        run_folder.write_options(dump_options(options))
    stop_step = max(state.step, min(num_steps, options.stop_at_step or num_steps))
    about = (objective, model, optimizer, state, num_steps, stop_step)
    return Run(accelerator, data, steps, rate, run_folder, *about)


def train(options: Options, run: Run) -> str:
    """The loop; what stopped it before its last step, empty where nothing did."""
    from accelerate.utils import send_to_device

    from lmscripts.training import log, optim, processes

    accelerator, steps, state, objective, model = run.accelerator, run.steps, run.state, run.objective, run.model
    rank, device, has_scaler = accelerator.process_index, accelerator.device, accelerator.scaler is not None
    stop_asked = processes.StopRequest(STARTED + parse_duration(options.max_time))
    meter = log.Meter(device, *state.open_window(rank), model)
    report = log.Reporter(accelerator, run.folder.path, state.step, run.stop_step, run.folder.continued)
    batches = meter.batches(accelerator, steps, state, run.stop_step, report, options.balance)
    model.train()
    stopped = stopped_while_validating(options, run, meter, report, stop_asked)
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
        norm = optim.clip_gradients(accelerator, model, options.max_gradient_norm or inf)
        optim.step(run.optimizer, norm, state, has_scaler=has_scaler)
        state.step += 1
        state.real_tokens += targets["tokens"]
        state.own.records = steps.records(state.step)
        meter.add_step(targets)
        report.advance(state.step)

        if state.step % options.logging_steps == 0 or state.step == run.num_steps:
            record = meter.read(accelerator, objective.metrics)
            more = {"learning_rate": learning_rate, "gradient_norm": float(norm), "records": state.own.records}
            tags = {"Training loss": record["loss"], "Gradient norm": float(norm)}
            report(state.step, record | more, log.in_words(record), tags, state.own.records)
        stopped = stops > 0 or stopped_while_validating(options, run, meter, report, stop_asked)
        if stopped or state.step == run.stop_step or steps.is_due(state.step, options.snapshot_interval):
            with meter.paused():
                state.window_sums, state.window_counts = meter.open_window(accelerator)
                run.folder.save(accelerator, objective, run.optimizer, state)
            if accelerator.is_main_process:
                run.folder.prune(options.keep_snapshots or log.ENDLESS, best=lambda saved: saved["best_epoch"])
    batches.close()
    report.bar.close()
    run.folder.wait(accelerator)
    return stop_asked.words() if stopped else ""


def stopped_while_validating(
    options: Options, run: Run, meter: Meter, report: Reporter, stop_asked: StopRequest
) -> bool:
    """Validate before the first epoch and after each, and keep the best; whether a process was asked to stop then."""
    from lmscripts.evaluation import decisions
    from lmscripts.training import folder, log, processes

    accelerator, data, state, own = run.accelerator, run.data, run.state, run.state.own
    epoch, inside = divmod(state.step, run.steps.per_epoch)
    if data.held_out is None or state.evaluated_step == state.step or (inside and options.num_epochs):
        return False
    most = options.validation_batch_size  # on each process: batches are the same for any number of them
    with meter.paused():
        judged = decisions.judge(accelerator, run.objective, data.held_out, data.schema, most, stop_asked)
    if judged is None:
        return True
    found = decisions.report(judged)
    metrics, state.evaluated_step = found["metrics"], state.step
    record = {f"eval_{name}": value for name, value in metrics.items()}
    if run.objective.settings.value:  # where the loss of training is a sum
        record["eval_choice_loss"] = metrics["loss"]
    tags = {"Validation epoch loss": metrics["loss"]}
    report(state.step, record, f"held-out {log.in_words(metrics)}", tags, epoch)
    if state.step >= run.stop_step:
        accelerator.print(decisions.in_words(found), flush=True)
    if epoch and not inside and metrics["loss"] < own.best.get("loss", inf):
        own.best_epoch, own.best = epoch, metrics
        best = partial(folder.keep_best, run.folder.path, str(epoch), run.objective.models[""])
        processes.from_main(accelerator, best)
    return False


def finish(options: Options, run: Run, stopped_by: str) -> None:
    """Draw the curves, and export the best model where all epochs are done."""
    from lmscripts.training import folder, log, processes

    accelerator, state, run_dir, best = run.accelerator, run.state, run.folder.path, run.state.own.best_epoch
    if stopped_by:
        accelerator.print(f"stopped by {stopped_by} at step {state.step:,}; everything is saved, go on with --resume")
    elif options.num_epochs == 0:
        accelerator.print("--num-epochs 0: nothing was trained")
    elif state.step < run.num_steps:
        accelerator.print(f"--stop_at_step {run.stop_step} is reached; go on with --resume")
    elif state.nonfinite_streak and accelerator.scaler is None:
        raise UserError(f"the last {state.nonfinite_streak} steps had no finite gradient: no model was written")
    else:
        models = run.objective.models
        is_last = best in (0, options.num_epochs)

        def export() -> str:
            if not is_last:
                folder.load_best(models, run_dir, str(best))
            return str(run.folder.export(state.step, None if is_last else models, partial(describe, options, run)))

        final = processes.from_main(accelerator, export)
        which = "of the last epoch" if is_last else f"of epoch {best}, whose validation loss is the lowest,"
        accelerator.print(f"the model {which} is in {final}, the numbers in {run_dir / 'log.jsonl'}")
    if accelerator.is_main_process and options.num_epochs:  # last, as nothing depends on it
        log.draw_curves(run_dir)
    if not stopped_by and options.num_epochs:
        run.folder.publish(accelerator, run_dir / "final" if state.step == run.num_steps else None, state.step)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def describe(options: Options, run: Run, model_dir: Path) -> str:
    """The model card."""
    from lmscripts.training import folder

    data, own = run.data, run.state.own
    rows = {
        "parameters": f"{run.objective.models[''].num_parameters():,}",
        "schema": data.schema.name,
        "decisions": f"{data.train.num_records:,} for training, of which {own.records:,} were seen, repeated ones too",
        "epoch": own.best_epoch or options.num_epochs,
    } | {f"held-out {name.replace('_', ' ')}": f"{value:.4f}" for name, value in own.best.items()}
    use = f"`scripts/predict_policy.py --model PATH/TO/THIS/FOLDER` answers records.\n\n{folder.fenced(USE, 'python')}"
    origin = folder.named(run.state.origin)
    began = f"Trained {f'further from {origin}' if origin else 'from scratch'} on decisions."
    title = f"{run.folder.path.name}: a policy over {data.schema.name}"
    about = folder.About(run.folder.hub, options.language, options.license)
    words = {"began": began, "use": use, "limits": LIMITS, "library": "lmscripts", "tags": ["policy"]}
    judged = {"results": own.best, "measured_on": "held-out decisions"}
    return folder.model_card(title, rows, dump_options(options), about=about, **words, **judged)


if __name__ == "__main__":
    main()
