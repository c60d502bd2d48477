"""Options of a classifier that make no sense beside each other, or beside what its table turns out to hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmscripts.errors import UserError

_SHARES, _VALIDATION_SHARE = {"train_share": 0.8, "test_share": 0.1}, 0.1  # defaults of the script


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
