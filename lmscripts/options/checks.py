"""Numbers and combinations of options that make no sense, refused before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lmscripts.errors import UserError

# Options of run_pretraining.py by the bounds of their values.
POSITIVE: tuple[str, ...] = (
    "batch_size",
    "micro_batch_size",
    "max_steps",
    "epochs",
    "save_steps",
    "logging_steps",
    "eval_every",
)
POSITIVE += ("stop_at_step", "learning_rate", "sequence_length", "decay_steps", "expected_processes", "timeout")
POSITIVE += ("num_workers", "phase_steps", "n_layer", "n_head", "n_embd")
NOT_NEGATIVE: tuple[str, ...] = (
    "warmup_steps",
    "eval_rows",
    "keep_last",
    "keep_every",
    "weight_decay",
    "epsilon",
    "max_grad_norm",
)
NOT_NEGATIVE += ("generator_weight", "discriminator_weight", "z_loss")
BELOW_ONE = ("hidden_dropout", "attention_dropout", "beta1", "beta2", "final_lr_ratio", "validation_fraction")
# Names of older systems that run_pretraining.py still takes, as arguments of `lmscripts.options.parsing.parse_options`.
OLDER_NAMES: dict[str, Mapping[str, Any]] = {
    "renamed": {"mecab_dic_type": "mecab_dic", "block_size": "sequence_length"},
    "renamed_values": {"tokenizer_type": {"sentencepiece": "unigram"}},
    "accepted_unused": {
        "disable_overwrite_cache": "a token store is reused whenever text, tokenizer and options are the same",
        "overwrite_cache": "a token store is made anew whenever text, tokenizer or options changed",
        "local_rank": "the launcher tells each process its place",
        "run_name": "the run is named by --model_dir",
    },
}


def check_numbers(
    values: Mapping[str, Any],
    *,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    below_one: Iterable[str] = (),
) -> None:
    """Check options by name; None is always fine.

    Args:
        values: option names and values; a word instead of a number has no bounds.
        positive: must be greater than 0.
        not_negative: must be at least 0.
        below_one: must be at least 0 and less than 1.

    Raises:
        UserError: names the option, its bounds and its value.
    """
    limits: tuple[tuple[Iterable[str], str, Callable[[float], bool]], ...] = (
        (positive, "greater than 0", lambda value: value > 0),
        (not_negative, "at least 0", lambda value: value >= 0),
        (below_one, "at least 0 and less than 1", lambda value: 0 <= value < 1),
    )
    for names, bounds, fits in limits:
        for name in names:
            given = values[name] if isinstance(values[name], tuple) else (values[name],)
            for value in given:
                if value is not None and not isinstance(value, str) and not fits(value):
                    raise UserError(f"--{name} must be {bounds}, got {value}")


def check_useless(values: Mapping[str, Any], why: str, *names: str) -> None:
    """Refuse options that were given although they would have no effect.

    Raises:
        UserError: names the option and why.
    """
    for name in names:
        if values[name] not in (None, ()):
            raise UserError(f"--{name} {values[name]} has no effect {why}")


def check_pretraining(values: Mapping[str, Any]) -> None:
    """Check the options of run_pretraining.py by themselves, before preset and text are known.

    Raises:
        UserError: a number out of its bounds, options that contradict each other, or one that would be ignored.
    """
    check_numbers(values, positive=POSITIVE, not_negative=NOT_NEGATIVE, below_one=BELOW_ONE)
    max_steps, epochs, decay_steps = (values[name] for name in ("max_steps", "epochs", "decay_steps"))
    if max_steps is not None and epochs is not None:
        raise UserError(f"--max_steps {max_steps} and --epochs {epochs} both say how long: give one")
    if values["phase_steps"]:
        check_useless(values, "with --phase_steps, which says how long", "max_steps", "epochs")
    if values["do_whole_word_mask"] and values["mask_unit"] not in (None, "word"):
        raise UserError(f"--do_whole_word_mask and --mask_unit {values['mask_unit']} contradict each other: give one")
    if values["frozen_layers"] is not None and values["frozen_layers"] < -1:
        raise UserError(f"--frozen_layers must be at least -1 (none), got {values['frozen_layers']}")
    if values["start_from"] is not None and values["carry_over"] is None:
        raise UserError(f"--start_from {values['start_from']} needs --carry_over weights, moments or everything")
    if values["start_from"] is None:
        check_useless(values, "without --start_from", "carry_over")
    if values["ema_decay"] is not None and not 0 < values["ema_decay"] < 1:
        raise UserError(f"--ema_decay must lie between 0 and 1, got {values['ema_decay']}")
    if values["decay_from"] is not None:
        check_useless(values, "with --decay_from, which takes everything", "start_from", "carry_over", "phase_steps")
    if (decay_steps is not None) != (values["schedule"] == "wsd"):
        raise UserError(f"--decay_steps {decay_steps} is not for --schedule {values['schedule']}; wsd needs it")
    if values["attention"] == "varlen" and values["attention_dropout"] > 0:
        raise UserError(f"--attention varlen has no dropout, but --attention_dropout is {values['attention_dropout']}")
    shares = values["process_shares"]
    if shares and (min(shares) < 0 or sum(shares) == 0):
        raise UserError(f"--process_shares must be at least 0 and not all 0, got {' '.join(map(str, shares))}")
    if values["schedule"] == "constant":
        check_useless(values, "with --schedule constant", "final_lr_ratio")
    if values["dataset_dir"]:
        check_useless(values, "with --dataset_dir", "validation_fraction", "validation_file", "num_workers")
    if values["validation_file"]:
        check_useless(values, "with --validation_file, which is what is held out", "validation_fraction")
    if values["fp16_type"] and values["precision"] not in (None, "fp16"):
        raise UserError(f"--fp16_type {values['fp16_type']} and --precision {values['precision']} differ: give one")
