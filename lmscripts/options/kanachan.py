"""Words of an older policy trainer, and of the `key=value` lines of its successor, and what they mean here.

The options of the older one are those of the script. Here are its values that have other names now, the words of this
project's other scripts for the same things, and the successor's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.options.yaml_text import LINE, Entry

SYSTEM = "an older trainer of policies and its successor"
_PRECISIONS = {"O0": "no"} | dict.fromkeys(("O1", "O2", "O3"), "fp16_on_gpu")
_TYPES = {"float16": "fp16_on_gpu", "half": "fp16_on_gpu", "bfloat16": "bf16"} | dict.fromkeys(
    ("float32", "float", "float64", "double"), "no"
)
_SNAPSHOTS = "--initial-encoder, --initial-decoder and --initial-optimizer name folders"
_ONE_FALL = "--schedule cosine falls once, over the whole run"
# The successor's keys -> ours. Several of its keys may be one here; they have to agree then.
_RENAMED = {
    "encoder": "model_preset",
    "encoder.load_from": "initial_encoder",
    "encoder.dimension": "dimension",
    "encoder.num_heads": "num_heads",
    "encoder.num_layers": "num_layers",
    "encoder.dim_feedforward": "dim_feedforward",
    "encoder.activation_function": "activation_function",
    "encoder.dropout": "dropout",
    "decoder.load_from": "initial_decoder",
    "decoder.dim_feedforward": "dim_final_feedforward",
    "decoder.activation_function": "activation_function",
    "decoder.dropout": "dropout",
    "optimizer.type": "optimizer",
    "optimizer.momentum": "momentum",
    "optimizer.epsilon": "epsilon",
    "optimizer.learning_rate": "learning_rate",
    "optimizer.warmup_steps": "warmup_steps",
    "device.type": "device",
    "device.amp_dtype": "precision",
    "amp_optimization_level": "precision",
}
_VALUES: dict[str, dict[str, str]] = {
    "model_preset": {f"bert_{name}": name for name in ("tiny", "mini", "small", "base", "large")},
    "precision": _PRECISIONS | _TYPES,
}
# What is accepted without effect, by key and value, and why; another value has no counterpart.
_LIKE_HERE: dict[str, tuple[tuple[str, ...], str]] = {
    "encoder.position_encoder": (("position_embedding",), "positions are learned; --original has the older ones"),
    "decoder": (("double",), "a head has one hidden layer"),
    "decoder.num_layers": (("2",), "a head has one hidden layer"),
    "optimizer.annealing_steps": (("0",), _ONE_FALL),
    "optimizer.annealing_steps_factor": (("1",), _ONE_FALL),
    "optimizer.use_zero": (("false",), "the file of `accelerate launch --config_file` says how processes share"),
    "optimizer.initialize": (("false",), "--resume goes on with the state that there is"),
    "device.dtype": (("float32", "float"), "weights are float32"),
    "initial_model_prefix": (("null",), _SNAPSHOTS),
    "initial_model_index": (("null",), _SNAPSHOTS),
}
_DROPPED = {"optimizer.warmup_start_lr": "the first step of the warmup has its share of the rate"}
_SECOND = "training_batch_size"
KEYS = (*_RENAMED, *_LIKE_HERE, *_DROPPED, "initial_model", "model_dir")
# Keys that may stand on the line as `key=value`, without dashes: there all of them could.
WORDS = frozenset(KEYS) - {"model_dir", "amp_optimization_level"} | {
    "training_data", "validation_data", "num_workers", "checkpointing", "training_batch_size", "batch_size",
    "validation_batch_size", "gradient_accumulation_steps", "max_gradient_norm", "snapshot_interval", "optimizer",
    "device"
}  # fmt: skip

POLICY: dict[str, Any] = {
    "renamed": {  # of this project's other scripts
        "do_continue": "resume",
        "batch_size": "training_batch_size",
        "epochs": "num_epochs",
        "max_grad_norm": "max_gradient_norm",
        "hidden_dropout": "dropout",
        "activation_checkpointing": "checkpointing",
        "input_file": "training_data",
        "dataset_dir": "training_data",
        "validation_file": "validation_data",
        "output_dir": "output_prefix",
        "run_name": "experiment_name",
        "keep_last": "keep_snapshots",
    },
    "refused": {
        "save_steps": "--snapshot-interval counts records, and the end of each epoch has a snapshot",
        "max_steps": "--num-epochs says how long; --stop_at_step ends a job early",
    },
}


def translate(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Replace the older names and values by options of train_policy.py.

    Args:
        entries: of the command line and of the file.

    Returns:
        The entries under the names of today, and sentences for the user.

    Raises:
        UserError: what was asked for has no counterpart here.
    """
    found, notices = list[Entry](), list[str]()
    sizes = [number for number, entry in enumerate(entries) if entry.origin == LINE and entry.key == _SECOND]
    for number, entry in enumerate(entries):
        if sizes[1:2] == [number]:  # the slip of the older page, which has the name twice
            notices.append(f"the second --training-batch-size is --validation-batch-size {entry.shown}")
            entry = replace(entry, key="validation_batch_size")
        found += _meant(entry, notices)
    return found, notices


def _meant(entry: Entry, notices: list[str]) -> list[Entry]:
    """What an entry is here, none where it has no effect; joins the sentences."""
    key, value = entry.key, entry.shown
    if key == "model_dir":
        notices.append("--model_dir is now --output-prefix and --experiment-name")
        place = Path(value)
        parts = {"output_prefix": str(place.parent), "experiment_name": place.name}
        return [replace(entry, key=name, values=[part]) for name, part in parts.items()]
    if key == "initial_model":
        notices.append(f"initial_model is now --initial-encoder and --initial-decoder, {value}")
        return [replace(entry, key=name) for name in ("initial_encoder", "initial_decoder")]
    if (key, value) == ("encoder", "bert_medium"):
        notices.append("encoder bert_medium is now --model_preset small with --num_layers 8")
        return [replace(entry, key="model_preset", values=["small"]), replace(entry, key="num_layers", values=["8"])]
    if key in _DROPPED:
        notices.append(f"{key} has no effect: {_DROPPED[key]}")
        return []
    if key in _LIKE_HERE:
        values, why = _LIKE_HERE[key]
        if value.casefold() not in values:
            raise UserError(f"{key}={value} has no counterpart here, only {' or '.join(values)} is accepted: {why}")
        notices.append(f"{key} has no effect: {why}")
        return []
    name = _RENAMED.get(key, key)
    new = _VALUES.get(name, {}).get(value, value)
    if (name, new) != (key, value):
        notices.append(f"{entry.label if key != name else f'--{key}'} {value} is now --{name} {new}")
    return [replace(entry, key=name, values=[new] if new != value else entry.values)]
