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

    from lmscripts.objectives import MaskedLanguageModel

# Rows of the given numbers as a masked batch with its counts; an empty list of numbers gives None.
MakeBatch = Callable[[np.ndarray[tuple[int], np.dtype[np.int64]]], tuple[Batch, dict[str, float]]]


def evaluate(
    accelerator: Accelerator,
    objective: MaskedLanguageModel,
    make_batch: MakeBatch,
    num_rows: int,
    micro_batch_size: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss per target and accuracy over held-out rows, the same for any number of processes.

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
        "loss", "accuracy" and "targets"; None when a process was asked to stop before the end.
    """
    shares = split_shares(num_rows, [1] * accelerator.num_processes)
    first = sum(shares[: accelerator.process_index])
    mine = np.arange(first, first + shares[accelerator.process_index])
    passes = -(-max(shares) // micro_batch_size)
    was_training = objective.training
    objective.eval()
    totals = np.zeros(3)
    try:
        with torch.no_grad(), accelerator.autocast():
            for number in range(passes):
                rows = mine[number * micro_batch_size : (number + 1) * micro_batch_size]
                batch, counts = make_batch(rows if rows.size else np.zeros(1, np.int64))
                sums = objective(to_device(batch, accelerator.device))
                if rows.size:
                    totals += [float(sums["mlm"]), float(sums["mlm_correct"]), counts["mlm"]]
                if sum_over_processes(accelerator, [float(stop_requested())])[0]:
                    return None
    finally:
        objective.train(was_training)
    loss, correct, targets = sum_over_processes(accelerator, totals.tolist())
    return {"loss": loss / max(1.0, targets), "accuracy": correct / max(1.0, targets), "targets": targets}
