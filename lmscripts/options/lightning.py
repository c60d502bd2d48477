"""Keys of an older GPT-2 trainer, a command line of PyTorch Lightning 1.3, and what they mean to run_pretraining.py.

`seed_everything`, `trainer.*` (the arguments of Lightning's Trainer) and `model.*` (those of its model). What has no
counterpart here is refused unless it stands at its default, so that nothing that was asked for is left out silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.options.yaml_text import LINE, Entry, plain_value

SYSTEM = "a GPT-2 trainer with the command line of PyTorch Lightning"
RENAMED = {
    "seed_everything": "seed",
    "trainer.seed_everything": "seed",
    "trainer.gradient_clip_val": "max_grad_norm",
    "trainer.deterministic": "deterministic",
    "trainer.log_every_n_steps": "logging_steps",
    "trainer.default_root_dir": "model_dir",
    "model.tokenizer_model": "tokenizer_dir",
    "model.train_file": "input_file",
    "model.valid_file": "validation_file",
    "model.block_size": "sequence_length",
    "model.lr": "learning_rate",
    "model.num_warmup_steps": "warmup_steps",
    "model.from_pretrained": "pretrained_model_name_or_path",
    "model.n_layer": "n_layer",
    "model.n_head": "n_head",
    "model.n_embd": "n_embd",
}
EVALUATION = {"renamed": {"ckpt_path": "model_dir", "test_file": "input_file", "sequence_length": "block_size"}}
# Of its train_tokenizer.py, which trained a unigram model of sentencepiece.
TOKENIZER = {
    "renamed": {
        "train_file": "input_file; what was trained there is --objective causal here",
        "tf_model_dir": "model_dir",
        "spm_model_dir": "objective causal; a unigram tokenizer that loses nothing, all of it in --model_dir",
    },
    "accepted_unused": {
        "input_sentence_size": "how much of the text is enough is decided here",
        "add_dummy_prefix false": "a space is put before no line",
    },
    "refused": {
        "add_dummy_prefix": "a space is put before no line: leave it out",
        **{
            f"{name}_token": "special tokens have the names that they have: leave it out"
            for name in ("sep", "cls", "pad", "unk", "bos", "eos")
        },
    },
}
SIZES = ("n_layer", "n_head", "n_embd")
LENGTHS = ("max_steps", "epochs", "phase_steps")
# How they stood there where nothing was said and where this script would do otherwise. Adam's are torch's.
DEFAULTS = {
    "optimizer": "adam",
    "weight_decay": "0",
    "beta2": "0.999",
    "epsilon": "1e-8",
    "learning_rate": "1e-4",
    "warmup_steps": "0",
    "schedule": "constant",
    "max_grad_norm": "0",
    "logging_steps": "50",
    "hidden_dropout": "0.1",
    "attention_dropout": "0.1",
    "eval_every": "epoch",
    "save_steps": "epoch",
}
DEFAULT_BATCH_SIZE, DEFAULT_EPOCHS = 2, 1000
AS_THERE = "--{} is {}, as it was in the older trainer"
# Its documentation sets 16 for a GPU, and such a file has to run without one too.
PRECISIONS = {"16": "fp16_on_gpu", "16-mixed": "fp16_on_gpu", "32": "no", "32-true": "no"}
PRECISIONS |= {"bf16": "bf16", "bf16-mixed": "bf16"}
NOT_NEEDED = {
    "model.test_file": "training does not read it; evaluate_lm.py --input_file takes it when the model is trained",
    "model.prefetch_factor": "rows come from a token store, in a thread of their own",
    "model.num_workers": "rows come from a token store, in a thread of their own",
    "model.shuffle_buffer_size": "all rows of an epoch are shuffled, not those of a buffer",
}
# Ways to start processes that come to the same as `accelerate launch`, which does it here.
LAUNCHED = ("ddp", "ddp_spawn", "ddp_cpu", "ddp_find_unused_parameters_false", "auto", "gpu", "cuda")
_CHECKPOINTS = "--save_steps, --keep_last and --keep_every say which checkpoints there are"
_EVALUATIONS = "--eval_every says how often, in steps or by epoch"
_AVERAGE = "--ema_decay averages the weights"
_GPU_IN_LOG = "memory and use of the GPU are in every log line"
CALLBACKS_NOT_NEEDED = {
    "LearningRateMonitor": "the learning rate is in every log line",
    "GPUStatsMonitor": _GPU_IN_LOG,
    "DeviceStatsMonitor": _GPU_IN_LOG,
}
CALLBACKS_INSTEAD = {
    "ModelCheckpoint": _CHECKPOINTS,
    "EarlyStopping": "--stop_at_step and --max_time end a run",
    "Timer": "--max_time ends a run",
    "GradientAccumulationScheduler": "--batch_size is that of the whole run",
    "StochasticWeightAveraging": _AVERAGE,
}
# The other arguments of the Trainer: their defaults, which change nothing, and what there is instead.
UNSUPPORTED = {
    "checkpoint_callback": ("true", _CHECKPOINTS),
    "gradient_clip_algorithm": ("norm", "the norm of all gradients is clipped (--max_grad_norm)"),
    "auto_select_gpus": ("false", "CUDA_VISIBLE_DEVICES chooses GPUs"),
    "log_gpu_memory": ("null", _GPU_IN_LOG),
    "progress_bar_refresh_rate": ("null", "the progress bar is shown where there is a terminal"),
    "overfit_batches": ("0.0", "give a smaller model.train_file"),
    "track_grad_norm": ("-1", "the norm of the gradient is in every log line"),
    "check_val_every_n_epoch": ("1", _EVALUATIONS),
    "fast_dev_run": ("false", "--stop_at_step 1 tries a run out, --dry_run prints its plan"),
    "limit_train_batches": ("1.0", "--stop_at_step ends a run early"),
    "limit_val_batches": ("1.0", "--eval_rows says on how many rows at most"),
    "limit_test_batches": ("1.0", "give a smaller model.test_file"),
    "val_check_interval": ("1.0", _EVALUATIONS),
    "flush_logs_every_n_steps": ("100", "every log line is written at once"),
    "weights_summary": ("top", "the plan says how many parameters there are"),
    "weights_save_path": ("null", "everything is saved in --model_dir"),
    "num_sanity_val_steps": ("2", "--dry_run reads everything before a run"),
    "auto_lr_find": ("false", "--learning_rate has to be given"),
    "replace_sampler_ddp": ("true", "every process gets rows of its own"),
    "terminate_on_nan": ("false", "steps without a finite gradient are skipped, and five in a row end the run"),
    "auto_scale_batch_size": ("false", "--micro_batch_size has to be given"),
    "plugins": ("null", "the file of `accelerate launch --config_file` says how processes work together"),
    "stochastic_weight_avg": ("false", _AVERAGE),
}
_NOTHING_INSTEAD = """process_position=0 tpu_cores=null min_epochs=null min_steps=null limit_predict_batches=1.0
    sync_batchnorm=false truncated_bptt_steps=null profiler=null benchmark=false reload_dataloaders_every_epoch=false
    prepare_data_per_node=true amp_backend=native amp_level=O2 move_metrics_to_cpu=false
    multiple_trainloader_mode=max_size_cycle"""
UNSUPPORTED |= {name: (default, "") for name, default in (pair.split("=") for pair in _NOTHING_INSTEAD.split())}
_EPOCHS, _STEPS, _SCHEDULE = "trainer.max_epochs", "trainer.max_steps", "model.num_training_steps"
_BATCH, _ACCUMULATE, _NODES = "model.batch_size", "trainer.accumulate_grad_batches", "trainer.num_nodes"
_PER_MACHINE = ("trainer.gpus", "trainer.devices", "trainer.num_processes")
_OTHERS = ("precision", "max_time", "logger", "callbacks", "accelerator", "distributed_backend")
KEYS = (
    *(*RENAMED, *NOT_NEEDED, _EPOCHS, _STEPS, _SCHEDULE, _BATCH, _ACCUMULATE, *_PER_MACHINE, _NODES),
    *(f"trainer.{name}" for name in (*_OTHERS, "resume_from_checkpoint", *UNSUPPORTED)),
)


def translate(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Replace the older keys by options of run_pretraining.py.

    Where a file has such keys, or no preset is named, what was not given is as it was in the older trainer.

    Args:
        entries: of the command line and of the file.

    Returns:
        The entries without older keys, and sentences for the user.

    Raises:
        UserError: a value has no counterpart here or is none, or two values contradict each other.
    """
    if not any(entry.key in KEYS for entry in entries):
        return list(entries), []
    old = _Old(entries)
    for key, (default, instead) in UNSUPPORTED.items():
        if (entry := old.get(f"trainer.{key}")) and not _same(entry, default):
            raise _refused(entry, f"only {default if default == 'null' else f'null or {default}'} is accepted", instead)
    for key, name in RENAMED.items():
        if name in SIZES and old.get("model.from_pretrained"):
            old.drop(key, "model.from_pretrained decides the sizes")
        else:
            old.become(name, key)
    _length(old)
    _batch(old)
    _machine(old)
    for key, reason in NOT_NEEDED.items():
        old.drop(key, reason)
    if old.is_config:
        for name, value in DEFAULTS.items():
            if name != "attention_dropout" or old.own_values("attention") != ["varlen"]:  # which has none
                old.default(name, value)
        if not old.decided(*LENGTHS):
            old.default("epochs", str(DEFAULT_EPOCHS), f"{AS_THERE} where nothing said how long")
    _run(old)
    return [*old.own, *old.meant], old.notices


class Evaluation:
    """The same keys to evaluate_lm.py, as the older test.py had them: the text alone is read of them."""

    SYSTEM, KEYS = SYSTEM, KEYS

    @staticmethod
    def translate(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
        """Replace `model.test_file`; the other keys, of a training, say nothing to an evaluation.

        Raises:
            UserError: a checkpoint of the older trainer is given, or a file in a form that no file has.
        """
        for entry in entries:
            if entry.key == "model_dir" and entry.shown.endswith(".ckpt"):
                run = Path(entry.shown).parent.parent
                raise UserError(
                    f"{entry.shown} would be of the older trainer, which cannot be read: give the run's folder "
                    f"({run}), or a checkpoint-STEP in it"
                )
        own = [entry for entry in entries if entry.key not in KEYS]
        older = [_opened(entry) for entry in entries if entry.key in KEYS]
        tests = [entry for entry in older if entry.key == "model.test_file" and entry.values != [None]]
        for entry in tests:
            entry.check_flat()
        meant = [replace(entry, key="input_file") for entry in tests]
        notices = [f"{entry.key} is now --input_file" for entry in tests]
        if older:
            notices.append("of the older trainer's keys only model.test_file is read; the model knows all else")
        return own + meant, notices


class _Old:
    """What was given of the older keys, and what it means here.

    Attributes:
        own: entries of the script's own options.
        meant: entries that the older keys have become, defaults of the older trainer among them.
        is_config: these are the options of an older run, not one of its keys beside the options of a run of ours.
        notices: sentences for the user.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.own = [entry for entry in entries if entry.key not in KEYS]
        self.meant: list[Entry] = []
        self.notices: list[str] = []
        self._older: dict[str, Entry] = {}
        older = [_opened(entry) for entry in entries if entry.key in KEYS]
        for entry in older:
            before = self._older.setdefault(entry.key, entry)  # the line comes before the file, and stays
            if before.origin == entry.origin and (before.values, before.is_list) != (entry.values, entry.is_list):
                raise UserError(f"{entry.key} is given twice: {before.shown} and {entry.shown}; give one")
        self.is_config = any(entry.origin != LINE for entry in older) or self.own_values("model_type") is None

    def own_values(self, name: str) -> list[Any] | None:
        """The texts of an own option, those of the line before those of the file; None where it was not given."""
        return next((entry.values for entry in self.own if entry.key == name), None)

    def get(self, key: str) -> Entry | None:
        """What was given; None where the key was not or is null, which is the same to the older trainer."""
        entry = self._older.get(key)
        return None if entry is None or entry.values == [None] else entry

    def whole(self, key: str, default: int) -> int:
        """The value of a key as a whole number above 0."""
        if (entry := self.get(key)) is None:
            return default
        if not _text(entry).isdecimal() or int(_text(entry)) < 1:
            raise UserError(f"{entry.label} must be a whole number greater than 0, not {entry.shown}")
        return int(_text(entry))

    def decided(self, *names: str) -> bool:
        """Whether one of these own options has been given, in whichever way."""
        return any(entry.key in names for entry in (*self.own, *self.meant))

    def become(self, name: str, *keys: str, value: str | None = None, notice: str = "") -> None:
        """Those of the keys that were given are one own option, with the value of the only one where none is named."""
        entries = [entry for key in keys if (entry := self.get(key))]
        if not entries:
            return
        place = next((entry for entry in entries if entry.origin == LINE), entries[0])
        if value is None:
            place.check_flat()
            notice = f"{keys[0]} is now --{name}"
        written = " and ".join(entry.written for entry in entries)
        values = place.values if value is None else [value]
        self.meant.append(replace(place, key=name, values=values, written=written))
        self.notices.append(notice or f"{keys[0]} {place.shown} is now --{name} {value}")

    def drop(self, key: str, reason: str) -> None:
        """A key is not needed here."""
        if self.get(key):
            self.notices.append(f"{key} has no effect: {reason}")

    def default(self, name: str, value: str, notice: str = AS_THERE) -> None:
        """An own option that was not given in any way becomes what it was in the older trainer."""
        if not self.decided(name):
            self.meant.append(Entry(name, [value], name, "default", written=value))
            self.notices.append(notice.format(name, value))


def _opened(entry: Entry) -> Entry:
    """An entry as a file would have it: on the line a list or a mapping is one word."""
    values, is_list = entry.values, entry.is_list
    if entry.origin == LINE:
        values = [None if text == "null" else plain_value(text) for text in values]
        is_list = len(values) == 1 and isinstance(values[0], list)
        values = values[0] if is_list else values
    entry = replace(entry, values=values or [None] * is_list, is_list=is_list)
    return replace(entry, written=f"{entry.key} {entry.shown}".rstrip())


def _text(entry: Entry) -> str:
    """The only value of an entry.

    Raises:
        UserError: it has none, several, or a mapping.
    """
    if not entry.values:
        raise UserError(f"{entry.label} needs a value")
    if len(entry.values) > 1 or not isinstance(entry.values[0], str):
        raise UserError(f"{entry.label} must be one value, not {entry.shown}")
    return entry.values[0]


def _length(old: _Old) -> None:
    """How long a run is, which here is one number, and the learning rate's schedule.

    There the schedule had a length of its own; without it the rate stayed constant after the warmup. A length on the
    line replaces those of the file; that the schedule is linear does not depend on its length.
    """
    given = [entry for key in (_EPOCHS, _STEPS, _SCHEDULE) if (entry := old.get(key))]
    on_line = [entry for entry in given if entry.origin == LINE]
    if on_line or any(own.key in LENGTHS and own.origin == LINE and own.values != ["null"] for own in old.own):
        given = on_line
    if len(given) > 1 and not (given[0].key == _STEPS and _text(given[0]) == _text(given[1])):
        first, second = given[:2]
        raise UserError(
            f"{first.label} {_text(first)} and {second.key} {_text(second)} disagree on how long the run is, which "
            "here is one number: set one of them to null"
        )
    notice = f"{_SCHEDULE} {old.whole(_SCHEDULE, 0)} is now --schedule linear"
    old.become("schedule", _SCHEDULE, value="linear", notice=notice)
    for item in given:
        old.become("epochs" if item.key == _EPOCHS else "max_steps", item.key)


def _batch(old: _Old) -> None:
    """Rows of an optimizer step, there the product of what a process takes at once, how often, and on how many."""
    rows = old.whole(_BATCH, DEFAULT_BATCH_SIZE)
    per_machine = {key: count for key in _PER_MACHINE if (count := _processes(old.get(key))) > 1}
    if len(set(per_machine.values())) > 1:
        words = " and ".join(f"{key} {count}" for key, count in per_machine.items())
        raise UserError(f"{words} disagree on how many processes a machine has: set all but one to null")
    processes = {**dict(list(per_machine.items())[:1]), _NODES: old.whole(_NODES, 1)}
    factors = {key: n for key, n in {_ACCUMULATE: old.whole(_ACCUMULATE, 1), **processes}.items() if n > 1}
    total = str(math.prod([rows, *factors.values()]))
    parts = [f"{_BATCH} {rows}{'' if old.get(_BATCH) else ' (its default)'}"]
    words = " times ".join([*parts, *(f"{key} {n}" for key, n in factors.items())])
    words += f" is now --batch_size {total}, the rows of a step on all processes together"
    old.become("batch_size", _BATCH, *factors, value=total, notice=words)
    if old.is_config:
        old.default("batch_size", total)
    if math.prod(processes.values()) > 1:
        old.notices.append(f"the {math.prod(processes.values())} processes are now started by `accelerate launch`")
    old.become("micro_batch_size", _BATCH)
    if old.own_values("batch_size") is None and old.decided("batch_size"):
        old.default("micro_batch_size", str(rows))


def _processes(entry: Entry | None) -> int:
    """Processes that a number, a list or a text such as "0,1" of GPUs stands for; 1 also where there is none."""
    if entry is None:
        return 1
    values = [str(value) for value in entry.values]
    if len(values) == 1 and not entry.is_list:  # there 3 was three GPUs, and [3] the GPU number 3
        if values[0].isdecimal():
            return max(int(values[0]), 1)
        values = [part.strip() for part in values[0].split(",") if part.strip()]
    if not values or not all(value.isdecimal() for value in values):
        raise UserError(
            f"{entry.label} must be a number of processes or a list of GPUs, not {entry.shown}: it is one of the "
            "factors of --batch_size"
        )
    return len(values)


def _machine(old: _Old) -> None:
    """How it is computed, for how long, and what is shown of it; a checkpoint to go on from is refused."""
    if entry := old.get("trainer.resume_from_checkpoint"):
        instead = "set it to null; --pretrained_model_name_or_path goes on from a transformers folder, --do_continue "
        raise _refused(entry, "a checkpoint of the older trainer cannot be read", f"{instead}from a run made here")
    if entry := old.get("trainer.precision"):
        if _text(entry) not in PRECISIONS:
            raise UserError(f"{entry.label} must be 16, 32 or bf16, not {entry.shown}")
        old.become("precision", entry.key, value=PRECISIONS[_text(entry)])
    if entry := old.get("trainer.max_time"):
        old.become("max_time", entry.key, value=_duration(entry))
    if (entry := old.get("trainer.logger")) and not _same(entry, "true"):
        if not _same(entry, "false"):
            raise _refused(entry, "only true and false are accepted", "--tracker chooses")
        old.become("tracker", entry.key, value="none")
    for key in ("trainer.accelerator", "trainer.distributed_backend"):
        if (entry := old.get(key)) and _text(entry) not in LAUNCHED:
            raise _refused(entry, "", "the file of `accelerate launch --config_file` says where a run takes place")
        old.drop(key, "processes are started by `accelerate launch`, each with rows of its own")
    if entry := old.get("trainer.callbacks"):
        old.notices += [_callback(entry, callback) for callback in entry.values]


def _callback(entry: Entry, callback: Any) -> str:
    """Why a callback is not needed."""
    path = callback.get("class_path") if isinstance(callback, dict) else callback
    if not isinstance(path, str):
        raise UserError(f"{entry.label} must be a list of `class_path: NAME`, not {entry.shown}")
    name = path.rpartition(".")[2]
    if name not in CALLBACKS_NOT_NEEDED:
        instead = CALLBACKS_INSTEAD.get(name, "")
        raise UserError(f"{entry.label}: {path} has no counterpart here, take it out{instead and f'; {instead}'}")
    return f"{entry.key} {name} is not needed: {CALLBACKS_NOT_NEEDED[name]}"


def _duration(entry: Entry) -> str:
    """The older "DD:HH:MM:SS", or a mapping of days, hours and so on, in the form of --max_time."""
    seconds_of = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    value = entry.values[0] if len(entry.values) == 1 else None
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(:\d+){3}\s*", value):
        value = dict(zip(("days", "hours", "minutes", "seconds"), value.strip().split(":"), strict=True))
    if not isinstance(value, dict) or not all(k in seconds_of and str(v).isdecimal() for k, v in value.items()):
        raise UserError(f"{entry.label} must look like 00:12:00:00 (days:hours:minutes:seconds), not {entry.shown}")
    seconds = sum(int(number) * seconds_of[unit] for unit, number in value.items())
    parts = (seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60, seconds % 60)
    return "".join(f"{part}{unit}" for part, unit in zip(parts, "dhms", strict=True) if part) or "0s"


def _run(old: _Old) -> None:
    """The model and the run's folder, which there were always GPT-2 small and the next version of lightning_logs.

    A run that is continued has to be named.
    """
    old.default("model_type", "gpt2-small", "--{} is not given: {}")
    continues = old.own_values("do_continue")
    if continues is None or [str(value).lower() for value in continues] in (["false"], ["no"]):
        used = [path.name.removeprefix("version_") for path in Path("lightning_logs").glob("version_*")]
        number = max((int(text) for text in used if text.isdecimal()), default=-1) + 1
        old.default("model_dir", f"lightning_logs/version_{number}", "--{} is not given: {}")


def _same(entry: Entry, default: str) -> bool:
    """Whether a value is the default, however it is spelt; to Lightning 1.0 means all, but 1 a single batch."""
    if len(entry.values) != 1 or not isinstance(entry.values[0], str):
        return False
    text = entry.values[0].strip()
    try:
        return float(text) == float(default) and (default != "1.0" or not text.isdecimal())
    except ValueError:
        return text.casefold() == default.casefold()


def _refused(entry: Entry, accepted: str, instead: str) -> UserError:
    reasons = "; ".join(filter(None, (accepted, instead)))
    return UserError(f"{f'{entry.label} {entry.shown}'.rstrip()} has no counterpart here{reasons and f': {reasons}'}")
