"""Options of finetune_classifier.py that make no sense, refused before anything is imported or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmscripts.errors import UserError
from lmscripts.option_checks import check_numbers

_POSITIVE: tuple[str, ...] = (
    "epochs",
    "patience",
    "lora_rank",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "save_steps",
)
_POSITIVE += ("stop_at_step", "max_length", "num_workers", "logging_steps", "expected_processes", "timeout")
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "keep_last", "seed", "split_seed", "overlap", "max_words")


def check_options(values: Mapping[str, Any]) -> None:
    """Refuse numbers and combinations that make no sense.

    Raises:
        UserError: naming them.
    """
    below_one = ("dropout", "label_smoothing", "warmup_share")
    check_numbers(values, positive=_POSITIVE, not_negative=_NOT_NEGATIVE, below_one=below_one)
    if values["separator"] and values["metric"] in ("balanced_accuracy", "mcc"):
        raise UserError(f"--metric {values['metric']} is for one label a row: take macro_f1, accuracy or loss")
    if values["lora_rank"] and values["from_scratch"]:
        raise UserError("--lora_rank adds to trained weights, and --from_scratch has none: give one of them")
    if values["split_column"] and (values["validation_file"] or values["test_file"]):
        raise UserError("give --split_column, or a file for each part, not both")
