"""How many rows a process computes at once on its GPU: as many as fit, which is tried out when a run begins.

What a step computes does not depend on it but for the last bits, as sums are added in another order: what was found is
kept in the state, and taken again where the same processes go on with the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lmscripts.data.steps import Phase, Phases, to_device
from lmscripts.errors import UserError
from lmscripts.training.processes import who

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lmscripts.objectives.module import Objective
    from lmscripts.training.state import TrainingState

_FIRST_TOKENS, _MOST_TOKENS = 1 << 12, 1 << 16  # of a pass, where trying begins and where more would gain nothing
_SPARE = 0.1  # of the memory, for what is allocated later and for gaps


def most_rows(attempt: Callable[[int], None], first: int, most: int) -> int:
    """The most rows that can be computed at once: doubled from the first that can, up to `most`.

    Args:
        attempt: computes so many rows.
        first: rows to begin with.
        most: no more than these are tried.

    Raises:
        torch.OutOfMemoryError: not even one row can be computed.
    """
    rows, found, too_many = min(first, most), 0, most + 1
    while found < rows < too_many:
        try:
            attempt(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows, too_many = rows // 2, rows
        else:
            found, rows = rows, min(2 * rows, most)
    return found


def fit(
    accelerator: Accelerator,
    data: Phases,
    objective: Objective,
    state: TrainingState,
    attempts: Callable[[Accelerator, Phase, Objective], Callable[[int], None]] | None = None,
) -> tuple[Phases, list[str]]:
    """The phases with as many rows at once as fit, where nobody said how many; every process calls it.

    Args:
        accelerator: the running processes, each of which finds its own number.
        data: of the run.
        objective: on its device; its gradients are gone afterwards.
        state: of the run, in which it is kept.
        attempts: gives what tries a number of rows of a phase; None for `on_gpu`.

    Returns:
        The phases, and a sentence for the user where it was tried or is known.

    Raises:
        UserError: not even one row fits.
    """
    from accelerate.utils import gather_object

    if not any(phase.is_tried for phase in data.phases):
        return data, []
    rank, device, name = accelerator.process_index, accelerator.device, who(accelerator.process_index)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name += f" ({found.name}, {found.total_memory / 2**30:.1f} GiB)"
    names = gather_object([name])
    if list(state.rows_at_once) != names:
        rows = [_rows(phase, rank, (attempts or on_gpu)(accelerator, phase, objective), name) for phase in data.phases]
        state.rows_at_once = dict(zip(names, gather_object([rows]), strict=True))
    own = state.rows_at_once[name]
    phases = [replace(p, micro_batch_size=n) if p.is_tried else p for p, n in zip(data.phases, own, strict=True)]
    said = (f"{each} {' then '.join(f'{n:,}' for n in rows)}" for each, rows in state.rows_at_once.items())
    return Phases(phases), [f"rows at once: {', '.join(said)}"]


def _rows(phase: Phase, rank: int, attempt: Callable[[int], None], name: str) -> int:
    length, share = phase.layout.sequence_length, max(1, phase.shares[rank])
    if not phase.is_tried:
        return phase.micro_batch_size
    try:
        return most_rows(attempt, max(1, _FIRST_TOKENS // length), min(share, max(1, _MOST_TOKENS // length)))
    except torch.OutOfMemoryError:
        raise UserError(
            f"a single row of {length:,} tokens does not fit into the memory of {name}: give a smaller "
            "--sequence_length or model, --activation_checkpointing, or --shard"
        ) from None


def on_gpu(accelerator: Accelerator, phase: Phase, objective: Objective) -> Callable[[int], None]:
    """What computes so many rows of a phase for nothing, beside what is still to be allocated.

    The model is called as it is, neither compiled, which would take minutes, nor with the other processes.
    """
    rank, device = accelerator.process_index, accelerator.device
    moments = sum(2 * each.numel() * each.element_size() for each in objective.parameters() if each.requires_grad)

    def attempt(rows: int) -> None:
        torch.cuda.empty_cache()
        spare = moments + int(_SPARE * torch.cuda.get_device_properties(device).total_memory)
        kept: Sequence[torch.Tensor] = [torch.empty(spare, dtype=torch.uint8, device=device)]
        micro_batches, counts = next(replace(phase, micro_batch_size=rows).step_batches(0, 1, rank))
        try:
            for _ in range(2):  # the second beside the gradients of the first
                sums = objective.train().forward(to_device(micro_batches[0], device))
                objective.loss(sums, counts).backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)
        finally:
            del kept
            objective.zero_grad(set_to_none=True)

    return attempt
