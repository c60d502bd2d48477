"""Pretrain a language model: a token store (or text and a tokenizer) in, a transformers model folder out.

accelerate launch --config_file accelerate_configs/gpu4_bf16.yaml scripts/run_pretraining.py --config recipe.yaml

Writes config.yaml, checkpoint-STEP/, log.jsonl, curves.png, TensorBoard files, and final/: model, tokenizer, card.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Literal

from lmscripts.config import dump_options, option, parse_options
from lmscripts.errors import UserError, user_errors
from lmscripts.option_checks import check_pretraining

if TYPE_CHECKING:
    from lmscripts.presets import Preset
    from lmscripts.token_store import TokenStore

PRESETS = Path(__file__).resolve().parent.parent / "parameter.json"
Packing = Literal["isolated", "contiguous"]
Attention = Literal["auto", "sdpa", "eager", "varlen"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
TokenizerType = Literal["wordpiece", "unigram", "bpe", "character"]


# ---- options -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="folder of the run", required=True, group="run")
    do_continue: bool = option(False, help="go on from the newest whole checkpoint in --model_dir", group="run")
    dry_run: bool = option(False, help="print the plan and exit", group="run")
    stop_at_step: int | None = option(None, help="end this job after so many steps, checkpoint saved", group="run")
    max_time: str | None = option(None, help="end this job after this time, such as 90m or 11h30m", group="run")
    save_steps: int | None = option(None, help="steps between checkpoints; default: the preset's", group="run")
    keep_last: int = option(3, help="checkpoints to keep", group="run")
    keep_every: int = option(0, help="also keep checkpoints at multiples of so many steps; 0 = none", group="run")
    eval_every: int | None = option(None, help="steps between evaluations; default: save_steps", group="run")
    eval_rows: int = option(2048, help="held-out rows to evaluate on, at most", group="run")
    logging_steps: int | None = option(None, help="steps between log lines; default: the preset's", group="run")
    tracker: Literal["tensorboard", "none"] = option("tensorboard", help="experiment tracker", group="run")
    seed: int = option(42, help="decides the initial weights, the order, the masks and the dropout", group="run")

    dataset_dir: str | None = option(None, help="token store made by prepare_corpus.py", group="data")
    input_file: tuple[str, ...] = option((), help="text files instead of a store", group="data")
    tokenizer_dir: str | None = option(None, help="tokenizer folder; must be the store's", group="data")
    validation_fraction: float | None = option(None, help="share of documents held out (0.01)", group="data")
    num_workers: int | None = option(None, help="processes that tokenise --input_file (2)", group="data")
    sequence_length: int | None = option(None, help="tokens per row; default: the preset's", group="data")
    packing: Packing = option("isolated", help="documents of a row see only themselves, or the whole row", group="data")

    parameter_file: str | None = option(None, help="presets; default: the project's parameter.json", group="model")
    model_type: str = option(help="preset in the parameter file", required=True, group="model")
    hidden_dropout: float = option(0.1, help="dropout of the hidden states", group="model")
    attention_dropout: float = option(0.0, help="dropout of the attention weights; not with varlen", group="model")
    attention: Attention = option("auto", help="auto = varlen on CUDA in half precision, else sdpa", group="model")

    do_whole_word_mask: bool = option(False, help="mask whole words, not single tokens", group="objective")
    mask_probability: float | None = option(None, help="share of tokens to predict; or the preset's", group="objective")

    batch_size: int | None = option(None, help="rows per step over all processes; or the preset's", group="optimizer")
    micro_batch_size: int = option(32, help="rows of one forward pass on one process, at most", group="optimizer")
    process_shares: tuple[int, ...] = option((), help="relative rows of each process: 3 1", group="optimizer")
    optimizer: Literal["adamw", "lamb"] = option("adamw", help="optimizer", group="optimizer")
    learning_rate: float | None = option(None, help="peak; default: the preset's", group="optimizer")
    schedule: Schedule = option("linear", help="after the warmup; wsd = stable, then decay", group="optimizer")
    warmup_steps: int | None = option(None, help="default: the preset's", group="optimizer")
    decay_steps: int | None = option(None, help="with --schedule wsd: steps of the decay", group="optimizer")
    final_lr_ratio: float | None = option(None, help="where the decay ends, as a share of the peak", group="optimizer")
    max_steps: int | None = option(None, help="length of the schedule; default: the preset's", group="optimizer")
    epochs: float | None = option(None, help="the same in passes over the text", group="optimizer")
    weight_decay: float = option(0.01, help="on matrices only", group="optimizer")
    beta1: float = option(0.9, help="decay of the first moment", group="optimizer")
    beta2: float | None = option(None, help="of the second; default 0.999, RoBERTa 0.98", group="optimizer")
    epsilon: float = option(1e-6, help="added to the root of the second moment", group="optimizer")
    max_grad_norm: float = option(1.0, help="clip the global gradient norm; 0 = never", group="optimizer")

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
        check_pretraining(vars(self))


RENAMED = {"mecab_dic_type": "mecab_dic"}
NOT_NEEDED = {
    "disable_overwrite_cache": "a token store is reused whenever text, tokenizer and options are the same",
    "overwrite_cache": "a token store is made anew whenever text, tokenizer or options changed",
    "local_rank": "the launcher tells each process its place",
    "run_name": "the run is named by --model_dir",
}
# What the preset decides where no option does, and what must stay as it was when a run is continued.
FROM_PRESET = ("sequence_length", "mask_probability", "batch_size", "learning_rate")
FROM_PRESET += ("warmup_steps", "save_steps", "logging_steps")
NOT_TO_CHANGE = ("model_type", "seed", "sequence_length", "packing", "do_whole_word_mask", "mask_probability")
NOT_TO_CHANGE += ("batch_size", "optimizer", "weight_decay", "beta1", "beta2", "epsilon")


# ---- the run -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, prepare, train, export."""
    options = parse_options(
        Options,
        description=__doc__ or "",
        renamed=RENAMED,
        renamed_values={"tokenizer_type": {"sentencepiece": "unigram"}},
        accepted_unused=NOT_NEEDED,
    )
    with user_errors():
        sys.exit(run(options))


def run(options: Options) -> int:
    """The whole run; returns the exit code."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer, logging

    from lmscripts import attention, distributed, model_card, models, optim, pretraining, run_folder, tracking
    from lmscripts.checkpoint import prune_checkpoints
    from lmscripts.evaluation import evaluate
    from lmscripts.loader import Prefetcher, to_device
    from lmscripts.objectives import MaskedLanguageModel
    from lmscripts.order import stream_key

    # ---- processes and data
    logging.disable_progress_bar()  # of transformers, at every save
    deadline = monotonic() + (distributed.parse_duration(options.max_time) if options.max_time else inf)
    saved_options, run_dir = dump_options(options), Path(options.model_dir)
    options, preset, store = open_inputs(options)
    accelerator = distributed.start_processes(
        mixed_precision=distributed.choose_precision(options.fp16_type, preset.fp16_type, preset.bf16),
        expected_processes=options.expected_processes,
        timeout_seconds=options.timeout,
        trackers=() if options.tracker == "none" else (options.tracker,),
        project_dir=options.model_dir,
    )
    say, world, rank = accelerator.print, accelerator.num_processes, accelerator.process_index
    distributed.check_agreement({"token store": store.fingerprint} | {n: getattr(options, n) for n in NOT_TO_CHANGE})
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_dir, local_files_only=True)
    pretraining.check_tokenizer(tokenizer, tokenizer_type=options.tokenizer_type, mecab_dic=options.mecab_dic)
    layout = pretraining.mlm_layout(tokenizer, options.sequence_length, options.packing)
    with accelerator.local_main_process_first():  # the first of each machine indexes the rows
        rows = [pretraining.open_rows(store, part, layout) for part in ("train", "validation")]
    nodes, weights = distributed.nodes_of_processes(accelerator, options.node_rank), options.process_shares or None
    device, precision = accelerator.device.type, accelerator.mixed_precision
    data = pretraining.PretrainingData(
        *rows,
        layout=layout,
        masking=pretraining.mlm_masking(tokenizer, layout, options.mask_probability, options.do_whole_word_mask),
        attention=attention.choose_attention(options.attention, device, precision, options.attention_dropout),
        seed=options.seed,
        batch_size=options.batch_size,
        shares=distributed.process_shares(options.batch_size, nodes, preset.node_batch_sizes, weights),
        micro_batch_size=options.micro_batch_size,
        total_rows=pretraining.total_rows(rows[0], options.batch_size, options.max_steps, options.epochs),
        most_eval_rows=options.eval_rows,
        pin_memory=device == "cuda",
    )
    schedule = {"schedule": options.schedule, "peak": options.learning_rate, "warmup_steps": options.warmup_steps}
    schedule |= {
        "max_steps": data.num_steps,
        "decay_steps": options.decay_steps,
        "final_ratio": options.final_lr_ratio or 0.0,
    }

    optim.check_schedule(**schedule)
    distributed.check_even(accelerator, data.shares, data.batch_size, data.total_rows)

    # ---- model, from the beginning or from a checkpoint
    network = models.build(
        preset,
        seed=options.seed,
        attn_implementation=attention.use_attention(data.attention),
        vocab_size=len(tokenizer),
        layout=data.layout,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
    )
    say(pretraining.plan_text(data, schedule, accelerator, network.num_parameters()), flush=True)
    if options.dry_run:
        return 0
    fixed = {name: getattr(options, name) for name in NOT_TO_CHANGE} | {"token store": store.fingerprint}
    folder = run_folder.RunFolder(run_dir, store.tokenizer_dir, options.sequence_length, fixed)
    checkpoint, notices = distributed.from_main(accelerator, partial(folder.claim, options.do_continue, saved_options))
    distributed.check_agreement({"checkpoint found": checkpoint is None or checkpoint.is_dir()})
    for notice in notices:
        say(notice)
    if checkpoint is not None:
        run_folder.load_weights(network, checkpoint)
    if options.activation_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    objective = MaskedLanguageModel(network, preset.family, data.attention)
    if options.compile:
        objective.compile(dynamic=False)
    optimizer = optim.build_optimizer(
        options.optimizer,
        network,
        learning_rate=options.learning_rate,
        betas=(options.beta1, options.beta2),
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
    )
    model, optimizer = accelerator.prepare(objective, optimizer)
    state = run_folder.restore(accelerator, objective, optimizer, checkpoint)

    # ---- what is shown and written down
    stop_asked = distributed.StopRequest(deadline)
    stop_step = min(data.num_steps, options.stop_at_step or data.num_steps)
    log_file = tracking.RunLog(run_dir, state.step if checkpoint else None) if rank == 0 else None
    accelerator.init_trackers("tensorboard")
    bar = tqdm(total=stop_step, initial=state.step, disable=rank > 0 or not sys.stderr.isatty(), unit="step")
    flops = tracking.flops_per_token(network.config, options.sequence_length, data.masking.slots)
    meter = tracking.Meter(flops, accelerator.device, state.window_loss if rank == 0 else 0.0, state.window_targets)

    def log(record: dict[str, float], sentence: str) -> None:
        if log_file is not None:
            log_file.write({"step": state.step, **record})
        accelerator.log(record, step=state.step)
        bar.set_postfix_str(sentence)
        if bar.disable:
            say(f"step {state.step:,}/{stop_step:,}  {sentence}", flush=True)

    def stopped_while_evaluating() -> bool:
        if data.num_eval_rows == 0 or state.evaluated_step == state.step:
            return False
        if state.step % options.eval_every and state.step != data.num_steps:
            return False
        held_out = (data.eval_batch, data.num_eval_rows, options.micro_batch_size)
        with meter.paused():
            result = evaluate(accelerator, objective, *held_out, stop_asked)
        state.evaluated_step = state.evaluated_step if result is None else state.step
        if result is not None and result["targets"]:
            sentence = f"held-out loss {result['loss']:.4f}, accuracy {result['accuracy']:.2%}"
            log({"eval_loss": result["loss"], "eval_accuracy": result["accuracy"]}, sentence)
        return result is None

    # ---- loop
    batches = Prefetcher(data.step_batches(state.step, stop_step, rank))
    model.train()
    stopped = stopped_while_evaluating()
    while state.step < stop_step and not stopped:
        micro_batches, counts = next(batches)
        mine = [counts["mlm"], counts["tokens"], float(stop_asked())]
        targets, tokens, stops = distributed.sum_over_processes(accelerator, mine)
        learning_rate = optim.lr_at(state.step, **schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(stream_key(options.seed, state.step, rank) >> 1)  # dropout
        for number, batch in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                sums = model(to_device(batch, accelerator.device))
                # DDP takes the mean of the gradients over the processes; wanted is the sum over all targets.
                accelerator.backward(sums["mlm"] * (world / max(targets, 1.0)))
            meter.add_loss(sums["mlm"].detach())
        norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or inf)
        if state.judge(norm, has_scaler=accelerator.scaler is not None) or accelerator.scaler is not None:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.real_tokens += tokens
        meter.add_step(targets, tokens, data.batch_size * options.sequence_length)
        bar.update()

        if state.step % options.logging_steps == 0 or state.step == stop_step:
            record = meter.read(accelerator)
            record |= {"learning_rate": learning_rate, "gradient_norm": float(norm), "tokens": state.real_tokens}
            record |= {"skipped_steps": state.skipped_steps}
            log(record, f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s")
        stopped = stops > 0 or stopped_while_evaluating()
        if stopped or state.step == stop_step or state.step % options.save_steps == 0:
            state.window_loss, state.window_targets = meter.open_window(accelerator)
            with meter.paused():
                folder.save(accelerator, network, objective, optimizer, state)
            if rank == 0:
                prune_checkpoints(run_dir, options.keep_last, options.keep_every)
    batches.close()
    bar.close()

    # ---- end
    if rank == 0:
        tracking.draw_curves(run_dir / "log.jsonl", run_dir / "curves.png")
    if stopped:
        reason = stop_asked.reason or "a signal to another process"
        say(f"stopped by {reason} at step {state.step:,}; everything is saved, go on with --do_continue")
    elif state.step < data.num_steps:
        say(f"--stop_at_step {stop_step} is reached; go on with --do_continue")
    elif rank == 0:
        log_path, title = run_dir / "log.jsonl", f"{run_dir.name}: {options.model_type}"
        final = folder.export(state.step, partial(model_card.mlm_card, title, data, log_path, saved_options))
        say(f"the model is in {final}, the curves in {run_dir / 'curves.png'}, the numbers in {log_path}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return distributed.STOPPED_EARLY if stopped else 0


def open_inputs(options: Options) -> tuple[Options, Preset, TokenStore]:
    """The preset, the options with its values where none were given, and the store.

    The store is built here from text if need be: before the processes join, as it may take long.
    """
    from lmscripts.preparation import Source, prepare_beside
    from lmscripts.presets import load_preset
    from lmscripts.token_store import open_store
    from lmscripts.tokenization import load_encoder

    preset = load_preset(options.parameter_file or PRESETS, options.model_type)
    preset.layer_sizes()  # complains about a preset without
    of_preset = {name: getattr(preset, name) for name in FROM_PRESET}
    of_preset |= {"beta2": 0.98 if preset.family == "roberta" else 0.999}
    of_preset |= {"max_steps": None if options.epochs else preset.train_steps}
    of_preset |= {"eval_every": options.save_steps or preset.save_steps}
    of_preset["batch_size"] *= preset.accumulation_steps  # the older way to say it
    options = replace(options, **{name: v for name, v in of_preset.items() if getattr(options, name) is None})
    if (options.dataset_dir is None) == (not options.input_file):
        raise UserError("give either --dataset_dir (a token store) or --input_file with --tokenizer_dir")
    if options.dataset_dir is not None:
        wanted = load_encoder(options.tokenizer_dir).fingerprint if options.tokenizer_dir else None
        return options, preset, open_store(Path(options.dataset_dir), wanted)
    if options.tokenizer_dir is None:
        raise UserError("--input_file needs --tokenizer_dir")
    if options.dry_run:
        raise UserError("--dry_run reads a token store: give --dataset_dir (prepare_corpus.py makes one)")
    source = Source(options.input_file, Path(options.tokenizer_dir), options.validation_fraction or 0.01)
    return options, preset, prepare_beside(source, Path(options.model_dir), options.num_workers or 2)


if __name__ == "__main__":
    main()
