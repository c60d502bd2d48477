"""Held-out evaluation: the same rows and the same masks every time, weighted by token over all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmscripts.distributed import sum_over_processes
from lmscripts.loader import to_device
from lmscripts.objectives import Batch
from lmscripts.order import split_shares

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.objectives import MaskedLanguageModel, ReplacedTokenDetection

# Rows of the given numbers as a masked batch with its counts; an empty list of numbers gives None.
MakeBatch = Callable[[np.ndarray[tuple[int], np.dtype[np.int64]]], tuple[Batch, dict[str, float]]]


def evaluate(
    accelerator: Accelerator,
    objective: MaskedLanguageModel | ReplacedTokenDetection,
    make_batch: MakeBatch,
    num_rows: int,
    micro_batch_size: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """What the objective measures on held-out rows, the same for any number of processes.

    Every process runs the same number of forward passes, with an unweighted row where it has none left, so that a
    sharded model stays aligned and a request to stop is seen by all after the same pass.

    Args:
        accelerator: the running processes.
        objective: the module, in any mode; it is left in the mode it had.
        make_batch: builds the batch of given row numbers, always with the same masks.
        num_rows: rows of the held-out part.
        micro_batch_size: rows per forward pass.
        stop_requested: asked on each process after each pass.

    Returns:
        The objective's metrics, empty without a single target; None when a process was asked to stop before the end.
    """
    shares = split_shares(num_rows, [1] * accelerator.num_processes)
    first = sum(shares[: accelerator.process_index])
    mine = np.arange(first, first + shares[accelerator.process_index])
    passes = -(-max(shares) // micro_batch_size)
    was_training = objective.training
    objective.eval()
    totals: dict[tuple[str, str], float] = {}
    try:
        with torch.no_grad(), accelerator.autocast():
            for number in range(passes):
                rows = mine[number * micro_batch_size : (number + 1) * micro_batch_size]
                batch, counts = make_batch(rows if rows.size else np.zeros(1, np.int64))
                found = objective(to_device(batch, accelerator.device))
                # One key for each sum and each count, on every process the same.
                both = {("sum", name): value for name, value in found.items()}
                both |= {("count", name): value for name, value in counts.items()}
                for key, value in both.items():
                    totals[key] = totals.get(key, 0.0) + (float(value) if rows.size else 0.0)
                if sum_over_processes(accelerator, [float(stop_requested())])[0]:
                    return None
    finally:
        objective.train(was_training)
    together = dict(zip(totals, sum_over_processes(accelerator, list(totals.values())), strict=True))
    sums, targets = ({n: v for (kind, n), v in together.items() if kind == wanted} for wanted in ("sum", "count"))
    return objective.metrics(sums, targets) if targets["mlm"] else {}
