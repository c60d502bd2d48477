"""Fine-tune a classifier on a labelled table; texts longer than a row are folded into several, documents are judged.

python scripts/finetune_classifier.py leanings.csv --model_name_or_path runs/bert/final

Writes beside the table (or to --output_dir) NAME_trained_model/, NAME_testset_predictions.csv (and _fragments.csv),
NAME_train_test_stats.json, and NAME_training/ with checkpoints and log. NAME.sqlite, beside the table, keeps what was
read, tokenised and predicted: further runs begin with it, and analyze_results.py makes a report of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lmscripts.errors import UserError, leave, user_errors
from lmscripts.options import check_numbers, check_useless, dump_options, option, parse_duration, parse_options

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    from lmscripts.data.folding import FoldSettings
    from lmscripts.data.labelled_rows import Part, Steps
    from lmscripts.data.labelled_store import Database
    from lmscripts.evaluation.classifier_run import ResultFiles, RowAnswers
    from lmscripts.evaluation.further import FurtherMetrics
    from lmscripts.models.classifier import ClassifierSettings, Source
    from lmscripts.objectives.module import Objective
    from lmscripts.training.folder import RunFolder
    from lmscripts.training.hub import Hub
    from lmscripts.training.log import Meter, Reporter
    from lmscripts.training.processes import StopRequest
    from lmscripts.training.state import TrainingState

STARTED = monotonic()  # the time of a job counts from here, not from when the imports are done
Aggregate = Literal["mean_probabilities", "mean_logits", "max", "token_weighted"]
CHOOSING = ("macro_f1", "accuracy", "balanced_accuracy", "loss", "mcc")  # metrics by which the best epoch can be found
Precision = Literal["no", "fp16", "bf16", "fp16_on_gpu"]
Balance = Literal["even", "auto"]
DEFAULT_MODEL = "bert-base-uncased"  # English; of the script whose command lines are taken here
SCREEN = ("stdout", "stderr", "/dev/stdout", "/dev/stderr")
POSITIVE = [
    "epochs", "patience", "lora_rank", "batch_size", "micro_batch_size", "learning_rate", "save_steps",
    "keep_last", "stop_at_step", "max_length", "num_workers", "logging_steps", "expected_processes", "timeout"
]  # fmt: skip
NOT_NEGATIVE = ["weight_decay", "max_grad_norm", "seed", "split_seed", "overlap", "max_words"]
BELOW_ONE = ["dropout", "label_smoothing", "warmup_share"]
INPUTS = ("input_file", "validation_file", "test_file", "model_name_or_path", "tokenizer_dir")
FOLDING = ["max_words", "overlap", "policy", "most_folds"]
# What must stay as it was when a run is continued.
FIXED = [
    "model_name_or_path", "from_scratch", "lora_rank", "dropout", "aggregate", "count_documents_once",
    "class_weights", "label_smoothing", "metric", "epochs", "batch_size", "learning_rate", "warmup_share",
    "weight_decay", "max_grad_norm", "seed"
]  # fmt: skip


# ---- options -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_file: str = option(help="table (csv, tsv, jsonl, parquet) or .sqlite", positional=True, group="data")
    text: str = option("text", help="column of the texts", short="t", group="data")
    label: str = option("label", help="column of the labels", short="l", group="data")
    id_column: str | None = option(None, help="column that names a document", group="data")
    group_column: str | None = option(None, help="column: documents of one group stay in one part", group="data")
    split_column: str | None = option(None, help="column that says train, validation or test", group="data")
    labels: tuple[str, ...] = option((), help="all labels in their order; default: those of the table", group="data")
    separator: str | None = option(None, help="several labels a row, with this between them: '|'", group="data")
    label_columns: tuple[str, ...] = option((), help="or a column for each label, with 1 or 0", group="data")
    delimiter: str | None = option(None, help="of csv and tsv; default: found in the header", group="data")
    encoding: str | None = option(None, help="default: UTF-8, or what a byte order mark says", group="data")
    quotes: bool = option(True, help="csv: a field may stand in double quotes", group="data")
    on_bad_row: Literal["skip", "fail"] = option("skip", help="leave bad rows out, or stop", group="data")
    validation_file: str | None = option(None, help="table for validation; the first is for training", group="data")
    test_file: str | None = option(None, help="table for testing", group="data")
    train_share: float = option(0.8, help="share of the documents for training", group="data")
    validation_share: float = option(0.1, help="for choosing the best epoch, and calibration", group="data")
    test_share: float = option(0.1, help="for testing", group="data")
    split_seed: int = option(1, help="another gives other parts", group="data", most=2**63 - 1)
    database: str | None = option(None, help="default: NAME.sqlite beside the table", group="data", writes="file")
    overwrite: bool = option(False, help="build the database again if it was made otherwise", group="data")
    num_workers: int = option(1, help="processes that tokenise", group="data", most=1024)
    preponly: bool = option(False, help="only read the table and write the database", short="p", group="data")

    max_length: int | None = option(
        None, help="tokens of a row; default: the model's longest, <= 512", group="folding", most=65536
    )
    fold_unit: Literal["tokens", "words"] = option("tokens", help="what overlap is counted in", group="folding")
    max_words: int = option(0, help="words of a row; --fold_unit is words then", group="folding")
    overlap: int = option(0, help="units that a row repeats of the row before", group="folding")
    balance_folds: bool = option(False, help="rows of a text about equally long", group="folding")
    policy: Literal["fold", "truncate", "head_tail"] = option("fold", help="or one row a text", group="folding")
    most_folds: int | None = option(None, help="rows of a text at most", group="folding")
    aggregate: Aggregate = option("mean_probabilities", help="from rows to documents", group="folding")
    count_documents_once: bool = option(True, help="a row of k of its text weighs 1/k", group="folding")

    model_name_or_path: str = option(DEFAULT_MODEL, help="model, checkpoint or run to begin with", group="model")
    tokenizer_dir: str | None = option(None, help="tokenizer, if the model's folder has none", group="model")
    from_scratch: bool = option(False, help="its architecture alone, with fresh weights", group="model")
    lora_rank: int | None = option(None, help="train low-rank additions only (needs peft)", group="model")
    dropout: float | None = option(None, help="default: the model's", group="model")

    epochs: int = option(3, help="passes over the training part", short="e", group="training")
    patience: int | None = option(None, help="stop after so many epochs without a better one", group="training")
    metric: tuple[str, ...] = option(
        ("macro_f1",),
        help=f"of documents; the first of {', '.join(CHOOSING)} (else macro_f1) says which epoch is the best; more are "
        "scorers of scikit-learn, scripts of evaluate's metrics, or their names on the Hub",
        group="training",
    )
    class_weights: Literal["none", "balanced"] = option("none", help="weigh rare labels up", group="training")
    label_smoothing: float = option(0.0, help="share spread over all labels", group="training")
    batch_size: int = option(32, help="rows per step, all processes", group="training", most=10**9)
    micro_batch_size: int = option(32, help="rows of one forward pass on one process", group="training", most=10**6)
    process_shares: tuple[int, ...] = option((), help="relative rows of each process: 3 1", group="training")
    balance: Balance = option("even", help="auto: divide them by measured speed", group="training")
    learning_rate: float | None = option(None, help="2e-5; LoRA 2e-4; from scratch 1e-4", group="training")
    warmup_share: float = option(0.06, help="share of the steps; then linear to 0", group="training")
    weight_decay: float = option(0.01, help="on matrices only", group="training")
    max_grad_norm: float = option(1.0, help="clip the global gradient norm; 0 = never", group="training")
    seed: int = option(42, help="decides the new weights, the order and the dropout", group="training", most=2**63 - 1)

    output_dir: str | None = option(
        None, help="folder of the results; default: beside the table", group="run", writes="folder"
    )
    run_name: str | None = option(None, help="NAME in the names of the results; default: the table's", group="run")
    spreadsheet_safe: bool = option(
        False, help="tables for a spreadsheet: no cell is a formula, with a BOM", group="run"
    )
    logfile: str | None = option(
        None, help="also write what is shown to this file", short="f", group="run", writes="file"
    )
    torch_save: bool = option(False, help="also NAME_trained_model.sav, weights for torch.load", group="run")
    do_continue: bool = option(False, help="go on from the newest whole checkpoint", group="run")
    dry_run: bool = option(False, help="build the database, print the plan and exit", group="run")
    save_steps: int | None = option(None, help="steps between checkpoints, beside each epoch's", group="run")
    keep_last: int = option(1, help="checkpoints to keep", group="run")
    logging_steps: int = option(10, help="steps between log lines", group="run")
    stop_at_step: int | None = option(None, help="end this job after so many steps, checkpoint saved", group="run")
    max_time: str | None = option(None, help="end this job after this time, such as 90m or 11h30m", group="run")
    tracker: tuple[str, ...] = option(
        ("tensorboard",), help="none, or any that accelerate knows: wandb trackio mlflow ...", group="run"
    )
    tracker_project: str | None = option(None, help="where it is not tensorboard (lmscripts)", group="run")

    precision: Precision | None = option(None, help="default: the Accelerate config's, or the GPU's", group="machine")
    deterministic: bool = option(False, help="only operations that give the same bits again", group="machine")
    activation_checkpointing: bool = option(False, help="save memory, recompute activations", group="machine")
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
        check_numbers(vars(self), positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
        if self.push_to_hub is None:
            check_useless(vars(self), "without --push_to_hub", "hub_private")
        check_metric(self, multi_label=bool(self.separator or self.label_columns))
        if self.label_columns and (self.separator or self.labels or self.label != Options.label):
            raise UserError("--label_columns says what the labels are: leave out --label, --labels and --separator")
        parse_duration(self.max_time)
        if self.split_column or self.validation_file or self.test_file:
            check_shares(self)
        if self.lora_rank and self.from_scratch:
            raise UserError("--lora_rank adds to trained weights, and --from_scratch has none: give one of them")
        if self.balance == "auto":
            check_useless(vars(self), "with --balance auto, which measures them", "process_shares")
        if self.split_column and (self.validation_file or self.test_file):
            raise UserError("give --split_column, or a file for each part, not both")
        name = self.run_name
        if name is not None and (not name or Path(name).name != name or "\0" in name):
            raise UserError(f"--run_name {name!r} cannot begin the name of a file: put folders into --output_dir")

    @property
    def choosing(self) -> str:
        """The metric of validation documents that says which epoch is the best."""
        return next((name for name in self.metric if name in CHOOSING), CHOOSING[0])


def check_metric(options: Options, multi_label: bool) -> None:
    """Refuse a metric that is not defined for several labels a row; an SQLite file says itself whether it has them."""
    if multi_label and options.choosing in ("balanced_accuracy", "mcc"):
        raise UserError(f"--metric {options.choosing} is for one label a row: take macro_f1, accuracy or loss")


def check_shares(options: Options) -> None:
    """Refuse shares where a column or files say which document is for what."""
    usual = {"train_share": [Options.train_share], "test_share": [Options.test_share]}
    if options.validation_file:
        usual["validation_share"] = [0, Options.validation_share]
    given = {name: getattr(options, name) for name in usual}
    if useless := [f"--{name} {value:g}" for name, value in given.items() if value not in usual[name]]:
        raise UserError(
            "the table or its files say which documents are for training and testing: leave out "
            f"{' and '.join(useless)} (only --validation_share has a meaning then, where no document is given for "
            "validation)"
        )


def check_logfile(options: Options) -> None:
    """Refuse a log file that cannot be, or that would be written into what is read."""
    from lmscripts.data.labelled_build import DATABASE_SUFFIXES, database_of

    if not options.logfile:
        return
    log = Path(options.logfile)
    if log.is_dir() or not log.parent.is_dir():
        what = "is a folder" if log.is_dir() else f"cannot be written, as there is no folder {log.parent}"
        raise UserError(f"--logfile {log} {what} (seen from {Path.cwd()})")
    others = [options.input_file, options.validation_file, options.test_file, options.database]
    others.append(str(database_of(options.input_file)))
    if log.resolve() in [Path(other).resolve() for other in others if other] or log.suffix in DATABASE_SUFFIXES:
        raise UserError(f"--logfile {log} is a table or database of this run: the log needs a file of its own")


# ---- what is asked for: before the processes join, as a table may have to be read -----------------------------------


class Task(NamedTuple):
    """What is to be learnt, and from what."""

    source: Source  # the model to begin with
    folds: FoldSettings
    database: Database  # of documents, rows and the split
    meta: dict[str, Any]  # what it was made from
    origin: str  # the same with folding and split, to be compared
    multi_label: bool
    further: FurtherMetrics | None  # beside those that are always there; on the main process, which judges


def say(options: Options, *lines: str, on_screen: bool = True) -> None:
    """Print lines, and write them to --logfile; once, whatever the number of processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    for line in lines:
        if on_screen:
            print(line, flush=True)
        if options.logfile:
            with open(options.logfile, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def open_task(options: Options) -> Task:
    """Find the model and open the database, or build it."""
    from tqdm import tqdm

    from lmscripts.data.labelled_build import SplitSettings, TableOptions, open_or_build
    from lmscripts.evaluation import classifier_run
    from lmscripts.models.classifier import find_source, fold_settings

    if not Path(options.input_file).exists():  # said before the Hub is asked for a model
        raise UserError(f"the table {options.input_file} does not exist (seen from {Path.cwd()})")
    check_logfile(options)
    further = classifier_run.further_metrics([name for name in options.metric if name not in CHOOSING])
    if options.model_name_or_path == DEFAULT_MODEL:
        say(options, f"beginning with {DEFAULT_MODEL}, which is for English; another: --model_name_or_path")
    source = find_source(options.model_name_or_path, options.tokenizer_dir)
    folding = {name: getattr(options, name) for name in FOLDING}
    folding["balance"] = options.balance_folds
    folding["unit"] = "words" if options.max_words else options.fold_unit
    folds = fold_settings(source, options.max_length, **folding)
    files = {"validation": options.validation_file, "test": options.test_file}
    files = {part: file for part, file in files.items() if file}
    shares = (options.train_share, options.validation_share, options.test_share)
    method = "given" if files or options.split_column else "stratified"
    names = {"id": options.id_column, "group": options.group_column, "split": options.split_column}
    names |= {name: getattr(options, name) for name in ("separator", "delimiter", "encoding")}
    table = {name: value or "" for name, value in names.items()}
    table |= {name: getattr(options, name) for name in ("labels", "label_columns", "quotes", "on_bad_row")}
    with tqdm(unit="document", disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0") as bar:
        database = open_or_build(
            options.input_file,
            source.encoder,
            folds,
            SplitSettings(method, options.split_seed, *shares),
            TableOptions(options.text, options.label, **table),
            database=options.database,
            part_files=files,
            overwrite=options.overwrite,
            num_workers=options.num_workers,
            progress=bar.update,
        )
    origin, meta = database.origin(), database.meta()  # what is read later is compared with the first
    task = Task(source, folds, database, meta, origin, bool(meta["multi_label"]), further)
    if further:
        further.suit(database.labels(), task.multi_label)
    check_metric(options, task.multi_label)  # once more, as now an SQLite file has said what it holds
    if database.split.method == "given":
        check_shares(options)
    return task


def fixed_facts(options: Options, task: Task) -> dict[str, Any]:
    """What must be the same on all processes, and stay as it was when the run is continued."""
    fixed = {name: value for name, value in vars(options).items() if name in FIXED}
    fixed |= {"metric": options.choosing, "tables": task.meta["sha256"]}
    fixed |= {"labels": task.database.labels(), "folds": asdict(task.folds), "split": asdict(task.database.split)}
    return fixed | {"tokenizer": task.source.encoder.fingerprint}


# ---- the run, from top to bottom -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is trained, on what, and where it stands."""

    accelerator: Accelerator
    task: Task
    parts: dict[str, Part]  # of the split: train, validation, test
    steps: Steps  # which rows of the first make up which step
    rate: Callable[[int], float]  # learning rate of a step
    files: ResultFiles
    folder: RunFolder
    settings: ClassifierSettings  # before calibration
    objective: Objective  # the model, and its loss
    model: Any  # the same, wrapped for the processes
    optimizer: Optimizer
    state: TrainingState
    num_steps: int
    stop_step: int  # where this job ends
    facts: dict[str, Any]  # for those who look at the results


def main() -> None:
    """Parse, prepare, train, judge, export."""
    from lmscripts.training.processes import agree, join, open_hub

    renamed = {"epoch": "epochs", "sequence_length": "max_length"}
    older = {"balance": {"false": "even"}}  # in files, where it was what --balance_folds is now
    with user_errors(only_words=True), join():
        options = parse_options(Options, description=__doc__ or "", renamed=renamed, renamed_values=older)
        options = replace(options, **agree(vars(options), INPUTS))
        about = (options.push_to_hub, options.hub_private, options.language, options.license)
        run(options, *open_hub(*about, is_tried=options.dry_run or options.preponly))


def run(options: Options, hub: Hub | None, of_hub: list[str]) -> None:
    """The whole run; ends the process with its exit code."""
    from transformers import logging

    from lmscripts.evaluation import classifier_run
    from lmscripts.training import folder, optim, processes

    logging.disable_progress_bar()  # of transformers, at every save
    processes.check_trackers(options.tracker)
    if options.logfile in SCREEN:
        options = replace(options, logfile=None)
        say(options, "what is shown is on the screen: --logfile is for a file beside it")
    as_yaml, default_rate = dump_options(options), 2e-4 if options.lora_rank else 1e-4 if options.from_scratch else 2e-5
    options = replace(options, learning_rate=options.learning_rate or default_rate)
    task = open_task(options)
    if options.preponly:
        say(options, *task.database.sentences(), *task.source.notices)
        return
    output_dir = Path(options.output_dir) if options.output_dir else Path(options.input_file).parent
    name = options.run_name or task.database.path.stem
    files = classifier_run.ResultFiles(output_dir, name, options.spreadsheet_safe)
    accelerator = start(options, task, files)
    if folder.goes_on_by_itself(accelerator, files.training):
        options = replace(options, do_continue=True)
    if not options.dry_run:
        processes.from_main(accelerator, partial(files.check_free, options.do_continue))
    processes.only_deterministic(options.deterministic)
    parts, positive_weights, steps = lay_out(options, task, accelerator)
    num_steps = steps.per_epoch * options.epochs
    warmup_steps = round(options.warmup_share * num_steps)
    rate = optim.Schedule("linear", peak=options.learning_rate, warmup_steps=warmup_steps, max_steps=num_steps)
    network, settings, notices = build_model(options, task)
    tokenizer, autos = task.source.encoder.tokenizer, {"": "AutoModelForSequenceClassification"}
    beside = folder.tokenizer_beside(tokenizer, {"": network}, autos, tokenizer.model_max_length)
    doubts = classifier_run.check_metric(options.choosing, CHOOSING[0], parts["validation"], task.multi_label)
    rates = f"rates: {optim.rates_text(rate, num_steps, [warmup_steps])}"
    said = [*of_hub, *task.database.sentences(), *task.source.notices, *notices]
    say(options, *said, *plan_lines(options, accelerator, task, parts, steps, network), rates, *doubts)
    if options.dry_run:
        return
    run_folder = folder.RunFolder(files.training, fixed_facts(options, task), rate, beside, hub=hub)
    run = begin(options, accelerator, task, parts, steps, rate, files, run_folder, settings, network, positive_weights)
    with classifier_run.failing(task.database, run.state.own.entry, accelerator.is_main_process):
        if accelerator.is_main_process:
            run_folder.write_options(as_yaml)
        stop_asked = processes.StopRequest(STARTED + parse_duration(options.max_time))
        stopped = train(options, run, stop_asked)
        stopped = finish(options, run, as_yaml, stop_asked, stopped)
    if not stopped:
        is_whole = run.state.step == run.num_steps or run.state.own.is_stale(options.patience)
        run_folder.publish(accelerator, files.model if is_whole else None, run.state.step)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    leave(processes.stopped_early(stop_asked.reason) if stopped else 0)  # here, where model and processes still stand


def start(options: Options, task: Task, files: ResultFiles) -> Accelerator:
    """Join the processes that the launcher started, once they are found to be asked for the same."""
    from lmscripts.training import processes

    accelerator = processes.start_processes(
        mixed_precision=processes.choose_precision(None, 0, False, options.precision),
        timeout_seconds=options.timeout,
        trackers=options.tracker,
        project_dir=str(files.training),
    )
    if processes.asked_of_launcher():
        raise UserError("classifiers are trained with whole copies of the model: choose a config without FSDP")
    # The same model may lie in another place on another machine.
    processes.check_agreement(fixed_facts(options, task) | {"model_name_or_path": task.source.weights()})
    return accelerator


def lay_out(options: Options, task: Task, accelerator: Accelerator) -> tuple[dict[str, Part], Any, Steps]:
    """The parts of the split, (K,) weights of statements or None, and who computes which rows of which step."""
    from lmscripts.models.classifier import padding_id
    from lmscripts.objectives import labels
    from lmscripts.training import processes

    parts, positive_weights = labels.read_parts(
        task.database,
        balanced=options.class_weights == "balanced",
        multi_label=task.multi_label,
        count_documents_once=options.count_documents_once,
    )
    if options.patience and not parts["validation"].num_rows:
        raise UserError("--patience needs a validation part: give --validation_share or --validation_file")
    nodes = processes.nodes_of_processes(accelerator)
    shares = processes.process_shares(options.batch_size, nodes, weights=options.process_shares or None)
    settled = {"shares": shares, "seed": options.seed, "pad_id": padding_id(task.source.encoder)}
    steps = labels.Steps(parts["train"], options.batch_size, options.micro_batch_size, **settled)
    return parts, positive_weights, steps


def build_model(options: Options, task: Task) -> tuple[PreTrainedModel, ClassifierSettings, list[str]]:
    """The model with a head for the labels, its settings before calibration, and sentences for the user."""
    from lmscripts.models.classifier import ClassifierSettings, build_classifier

    separator = task.meta["options"]["separator"] or "|"
    settings = ClassifierSettings(task.folds, options.aggregate, multi_label=task.multi_label, separator=separator)
    network, notices = build_classifier(
        task.source,
        task.database.labels(),
        settings,
        seed=options.seed,
        dropout=options.dropout,
        from_scratch=options.from_scratch,
        lora_rank=options.lora_rank,
        recompute=options.activation_checkpointing,
    )
    return network, settings, notices


def plan_lines(
    options: Options,
    accelerator: Accelerator,
    task: Task,
    parts: dict[str, Part],
    steps: Steps,
    network: PreTrainedModel,
) -> list[str]:
    """What is going to be done, in words."""
    from lmscripts.models.classifier import operations_per_token
    from lmscripts.training import processes

    tokens = int(parts["train"].lengths.sum())
    share = steps.shares[accelerator.process_index] / options.batch_size
    operations = operations_per_token(network) * tokens * options.epochs * share
    rows = {name: f"{part.num_rows:,}" for name, part in parts.items()}
    encoder = task.source.encoder
    unknown = float((parts["train"].folds.ids == encoder.unk_id).mean())
    is_foreign = unknown > 0.01 and encoder.unk_id not in (encoder.bos_id, encoder.eos_id, encoder.pad_id)
    beware = f"beware: {unknown:.1%} of the tokens for training are unknown to the model: is it for other text?"
    return [
        *([beware] if is_foreign else []),
        f"model: {task.source.name}, {network.config.model_type}, {network.num_parameters():,} parameters",
        f"rows of at most {task.folds.max_length} tokens: {rows['train']} for training "
        f"({tokens:,} tokens), {rows['validation']} for validation, {rows['test']} for testing",
        f"{options.epochs} epochs of {steps.per_epoch:,} steps of {options.batch_size} rows; rows of each process: "
        f"{steps.shares}",
        f"time: {processes.guessed_time(operations, accelerator, 'fewer --epochs')[1]}",
        f"processes: {processes.in_words(accelerator)}",
    ]


def begin(
    options: Options,
    accelerator: Accelerator,
    task: Task,
    parts: dict[str, Part],
    steps: Steps,
    rate: Callable[[int], float],
    files: ResultFiles,
    run_folder: RunFolder,
    settings: ClassifierSettings,
    network: PreTrainedModel,
    positive_weights: Any,
) -> Run:
    """Take the run's folder; model, optimizer and state as the newest checkpoint has them, or as at a beginning."""
    from lmscripts.evaluation import classifier_run
    from lmscripts.objectives import labels
    from lmscripts.training import log, optim, processes

    say(options, *run_folder.enter(accelerator, {"": network}, options.do_continue))
    objective = labels.trained(network, labels.Settings(task.multi_label, options.label_smoothing, positive_weights))
    adam = {"learning_rate": options.learning_rate, "betas": (0.9, 0.999), "epsilon": 1e-8}
    optimizer = optim.build_optimizer("adamw", objective, weight_decay=options.weight_decay, **adam)
    model, optimizer = accelerator.prepare(objective), optim.with_scaler(accelerator, optimizer)
    own = classifier_run.ClassifierProgress()
    state = run_folder.restore(accelerator, objective, optimizer, own=own)
    facts = {"metric": options.choosing, "processes": accelerator.num_processes, "parameters": network.num_parameters()}
    facts |= {"versions": log.versions(), "continued_from": state.step}
    entry = (task.database, state.own, files.name, files.model, vars(options), facts, task.origin)
    state.own.run_id, state.own.key = processes.from_main(accelerator, partial(classifier_run.open_run, *entry))
    num_steps = steps.per_epoch * options.epochs
    stop_step = min(num_steps, options.stop_at_step or num_steps)
    about = (num_steps, stop_step, facts | {"key": state.own.key})
    return Run(
        accelerator, task, parts, steps, rate, files, run_folder, settings, objective, model, optimizer, state, *about
    )


def train(options: Options, run: Run, stop_asked: StopRequest) -> bool:
    """The loop; whether it was stopped before its last step."""
    from accelerate.utils import send_to_device

    from lmscripts.training import log, optim, processes

    accelerator, state, own, objective, model = run.accelerator, run.state, run.state.own, run.objective, run.model
    rank, device, has_scaler = accelerator.process_index, accelerator.device, accelerator.scaler is not None
    meter = log.Meter(device, *state.open_window(rank), model)
    epoch_meter = log.Meter(device, *own.open_epoch(rank))
    report = log.Reporter(accelerator, run.folder.path, state.step, run.stop_step, run.folder.continued)
    batches = meter.batches(accelerator, run.steps, state, run.stop_step, report, options.balance)
    model.train()
    stopped = stopped_while_judging(options, run, meter, epoch_meter, report, stop_asked)
    while state.step < run.stop_step and not stopped and not own.is_stale(options.patience):
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
            epoch_meter.add_sums(sums)
        norm = optim.clip_gradients(accelerator, model, options.max_grad_norm or inf)
        optim.step(run.optimizer, norm, state, has_scaler=has_scaler)
        state.step += 1
        state.real_tokens += targets["tokens"]
        meter.add_step(targets)
        epoch_meter.add_step(targets)
        report.advance(state.step)

        if state.step % options.logging_steps == 0 or state.step == run.num_steps:
            record = meter.read(accelerator, objective.metrics)
            words = log.in_words(record)
            report(state.step, record | {"learning_rate": learning_rate, "gradient_norm": float(norm)}, words)
            say(options, f"step {state.step:,}: {words}", on_screen=False)
        stopped = stops > 0 or stopped_while_judging(options, run, meter, epoch_meter, report, stop_asked)
        if stopped or state.step == run.stop_step or run.steps.is_due(state.step, options.save_steps):
            with meter.paused():
                state.window_sums, state.window_counts = meter.open_window(accelerator)
                own.epoch_sums, own.epoch_counts = epoch_meter.open_window(accelerator)
                run.folder.save(accelerator, objective, run.optimizer, state)
            if accelerator.is_main_process:
                run.folder.prune(options.keep_last, best=lambda saved: saved["best_epoch"])
    batches.close()
    report.bar.close()
    run.folder.wait(accelerator)
    return stopped


def stopped_while_judging(
    options: Options, run: Run, meter: Meter, epoch_meter: Meter, report: Reporter, stop_asked: StopRequest
) -> bool:
    """Judge at the end of an epoch, and keep the best; whether a process was asked to stop meanwhile."""
    from lmscripts.evaluation import classifier_run
    from lmscripts.training import folder, log, processes

    accelerator, state, own = run.accelerator, run.state, run.state.own
    if state.step == 0 or state.step % run.steps.per_epoch or state.evaluated_step == state.step:
        return False
    epoch, validation, answers = state.step // run.steps.per_epoch, run.parts["validation"], None
    trained = run.objective.metrics(*epoch_meter.open_window(accelerator))
    if validation.num_rows:
        with meter.paused():
            answers = answer(options, run, validation, stop_asked)
        if answers is None:
            return True
    about = (
        run.task.database,
        own.entry,
        epoch,
        state.step,
        trained,
        validation,
        answers,
        run.settings,
        run.task.further,
    )
    # What is the best is decided by the main process for all.
    record = processes.from_main(accelerator, partial(classifier_run.close_epoch, *about))
    epoch_meter.read(accelerator, run.objective.metrics)  # begins anew
    state.evaluated_step, own.history = state.step, [*own.history, record]
    value = classifier_run.value_of(record["validation"], options.choosing)
    if own.is_better(options.choosing, value):
        own.best_epoch, own.best_value = epoch, value
        best = partial(folder.keep_best, run.folder.path, str(epoch), run.objective.models[""])
        processes.from_main(accelerator, best)
    words = classifier_run.epoch_in_words(record, options.choosing, log.in_words, run.task.further)
    numbers = {f"validation_{name}": value for name, value in record["validation"].items() if value is not None}
    report(state.step, numbers, words)
    say(options, words, on_screen=False)
    return False


def answer(options: Options, run: Run, part: Part, stop_asked: StopRequest) -> RowAnswers | None:
    """What the model says of the rows of a part; None if a process was asked to stop meanwhile."""
    from lmscripts.evaluation import classifier_run

    rows = (part, options.micro_batch_size, run.steps.pad_id)
    return classifier_run.answer_rows(run.accelerator, run.objective, *rows, stop_asked)


def finish(options: Options, run: Run, as_yaml: str, stop_asked: StopRequest, stopped: bool) -> bool:
    """Calibrate the best model on the validation part, judge it on the test part, write all down; whether stopped."""
    from lmscripts.evaluation import classifier_run
    from lmscripts.training import folder, processes

    accelerator, task, state, own = run.accelerator, run.task, run.state, run.state.own
    complete = not stopped and (state.step == run.num_steps or own.is_stale(options.patience))
    parts: dict[str, tuple[Part, RowAnswers | None]] = {}
    if complete:
        if own.best_epoch:
            classifier_run.load_best(accelerator, run.objective, run.folder.path, own.best_epoch)
        for name in ("validation", "test"):
            part = run.parts[name]
            parts[name] = part, answer(options, run, part, stop_asked) if part.num_rows else None
            stopped = stopped or bool(part.num_rows and parts[name][1] is None)
    if stopped:
        reason = stop_asked.words()
        say(options, f"stopped by {reason} at step {state.step:,}; everything is saved, go on with --do_continue")
    elif complete:
        about = (run.files, task.database, own, run.settings, run.objective.models[""], run.folder.beside)
        about += (run.facts | {"steps": state.step}, task.source.name, as_yaml, parts)
        about += (folder.About(run.folder.hub, options.language, options.license), task.further)
        say(options, *processes.from_main(accelerator, partial(classifier_run.finish, *about)))
        if options.torch_save:
            weights = partial(run.files.write_weights, run.objective.models[""])
            say(options, f"the weights for torch.load are in {processes.from_main(accelerator, weights)}")
    else:
        say(options, f"--stop_at_step {run.stop_step} is reached; go on with --do_continue")
    if stopped or not complete:
        processes.from_main(accelerator, partial(task.database.end_run, own.entry, "stopped"))
    return stopped


if __name__ == "__main__":
    main()
