"""Evaluation: the same rows and the same masks every time, and the same bits for any number of processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lmscripts.data.steps import Batch, to_device
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.objectives.module import Objective
from lmscripts.text.corpus import HUB, Span, is_plain, read_documents, table_texts
from lmscripts.text.reading import format_of, opened
from lmscripts.text.records import TEXTS, TableOptions
from lmscripts.text.report import TextReport

# Rows of the given numbers as a batch with its counts.
MakeBatch = Callable[[NDArray[np.int64]], tuple[Batch, dict[str, float]]]
Store = TypeVar("Store")
Progress = Callable[[int, int], None]  # passes done, passes in all
SHORTEST_ROW = 10  # tokens of an input of a masked model: below it `lmscripts.data.packing` makes no rows of text


def measure_batches(
    accelerator: Accelerator,
    num_batches: int,
    measure: Callable[[int], torch.Tensor],
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress = lambda done, passes: None,
) -> torch.Tensor | None:
    """What numbered batches (at least one) measure, bitwise the same for any number of processes.

    Batch n is measured by process n % world, as W numbers; what is in it must not depend on the processes. After each
    pass one all-reduce carries what all have measured, in which a process fills its own row only: adding zeros is
    exact, so every process then has the numbers of every batch.

    Every process makes the same number of passes, the last time with a batch that does not count if it has none left,
    so that a sharded model stays aligned and a request to stop is seen by all after the same pass. After each pass
    `stop_requested` is asked and `progress` called on each process.

    Returns:
        (N, W) float64 (float32 where the device has none); None when a process was asked to stop before the end.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    passes = list[torch.Tensor]()
    for first in range(0, num_batches, world):
        mine = measure(first + rank if first + rank < num_batches else 0)
        places = torch.zeros(world, len(mine) + 1, dtype=dtype, device=accelerator.device)
        places[rank, :-1], places[rank, -1] = mine, float(stop_requested())
        summed: Any = accelerator.reduce(places, "sum")
        if summed[:, -1].any():
            return None
        passes.append(summed[: num_batches - first, :-1])
        progress(first // world + 1, -(-num_batches // world))
    return torch.cat(passes)


def sum_over_batches(
    accelerator: Accelerator,
    num_batches: int,
    measure: Callable[[int], Mapping[Any, float | torch.Tensor]],
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress = lambda done, passes: None,
) -> dict[Any, float] | None:
    """Sums of what `measure` names, always in the same order, without gradients; see `measure_batches`.

    Batches are added in their order. Empty without batches; None when a process was asked to stop before the end.
    """
    names = list[Any]()

    def numbers(batch: int) -> torch.Tensor:
        measured = measure(batch)
        names[:] = measured
        return torch.tensor([float(value) for value in measured.values()], dtype=torch.float64)

    if num_batches == 0:
        return {}
    with torch.no_grad(), accelerator.autocast():
        found = measure_batches(accelerator, num_batches, numbers, stop_requested, progress)
    if found is None:
        return None
    totals = dict.fromkeys(names, 0.0)
    for numbers_of_batch in found.tolist():  # not by sum(), whose rounding differs between versions of Python
        for name, value in zip(names, numbers_of_batch, strict=True):
            totals[name] += value
    return totals


class Shown:
    """Progress of the main process: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, accelerator: Accelerator, what: str) -> None:
        self._shown, self._what, self._said = accelerator.is_main_process, what, time.monotonic()
        self._bar: Any = None

    def __call__(self, done: int, passes: int) -> None:
        """Called after each forward pass."""
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(total=passes, desc=self._what)
            self._bar.update()
            if done == passes:
                self._bar.close()
        elif self._shown and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            with suppress(BrokenPipeError):
                sys.stderr.write(f"{self._what}: {done:,} of {passes:,} forward passes\n")
                sys.stderr.flush()


@contextmanager
def judging(objective: torch.nn.Module) -> Iterator[None]:
    """Compute without gradients and dropout; the module is left in the mode it had."""
    was_training = objective.training
    objective.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        objective.train(was_training)


def evaluate(
    accelerator: Accelerator,
    objective: Objective,
    make_batch: MakeBatch,
    num_rows: int,
    micro_batch_size: int,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Progress = lambda done, passes: None,
) -> tuple[dict[str, float] | None, dict[str, float]]:
    """What the objective measures on held-out rows, bitwise the same for any number of processes.

    The objective may be in any mode and is left in it; `make_batch` has to give rows the same masks always. For the
    rest see `measure_batches`.

    Returns:
        The objective's metrics, empty without a single target, and the counts of its targets; None in place of the
        metrics when a process was asked to stop before the end.
    """

    def measure(number: int) -> dict[tuple[str, str], float | torch.Tensor]:
        begin = number * micro_batch_size
        batch, counts = make_batch(np.arange(begin, min(num_rows, begin + micro_batch_size)))
        found = objective(to_device(batch, accelerator.device))
        return {("sum", name): v for name, v in found.items()} | {("count", name): v for name, v in counts.items()}

    with judging(objective):
        num_batches = -(-num_rows // micro_batch_size)
        totals = sum_over_batches(accelerator, num_batches, measure, stop_requested, progress)
    if totals is None:
        return None, {}
    sums, counts = ({name: v for (what, name), v in totals.items() if what == kind} for kind in ("sum", "count"))
    return (objective.metrics(sums, counts) if counts.get(next(iter(objective.weights))) else {}), counts


# ---- text --------------------------------------------------------------------------------------------------------


def text_facts(files: Sequence[Path], table: TableOptions, document_per_line: bool) -> list[dict[str, Any]]:
    """Name, bytes (see `raw_text_bytes`) and sha256 of each file of a text, from `find_files`.

    Raises:
        UserError: a file that is given twice, an option without effect on these files, or not one document.
    """
    known: dict[tuple[int, int], Path] = {}
    for path in files:
        if not str(path).startswith(HUB):
            status = path.stat()
            if (other := known.setdefault((status.st_dev, status.st_ino), path)) is not path:
                raise UserError(f"{other} and {path} are the same file, whose text would count twice: give it once")
    are_text = [is_plain(str(path), table.format) for path in files]
    useless = [f"--text_column {table.text}"] if table.text != TEXTS.text else []
    useless += [f"--delimiter {table.delimiter}"] if table.delimiter else []
    useless += [] if table.quotes else ["--no_quotes"]
    if useless and all(are_text):
        raise UserError(f"{useless[0]} has no effect: only .txt files are given, which have no columns")
    if document_per_line and not any(are_text):
        raise UserError("--document_per_line has no effect: no .txt file is given, and a record is a document")
    sizes, report = [raw_text_bytes(path, table) for path in files], TextReport()
    spans = [Span(str(path)) for path in files]
    if next(read_documents(spans, report, table, document_per_line=document_per_line), None) is None:
        told = "; ".join(["not one line that is not empty", *report.sentences()[1:]])
        raise UserError(f"{' '.join(map(str, files))} holds no text: {sum(sizes)} bytes, {told}")
    facts = [{"file": p.name, "bytes": size, "sha256": file_sha256(p)} for p, size in zip(files, sizes, strict=True)]
    for fact, is_text in zip(facts, are_text, strict=True):
        if not is_text and format_of(str(fact["file"]))[0] == "txt":
            fact["format"] = table.format or "jsonl"  # which the name does not tell
    return facts


def raw_text_bytes(path: Path, table: TableOptions) -> int:
    """Bytes of the text of a file as it is, before anything is cleaned or dropped.

    Of plain text all bytes of the file, decompressed; of tables the UTF-8 bytes of the text column.

    Raises:
        UserError: a data set on the Hub, whose bytes nobody can count twice, or a damaged file.
    """
    name = str(path)
    if name.startswith(HUB):
        raise UserError(f"{name} is a stream from the Hub, which may change: save it as a file and evaluate on that")
    if not is_plain(name, table.format):
        return sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in table_texts(name, table, TextReport()))
    with opened(name) as file:
        return sum(map(len, iter(partial(file.read, 1 << 20), b"")))


@contextmanager
def temporary_store(prepare_beside: Callable[[Path], Store]) -> Iterator[Store]:
    """A store of a text for as long as it is evaluated, removed however the block ends.

    Called before the processes join, by all of them: of those on one machine the first builds, and removes at the end.
    `prepare_beside` makes the store beside the folder of a run, which is not there.
    """
    builds = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A name that the processes of this run on this machine know without asking each other.
        names = ("MASTER_PORT", "SLURM_JOB_ID", "GROUP_RANK")
        run = "-".join([str(os.getuid()), *(os.environ.get(name, "0") for name in names)])
        folder = Path(tempfile.gettempdir()) / f"lmscripts-evaluation-{run}"
    else:
        folder = Path(tempfile.mkdtemp(prefix="lmscripts-evaluation-"))
    try:
        yield prepare_beside(folder / "run")
    finally:
        if builds:
            shutil.rmtree(folder, ignore_errors=True)
