"""Evaluate a saved policy on decisions whose choice is known: loss, top-1, top-3, calibration, by type of candidate.

python scripts/evaluate_policy.py --model runs/mine --data store --output_file result.json
python scripts/evaluate_policy.py --model runs/mine/snapshots/02 --data held_out.txt.gz 'shards/*.txt'

Decisions are a store of prepare_annotations.py, of which the held-out games are taken, or records as text. Runs under
`accelerate launch` too, with the same bits for any number of processes. A model that was never trained is named.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmscripts.errors import UserError, leave, user_errors
from lmscripts.files import write_text
from lmscripts.options import check_numbers, option, parse_options

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.data.decisions import DecisionPart, DecisionStore
    from lmscripts.models.saved import Saved


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model: str = option(help="folder of a policy, a snapshot, or the folder of a run")
    data: tuple[str, ...] = option(
        (), help="a store, or records: files, globs or folders, each also compressed", required=True
    )
    part: Literal["validation", "train"] | None = option(
        None, help="of a store; default: what is held out, where something is"
    )
    output_file: str | None = option(
        None, help="JSON file for the result; replaced only by a whole result", writes="file"
    )
    require_trained: bool = option(False, help="make it an error if the model was never trained")
    dry_run: bool = option(False, help="say what would be evaluated, and end")

    batch_size: int = option(256, help="records of one forward pass on one process", group="scores", most=10**6)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", help="of the matrix products", group="scores")
    cpu_threads: int = option(
        1, help="threads of a process without a GPU; the last digits depend on it", group="scores", most=1024
    )
    num_workers: int = option(1, help="processes that read text", group="scores", most=1024)
    on_bad_row: Literal["fail", "skip"] = option("fail", help="what becomes of a bad line of text", group="scores")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is done."""
        check_numbers(vars(self), positive=("batch_size", "cpu_threads", "num_workers"))


def main() -> None:
    """Parse, evaluate, write."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors(only_words=True):
        evaluate(options)


def evaluate(options: Options) -> None:
    """Load and check everything, judge, then print and write the result; ends the process."""
