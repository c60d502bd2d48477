"""Options of finetune_classifier.py that make no sense, refused before anything is imported or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmscripts.errors import UserError
from lmscripts.options.checks import check_numbers

_POSITIVE: tuple[str, ...] = (
    "epochs",
    "patience",
    "lora_rank",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "save_steps",
    "keep_last",
)
_POSITIVE += ("stop_at_step", "max_length", "num_workers", "logging_steps", "expected_processes", "timeout")
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "seed", "split_seed", "overlap", "max_words")
_SHARES, _VALIDATION_SHARE = {"train_share": 0.8, "test_share": 0.1}, 0.1  # defaults of the script


def check_options(values: Mapping[str, Any]) -> None:
    """Refuse numbers and combinations that make no sense.

    Raises:
        UserError: naming them.
    """
    below_one = ("dropout", "label_smoothing", "warmup_share")
    check_numbers(values, positive=_POSITIVE, not_negative=_NOT_NEGATIVE, below_one=below_one)
    check_metric(values["metric"], bool(values["separator"]))
    if values["split_column"] or values["validation_file"] or values["test_file"]:
        check_shares(values)
    if values["lora_rank"] and values["from_scratch"]:
        raise UserError("--lora_rank adds to trained weights, and --from_scratch has none: give one of them")
    if values["split_column"] and (values["validation_file"] or values["test_file"]):
        raise UserError("give --split_column, or a file for each part, not both")


def check_metric(metric: str, multi_label: bool) -> None:
    """Refuse a metric that is not defined for several labels a row; an SQLite file says itself whether it has them.

    Raises:
        UserError: naming it.
    """
    if multi_label and metric in ("balanced_accuracy", "mcc"):
        raise UserError(f"--metric {metric} is for one label a row: take macro_f1, accuracy or loss")


def check_shares(values: Mapping[str, Any]) -> None:
    """Refuse shares where a column or files say which document is for what.

    Raises:
        UserError: naming the shares.
    """
    given = [f"--{name} {values[name]:g}" for name, usual in _SHARES.items() if values[name] != usual]
    if values["validation_file"] and values["validation_share"] not in (0, _VALIDATION_SHARE):
        given.append(f"--validation_share {values['validation_share']:g}")
    if given:
        raise UserError(
            f"the table or its files say which documents are for training and testing: leave out {' and '.join(given)} "
            "(only --validation_share has a meaning then, where no document is given for validation)"
        )
