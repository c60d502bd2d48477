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
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Literal

from lmscripts.errors import UserError, leave, user_errors
from lmscripts.options.checks import check_numbers
from lmscripts.options.parsing import dump_options, option, parse_options
from lmscripts.training.classifier_checks import check_metric, check_shares

STARTED = monotonic()  # the time of a job counts from here, not from when the imports are done
Aggregate = Literal["mean_probabilities", "mean_logits", "max", "token_weighted"]
Metric = Literal["macro_f1", "accuracy", "balanced_accuracy", "loss", "mcc"]
Precision = Literal["no", "fp16", "bf16", "fp16_on_gpu"]
POSITIVE = [
    "epochs", "patience", "lora_rank", "batch_size", "micro_batch_size", "learning_rate", "save_steps",
    "keep_last", "stop_at_step", "max_length", "num_workers", "logging_steps", "expected_processes", "timeout"
]  # fmt: skip
NOT_NEGATIVE = ["weight_decay", "max_grad_norm", "seed", "split_seed", "overlap", "max_words"]
BELOW_ONE = ["dropout", "label_smoothing", "warmup_share"]


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
    delimiter: str | None = option(None, help="of csv and tsv; default: found in the header", group="data")
    encoding: str | None = option(None, help="default: UTF-8, or what a byte order mark says", group="data")
    quotes: bool = option(True, help="csv: a field may stand in double quotes", group="data")
    on_bad_row: Literal["skip", "fail"] = option("skip", help="leave bad rows out, or stop", group="data")
    validation_file: str | None = option(None, help="table for validation; the first is for training", group="data")
    test_file: str | None = option(None, help="table for testing", group="data")
    train_share: float = option(0.8, help="share of the documents for training", group="data")
    validation_share: float = option(0.1, help="for choosing the best epoch, and calibration", group="data")
    test_share: float = option(0.1, help="for testing", group="data")
    split_seed: int = option(1, help="another gives other parts", group="data")
    database: str | None = option(None, help="default: NAME.sqlite beside the table", group="data")
    overwrite: bool = option(False, help="build the database again if it was made otherwise", group="data")
    num_workers: int = option(1, help="processes that tokenise", group="data")
    preponly: bool = option(False, help="only read the table and write the database", short="p", group="data")

    max_length: int | None = option(None, help="tokens of a row; default: the model's longest, <= 512", group="folding")
    fold_unit: Literal["tokens", "words"] = option("tokens", help="what overlap is counted in", group="folding")
    max_words: int = option(0, help="with --fold_unit words: words of a row", group="folding")
    overlap: int = option(0, help="units that a row repeats of the row before", group="folding")
    balance: bool = option(False, help="rows of a text about equally long", group="folding")
    policy: Literal["fold", "truncate", "head_tail"] = option("fold", help="or one row a text", group="folding")
    most_folds: int | None = option(None, help="rows of a text at most", group="folding")
    aggregate: Aggregate = option("mean_probabilities", help="from rows to documents", group="folding")
    count_documents_once: bool = option(True, help="a row of k of its text weighs 1/k", group="folding")

    model_name_or_path: str = option(help="model, checkpoint or run to begin with", group="model")
    tokenizer_dir: str | None = option(None, help="tokenizer, if the model's folder has none", group="model")
    from_scratch: bool = option(False, help="its architecture alone, with fresh weights", group="model")
    lora_rank: int | None = option(None, help="train low-rank additions only (needs peft)", group="model")
    dropout: float | None = option(None, help="default: the model's", group="model")

    epochs: int = option(3, help="passes over the training part", short="e", group="training")
    patience: int | None = option(None, help="stop after so many epochs without a better one", group="training")
    metric: Metric = option("macro_f1", help="of validation documents: which epoch is the best", group="training")
    class_weights: Literal["none", "balanced"] = option("none", help="weigh rare labels up", group="training")
    label_smoothing: float = option(0.0, help="share spread over all labels", group="training")
    batch_size: int = option(32, help="rows per step, all processes", group="training")
    micro_batch_size: int = option(32, help="rows of one forward pass on one process", group="training")
    process_shares: tuple[int, ...] = option((), help="relative rows of each process: 3 1", group="training")
    learning_rate: float | None = option(None, help="2e-5; LoRA 2e-4; from scratch 1e-4", group="training")
    warmup_share: float = option(0.06, help="share of the steps; then linear to 0", group="training")
    weight_decay: float = option(0.01, help="on matrices only", group="training")
    max_grad_norm: float = option(1.0, help="clip the global gradient norm; 0 = never", group="training")
    seed: int = option(42, help="decides the new weights, the order and the dropout", group="training")

    output_dir: str | None = option(None, help="folder of the results; default: beside the table", group="run")
    run_name: str | None = option(None, help="NAME in the names of the results; default: the table's", group="run")
    spreadsheet_safe: bool = option(
        False, help="tables for a spreadsheet: no cell is a formula, with a BOM", group="run"
    )
    logfile: str | None = option(None, help="also write what is shown to this file", short="f", group="run")
    do_continue: bool = option(False, help="go on from the newest whole checkpoint", group="run")
    dry_run: bool = option(False, help="build the database, print the plan and exit", group="run")
    save_steps: int | None = option(None, help="steps between checkpoints, beside each epoch's", group="run")
    keep_last: int = option(1, help="checkpoints to keep", group="run")
    logging_steps: int = option(10, help="steps between log lines", group="run")
    stop_at_step: int | None = option(None, help="end this job after so many steps, checkpoint saved", group="run")
    max_time: str | None = option(None, help="end this job after this time, such as 90m or 11h30m", group="run")
    tracker: Literal["tensorboard", "none"] = option("tensorboard", help="experiment tracker", group="run")

    precision: Precision | None = option(None, help="default: the Accelerate config's", group="machine")
    deterministic: bool = option(False, help="only operations that give the same bits again", group="machine")
    activation_checkpointing: bool = option(False, help="save memory, recompute activations", group="machine")
    expected_processes: int | None = option(None, help="stop unless so many processes started", group="machine")
    timeout: int = option(600, help="seconds that a process may keep the others waiting", group="machine")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        check_numbers(vars(self), positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
        check_metric(self.metric, bool(self.separator))
        if self.split_column or self.validation_file or self.test_file:
            check_shares(vars(self))
        if self.lora_rank and self.from_scratch:
            raise UserError("--lora_rank adds to trained weights, and --from_scratch has none: give one of them")
        if self.split_column and (self.validation_file or self.test_file):
            raise UserError("give --split_column, or a file for each part, not both")


# ---- the run -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, prepare, train, judge, export."""
    options = parse_options(Options, description=__doc__ or "", renamed={"epoch": "epochs"})
    with user_errors(), contextlib.ExitStack() as at_errors:
        run(options, at_errors)


def run(options: Options, at_errors: contextlib.ExitStack) -> None:
    """The whole run; ends the process with its exit code. What `at_errors` is given is told of an error."""
    import torch
    from lmscripts.data.loader import Prefetcher, to_device
    from tqdm import tqdm
    from transformers import logging

    from lmscripts.counters import stream_key
    from lmscripts.data import labelled_rows as batches
    from lmscripts.evaluation import judging, progress, results
    from lmscripts.models import classifier, lora
    from lmscripts.objectives.labels import ClassifierObjective, step_scale
    from lmscripts.training import folder as run_folder
    from lmscripts.training import log as tracking
    from lmscripts.training import optim, resume
    from lmscripts.training import processes as distributed
    from lmscripts.training.checkpoint import prune_checkpoints
    from lmscripts.training.classifier_task import fixed_settings, open_task, plan_text, read_parts

    # ---- processes and data
    logging.disable_progress_bar()  # of transformers, at every save
    deadline = STARTED + (distributed.parse_duration(options.max_time) if options.max_time else inf)
    saved_options = dump_options(options)
    default_rate = 2e-4 if options.lora_rank else 1e-4 if options.from_scratch else 2e-5
    options = replace(options, learning_rate=options.learning_rate or default_rate)
    first = os.environ.get("RANK", "0") == "0"
    results.check_run_name(options.run_name)
    with tqdm(unit="document", disable=not (sys.stderr.isatty() and first)) as bar:
        task = open_task(options, bar.update)

    def note(*lines: str) -> None:
        if options.logfile and first:
            with open(options.logfile, "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)

    if options.preponly:
        if first:
            print("\n".join(task.sentences()))
            note(*task.sentences())
        return
    folder = Path(options.output_dir) if options.output_dir else Path(options.input_file).parent
    files = results.ResultFiles(folder, options.run_name or task.database.path.stem, options.spreadsheet_safe)
    run_dir = files.training
    accelerator = distributed.start_processes(
        mixed_precision=distributed.choose_precision(None, 0, False, options.precision),
        expected_processes=options.expected_processes,
        timeout_seconds=options.timeout,
        trackers=() if options.tracker == "none" else (options.tracker,),
        project_dir=str(run_dir),
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    if str(accelerator.distributed_type.value) == "FSDP":
        raise UserError("classifiers are trained with whole copies of the model: choose a config without FSDP")

    def say(*lines: str) -> None:
        accelerator.print(*lines, sep="\n", flush=True)
        note(*lines)

    fixed = fixed_settings(options, task)
    distributed.check_agreement(fixed)
    torch.use_deterministic_algorithms(options.deterministic)
    train, validation, test, positive_weights = read_parts(options, task)
    doubts = progress.check_metric(options.metric, Options.metric, validation, task.multi_label)
    nodes = distributed.nodes_of_processes(accelerator)
    shares = distributed.process_shares(options.batch_size, nodes, weights=options.process_shares or None)
    per_epoch = batches.num_batches(train.num_rows, options.batch_size)
    num_steps = per_epoch * options.epochs
    schedule = {"schedule": "linear", "peak": options.learning_rate, "max_steps": num_steps}
    schedule |= {"warmup_steps": round(options.warmup_share * num_steps)}

    # ---- model, from another model or from a checkpoint
    as_trained = {"multi_label": task.multi_label, "separator": task.database.meta()["options"]["separator"] or "|"}
    settings = classifier.ClassifierSettings(task.folds, options.aggregate, **as_trained)
    new = {"seed": options.seed, "dropout": options.dropout, "from_scratch": options.from_scratch}
    network, notices = classifier.build_classifier(task.source, task.labels, settings, **new)
    if options.lora_rank:
        notices += lora.add_lora(network, options.lora_rank)
    parts = (train, validation, test)
    plan = plan_text(options, task, parts, network, shares, schedule["warmup_steps"])
    say(*task.sentences(), *notices, *plan, *doubts)
    if options.dry_run:
        return

    def claim():
        files.check_free(options.do_continue)
        return training.claim(options.do_continue, None)

    training = run_folder.RunFolder(run_dir, task.source.encoder.folder, task.folds.max_length, fixed, schedule)
    checkpoint, continued, more = distributed.from_main(accelerator, claim)
    distributed.check_agreement({"checkpoint found": checkpoint is None or checkpoint.is_dir()})
    if more:
        say(*more)
    objective = ClassifierObjective(
        network,
        multi_label=task.multi_label,
        label_smoothing=options.label_smoothing,
        positive_weights=None if positive_weights is None else torch.from_numpy(positive_weights),
    )
    if checkpoint:
        resume.load_weights(objective.models, checkpoint)
    if options.activation_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    adam = {"learning_rate": options.learning_rate, "betas": (0.9, 0.999), "epsilon": 1e-8}
    optimizer = optim.build_optimizer("adamw", objective, weight_decay=options.weight_decay, **adam)
    model, optimizer = accelerator.prepare(objective, optimizer)
    state = progress.restore(accelerator, objective, optimizer, checkpoint)

    # ---- what is shown and written down
    stop_step = min(num_steps, options.stop_at_step or num_steps)
    stop_asked = distributed.StopRequest(deadline)
    meter = tracking.Meter(accelerator.device, *state.open_window(rank))
    epoch_meter = tracking.Meter(accelerator.device, *state.open_epoch(rank))
    log = tracking.Reporter(accelerator, run_dir, state.step, stop_step, continued)
    facts = {"metric": options.metric, "processes": world, "parameters": network.num_parameters()}
    facts |= {"versions": tracking.versions(), "continued_from": state.step}
    about = (files.name, files.model, vars(options), facts, task.origin)
    entry = partial(progress.open_run, task.database, state, *about)
    state.run_id, state.key = distributed.from_main(accelerator, entry)
    facts |= {"key": state.key}
    at_errors.enter_context(progress.failing(task.database, state, rank == 0))
    if rank == 0:
        training.write_options(saved_options)
    pad_id = classifier.padding_id(task.source.encoder)
    answer = partial(judging.answer_rows, accelerator, objective, batch_size=options.micro_batch_size, pad_id=pad_id)

    def stopped_while_judging() -> bool:
        """At the end of an epoch: validation, and whether it is the best so far; the main process decides for all."""
        if state.step == 0 or state.step % per_epoch or state.evaluated_step == state.step:
            return False
        epoch, answers = state.step // per_epoch, None
        trained = objective.metrics(*epoch_meter.open_window(accelerator))
        if validation.num_rows and (answers := answer(validation, stop_requested=stop_asked)) is None:
            return True
        close = partial(progress.close_epoch, task.database, state, epoch, trained, validation, answers, settings)
        record = distributed.from_main(accelerator, close)
        epoch_meter.read(accelerator, objective.metrics)  # begins anew
        state.evaluated_step, state.history = state.step, [*state.history, record]
        value = progress.chosen_value(record, options.metric, task.multi_label)
        if state.is_better(options.metric, value):
            state.best_epoch, state.best_value = epoch, value
            distributed.from_main(accelerator, partial(progress.keep_best, run_dir, epoch, network))
        words = progress.epoch_in_words(record, options.metric, tracking.in_words)
        log(state.step, {f"validation_{name}": value for name, value in record["validation"].items()}, words)
        note(words)
        return False

    # ---- loop
    steps = {"batch_size": options.batch_size, "micro_batch_size": options.micro_batch_size, "pad_id": pad_id}
    steps |= {"process_weights": options.process_shares or [1] * world, "process": rank, "seed": options.seed}
    mean_weight = float(train.weights.mean(dtype="float64"))
    rows = Prefetcher(batches.step_batches(train, **steps, first_step=state.step, end_step=stop_step))
    model.train()
    stopped = stopped_while_judging()
    while state.step < stop_step and not stopped and not state.is_stale(options.patience):
        micro_batches, counts = next(rows)
        *totals, stops = distributed.sum_over_processes(accelerator, [*counts.values(), float(stop_asked())])
        targets = dict(zip(counts, totals, strict=True))
        learning_rate = optim.lr_at(state.step, **schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(stream_key(options.seed, state.step, rank) >> 1)  # dropout
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                sums = model(to_device(batch, accelerator.device))
                accelerator.backward(sums["loss"] * step_scale(targets, mean_weight, world))
            meter.add_sums(sums)
            epoch_meter.add_sums(sums)
        norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or inf)
        finite = state.judge(norm, has_scaler=accelerator.scaler is not None)
        if finite or accelerator.scaler is not None:  # which has to see the others too, to find its scale
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.real_tokens += targets["tokens"]
        meter.add_step(targets, 0.0)
        epoch_meter.add_step(targets, 0.0)
        log.bar.update()

        if state.step % options.logging_steps == 0 or state.step == num_steps:
            record = meter.read(accelerator, objective.metrics)
            record.pop("mfu", None)  # operations are not counted here
            words = f"{tracking.in_words(record)}, {record['tokens_per_second']:,.0f} tokens/s"
            log(state.step, record | {"learning_rate": learning_rate, "gradient_norm": float(norm)}, words)
            note(f"step {state.step:,}: {words}")
        stopped = stops > 0 or stopped_while_judging()
        at_epoch, at_save = state.step % per_epoch == 0, options.save_steps and state.step % options.save_steps == 0
        if stopped or state.step == stop_step or at_epoch or at_save:
            state.window_sums, state.window_counts = meter.open_window(accelerator)
            state.epoch_sums, state.epoch_counts = epoch_meter.open_window(accelerator)
            with meter.paused():
                training.save(accelerator, objective, optimizer, None, state)
            if rank == 0:
                prune_checkpoints(run_dir, options.keep_last)
                progress.prune_best(run_dir)
    rows.close()
    log.bar.close()

    # ---- end: the best model, calibrated on validation, judged on the test part
    complete = not stopped and (state.step == num_steps or state.is_stale(options.patience))
    if complete:
        if state.best_epoch:
            progress.load_best(accelerator, objective, run_dir, state.best_epoch)
        judged = {"validation": validation, "test": test}
        answers = {name: answer(part, stop_requested=stop_asked) for name, part in judged.items() if part.num_rows}
        stopped = None in answers.values()
    if complete and not stopped:
        judged = {name: (part, answers.get(name)) for name, part in judged.items()}
        about = (settings, task.source, network, facts, saved_options, task.labels)
        finish = partial(results.finish, files, task.database, state, *about, judged)
        say(*distributed.from_main(accelerator, finish))
    elif stopped:
        reason = stop_asked.reason or "a signal to another process"
        say(f"stopped by {reason} at step {state.step:,}; everything is saved, go on with --do_continue")
    else:
        say(f"--stop_at_step {stop_step} is reached; go on with --do_continue")
    if stopped or not complete:
        distributed.from_main(accelerator, partial(task.database.end_run, state.entry, "stopped"))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    leave(distributed.STOPPED_EARLY if stopped else 0)  # here, where model and processes still stand


if __name__ == "__main__":
    main()
