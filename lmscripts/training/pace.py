"""How fast each process computes and how long it waits for the others; rows in proportion to that (`--balance auto`).

What a step computes does not depend on who computes it, so that rows may be divided anew between any two steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from accelerate.utils import send_to_device
from torch.nn.parallel import DistributedDataParallel

from lmscripts.data.steps import Batch, Counts, Prefetcher
from lmscripts.training.processes import slots, sum_over_processes, who
from lmscripts.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

Balance = Literal["even", "auto"]
_SKIPPED = 5  # steps until kernels are chosen and compiled, and caches are warm
_MEASURED = 20  # steps that are measured then
_LEFT_OUT = 2  # of these, the slowest: a hiccup must not decide for the rest of a run


class Steps(Protocol):
    """Rows of steps, such as `lmscripts.data.steps.Phases`."""

    def prefetch(
        self, first: int, stop: int, process: int, shares: Sequence[int] = ()
    ) -> Prefetcher[tuple[list[Batch], Counts]]:
        """Micro-batches of a process for the steps [first, stop), by the shares of all processes."""


class Pace:
    """When this process computes and when it waits: its clock for the steps of a model that is shared (DDP).

    It computes from the moment when the sums over all processes are known, with which a step begins, until its own last
    gradient is there; the exchange of sums and of gradients is waiting. On a GPU both are measured there, by events in
    its queue, so that nothing waits for the measuring.

    Attributes:
        is_shared: there are other processes to wait for.
        waited: seconds since somebody set it to 0.
        rows: of the step that is being computed.
        names: of all processes, with their machines.
    """

    def __init__(self, device: torch.device, model: Any = None) -> None:
        """Begin; without a model that is shared, nothing is measured."""
        self._device, self._marks = device, dict[str, Any]()
        self._model, self.is_shared = model, isinstance(model, DistributedDataParallel)
        self.waited, self.rows = 0.0, 0
        self.names = list[str]()
        self._steps = deque[tuple[float, int]](maxlen=_MEASURED)  # seconds and rows
        self._open = deque[tuple[dict[str, Any], int]]()  # marks and rows of steps that a GPU may still compute
        self._watch([each for each in model.parameters() if each.requires_grad] if self.is_shared else [])

    def _watch(self, parameters: list[torch.Tensor]) -> None:
        hooks = [each.register_post_accumulate_grad_hook(self._arrived) for each in parameters]  # type: ignore[no-untyped-call]
        self._hooks = hooks

    def rehearse(self, batch: Batch) -> None:
        """Compute a batch once for nothing, with gradients of 0 that are exchanged.

        DDP puts its buckets in the order of the gradients after its first backward pass. In which order three or more
        numbers are added depends on the buckets, and a run that goes on is to add as one that was not interrupted.
        """
        sums = self._model(send_to_device(batch, self._device))
        (sum(each.sum() for each in sums.values() if each.requires_grad) * 0).backward()
        self._model.zero_grad(set_to_none=True)
        self._marks = {}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def _between(begin: Any, end: Any) -> float:
        return float(end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what is agreed on before a step is computed."""
        self._marks = {"begun": self._mark()}
        yield
        self._marks["agreed"] = self._mark()

    def _arrived(self, parameter: torch.Tensor) -> None:
        self._marks["gradient"], self._last = self._mark(), parameter

    def exchanged(self) -> None:
        """After a backward pass, the last of which has waited for the gradients of all."""
        self._marks["exchanged"] = self._mark()

    def settle(self, wait: bool = False) -> None:
        """Count the steps that were computed; those that a GPU still computes later, unless it is waited for."""
        if "gradient" in self._marks:
            self._open.append((self._marks, self.rows))
            if len(self._hooks) > 1:  # from now on only the one whose gradient comes last is watched
                for hook in self._hooks:
                    hook.remove()
                self._watch([self._last])
        self._marks = {}
        while self._open:
            marks, rows = self._open[0]
            begun, agreed, gradient, exchanged = (marks[name] for name in ("begun", "agreed", "gradient", "exchanged"))
            if not isinstance(exchanged, float):
                if wait:
                    exchanged.synchronize()
                elif not exchanged.query():
                    break
            self.waited += self._between(begun, agreed) + self._between(gradient, exchanged)
            self._steps.append((self._between(agreed, gradient), rows))
            self._open.popleft()

    def speed(self) -> float:
        """Rows per second of the last steps, without the slowest of them."""
        steps = sorted(self._steps, key=lambda step: step[0] / step[1])[: max(1, len(self._steps) - _LEFT_OUT)]
        return sum(rows for _, rows in steps) / max(1e-9, sum(seconds for seconds, _ in steps))


class Batches(Iterator[tuple[list[Batch], Counts]]):
    """Micro-batches of this process with the counts of their targets, step after step.

    With "auto", the rows are divided anew once the speed of every process is known, and then no more. The speeds are
    kept in the state: a run that is continued takes them again, if it has the same processes on the same machines.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        steps: Steps,
        state: TrainingState,
        stop_step: int,
        pace: Pace,
        report: Callable[[int, dict[str, float], str], None],
        balance: Balance,
    ) -> None:
        """Begin to make them; every process calls it.

        Args:
            accelerator: the running processes.
            steps: of the run.
            state: where the run stands; counts the steps.
            stop_step: where this job ends.
            pace: of this process.
            report: writes a record of a step, and shows it in words.
            balance: "auto", or "even" for the shares that the steps have.
        """
        from accelerate.utils import gather_object

        self._accelerator, self._steps, self._state, self._stop = accelerator, steps, state, stop_step
        self._pace, self._report = pace, report
        pace.names = gather_object([who(accelerator.process_index)])
        is_auto = balance == "auto" and pace.is_shared
        if not is_auto or list(state.speeds) != pace.names:
            state.speeds = {}
        self._due = state.step + _SKIPPED + _MEASURED if is_auto and not state.speeds else -1
        if is_auto:
            later = f"--balance auto: the rows are divided by speed after step {self._due:,}"
            accelerator.print(f"{self._in_words()}, as measured before" if state.speeds else later, flush=True)
        self._begin()
        self._first: Any = None
        if pace.is_shared and accelerator.num_processes > 2 and state.step < stop_step:
            self._first = next(self._batches)
            pace.rehearse(self._first[0][0])

    def _begin(self) -> None:
        """From the step on that comes next."""
        fastest = max(self._state.speeds.values(), default=0.0)
        shares = [max(1, round(1000 * speed / fastest)) for speed in self._state.speeds.values()]
        self._batches = self._steps.prefetch(self._state.step, self._stop, self._accelerator.process_index, shares)

    def __next__(self) -> tuple[list[Batch], Counts]:
        self._pace.settle(wait=self._state.step == self._due)
        if self._state.step == self._due:
            self.close()
            speeds = sum_over_processes(self._accelerator, slots(self._accelerator, self._pace.speed()))
            self._state.speeds = dict(zip(self._pace.names, speeds, strict=True))
            record = {f"rows_per_second_{rank}": speed for rank, speed in enumerate(speeds)}
            self._report(self._state.step, record, f"{self._in_words()}, as fast as each was")
            self._begin()
        micro_batches, counts = self._first or next(self._batches)
        self._first = None
        self._pace.rows = sum(len(batch["row_keys"]) for batch in micro_batches)
        return micro_batches, counts

    def _in_words(self) -> str:
        speeds, whole = self._state.speeds, sum(self._state.speeds.values())
        return "rows from here on: " + ", ".join(f"{name} {speed / whole:.0%}" for name, speed in speeds.items())

    def close(self) -> None:
        """Stop making them."""
        self._batches.close()
