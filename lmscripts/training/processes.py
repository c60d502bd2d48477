"""Processes: starting them with a check, dividing a batch among them, agreeing on sums, stopping together."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psutil
import torch
import yaml

from lmscripts.counters import split_shares, stream_key
from lmscripts.errors import UserError
from lmscripts.options.checks import duration_text

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
_OF_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what `accelerate launch` and torchrun set
_SHARE_OF_PEAK = 0.4  # of a matrix product's speed, what a training step reaches
_LONG = 2 * 86400  # seconds
STOPPED_EARLY = 75  # exit code of a run that a signal or a time limit ended after saving (EX_TEMPFAIL: try again)


def start_processes(
    *,
    mixed_precision: str | None = None,
    expected_processes: int | None = None,
    timeout_seconds: int = 600,
    trackers: Sequence[str] = (),
    project_dir: str | None = None,
) -> Accelerator:
    """Join the world that the launcher made, and check that it is the one that was asked for.

    On a host without CUDA the world is a gloo world: left alone, Accelerate would make every launched process the main
    process of a world of its own there, all writing to the same folder.

    Args:
        mixed_precision: "no", "fp16" or "bf16"; None takes what the Accelerate config says.
        expected_processes: the announced size of the world; None takes LMS_EXPECTED_WORLD_SIZE if that is set.
        timeout_seconds: how long a collective operation may wait for a silent process.
        trackers: names for `Accelerator(log_with=...)`.
        project_dir: where trackers write.

    Raises:
        UserError: the world is not the announced one, or fp16 was asked for on CPU.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1 and (asked := _asked_of_launcher()) > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one, as it does with --cpu, with MULTI_CPU "
            "and where there is no GPU: give --config_file accelerate_configs/cpu_2proc.yaml"
        )
    announced = expected_processes or int(os.environ.get("LMS_EXPECTED_WORLD_SIZE", "0")) or launched
    if launched != announced:
        raise UserError(
            f"{announced} processes were announced but {launched} were started: with several machines, num_processes "
            "in each machine's Accelerate config is its own number of processes times the number of machines"
        )
    # The library's own advice to drop an option that keeps every forward pass free of a broadcast.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    on_cpu = not torch.cuda.is_available()
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if on_cpu and precision == "fp16":
        raise UserError("fp16 on a CPU has no loss scaling and would train on rounding errors: use bf16 or no")
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=mixed_precision,
            log_with=list(trackers) or None,
            project_dir=project_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"not all of {launched} processes joined at {where}: {str(error).splitlines()[0]}") from None
    _check_world(accelerator, launched)
    if on_cpu:
        keep_memory()
    return accelerator


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for the tensors of the next step.

    glibc gives large blocks back to the system at once, which has to fill them with zeros when they are asked for
    again: on a CPU a tenth of a step. Where the C library is another one nothing is done.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is the system's own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 16 << 20)  # M_TOP_PAD: it grows by so many bytes at once


def in_words(accelerator: Accelerator) -> str:
    """How many processes there are on what, and in which precision they compute."""
    text = f"{accelerator.num_processes} on {accelerator.device.type}"
    if accelerator.device.type == "cpu" and os.environ.get("ACCELERATE_USE_CPU") == "False":
        text += " (no GPU was found, but the Accelerate config does not say use_cpu: true)"
    return f"{text}; precision {accelerator.mixed_precision}"


def _check_world(accelerator: Accelerator, launched: int) -> None:
    """Refuse a world in which training would silently be wrong."""
    if accelerator.num_processes != launched:
        raise UserError(f"the launcher started {launched} processes but Accelerate sees {accelerator.num_processes}")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps} in the Accelerate config: leave "
            "it at 1, accumulation follows from --batch_size and --micro_batch_size"
        )


def from_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Let the main process do something and give every process its result, or its error.

    Raises:
        UserError: what the main process raised, on every process.
    """
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise UserError(problem)
    return cast(Result, result)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compare facts that must be the same on all processes, such as the store's fingerprint and the options.

    Raises:
        UserError: on every process, naming what differs and both values.
    """
    from accelerate.utils import gather_object

    everywhere = gather_object([dict(facts)])
    for rank, theirs in enumerate(everywhere):
        for name, value in theirs.items():
            if value != everywhere[0][name]:
                raise UserError(f"{name} is {everywhere[0][name]} on process 0 but {value} on process {rank}")


def choose_precision(
    fp16_type: int | None, preset_fp16_type: int, preset_bf16: bool, precision: str | None = None
) -> str | None:
    """Mixed precision: of --precision or the older --fp16_type, else of the Accelerate config, else of the preset.

    Args:
        fp16_type: 0 leaves it to the config; 1, 2 and 3, once levels of Apex, all mean fp16.
        preset_fp16_type: the preset's, likewise.
        preset_bf16: the preset asks for bf16.
        precision: no, fp16, bf16, or fp16_on_gpu: fp16 where there is a GPU, else full precision.

    Raises:
        UserError: no such type, or the config asks for another precision.
    """
    if fp16_type and precision not in (None, "fp16"):
        raise UserError(f"--fp16_type {fp16_type} and --precision {precision} differ: give one")
    if precision == "fp16_on_gpu":
        precision = "fp16" if torch.cuda.is_available() else "no"
    if fp16_type not in (None, 0, 1, 2, 3):
        raise UserError(f"--fp16_type must be 0, 1, 2 or 3, got {fp16_type}")
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is not None:
        if configured not in (None, "no", precision):
            raise UserError(f"--precision is {precision}, but the Accelerate config asks for {configured}")
        return precision
    if fp16_type:
        if configured not in (None, "no", "fp16"):
            raise UserError(f"--fp16_type {fp16_type} asks for fp16, the Accelerate config for {configured}")
        return "fp16"
    if configured or fp16_type == 0:
        return configured
    return "bf16" if preset_bf16 else "fp16" if preset_fp16_type else None


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sums of each value over all processes, in float64."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.tensor(list(values), dtype=dtype, device=accelerator.device)
    summed: torch.Tensor = accelerator.reduce(tensor, "sum")
    return [float(value) for value in summed.tolist()]


def seed_dropout(seed: int, step: int, process: int) -> None:
    """Begin a step's random numbers anew, so that a run that is continued draws what it would have drawn."""
    torch.manual_seed(stream_key(seed, step, process) >> 1)


def nodes_of_processes(accelerator: Accelerator, node_rank: int | None = None) -> list[int]:
    """The node of each process, in the order of the ranks.

    Args:
        accelerator: the running processes.
        node_rank: this process' node; None takes what the launcher says (GROUP_RANK), else 0.
    """
    node = node_rank if node_rank is not None else int(os.environ.get("GROUP_RANK", "0"))
    mine = [float(node) if rank == accelerator.process_index else 0.0 for rank in range(accelerator.num_processes)]
    return [int(value) for value in sum_over_processes(accelerator, mine)]


def process_shares(
    batch_size: int,
    nodes: Sequence[int],
    node_batch_sizes: Mapping[int, int] | None = None,
    weights: Sequence[int] | None = None,
) -> list[int]:
    """Rows of each optimizer step that each process computes; they sum to `batch_size`.

    Args:
        batch_size: rows of an optimizer step, over all processes.
        nodes: node of each process.
        node_batch_sizes: rows per node, a node's rows being divided evenly over its processes.
        weights: relative share of each process instead.

    Raises:
        UserError: the map names other nodes than there are, or the weights another number of processes.
    """
    if weights is not None:
        if len(weights) != len(nodes):
            raise UserError(f"{len(weights)} process shares were given for {len(nodes)} processes")
        return split_shares(batch_size, list(weights))
    if node_batch_sizes is None:
        if max(nodes) >= len(nodes):
            raise UserError(f"--node_rank {max(nodes)} cannot be: {len(nodes)} processes were started, on fewer nodes")
        return split_shares(batch_size, [1] * len(nodes))
    if set(nodes) != set(node_batch_sizes):
        raise UserError(
            f"the batch-size map names the nodes {sorted(node_batch_sizes)}, but the processes run on nodes "
            f"{sorted(set(nodes))}"
        )
    names = sorted(node_batch_sizes)
    by_node = dict(zip(names, split_shares(batch_size, [node_batch_sizes[name] for name in names]), strict=True))
    inside = {name: iter(split_shares(by_node[name], [1] * list(nodes).count(name))) for name in names}
    return [next(inside[node]) for node in nodes]


def check_sharded(accelerator: Accelerator, optimizer: str, batches: Sequence[tuple[Sequence[int], int, int]]) -> None:
    """Refuse what a sharded model (FSDP) cannot do.

    It exchanges weights in every forward pass, so all processes must make equally many.

    Args:
        accelerator: the running processes.
        optimizer: name of the optimizer.
        batches: rows of each process in a step, rows of a step, and rows in all; of each phase.

    Raises:
        UserError: the model is sharded and the rows do not divide evenly, or the optimizer does not know shards.
    """
    if str(accelerator.distributed_type.value) != "FSDP":
        return
    if optimizer == "lamb":
        raise UserError("the optimizer lamb does not know sharded weights (FSDP): choose another or use DDP")
    for shares, batch_size, total_rows in batches:
        if len(set(shares)) > 1 or total_rows % batch_size:
            raise UserError(
                f"with FSDP every process needs the same rows in every step, but the shares are {list(shares)} of "
                f"{batch_size} rows and {total_rows} rows in all: choose sizes that divide, and --max_steps"
            )


def _launcher() -> int | None:
    """The process number of the launcher that started this process; None where it was started otherwise.

    A shell that exports a launcher's variables is none: under nohup it ends, and the run has to go on.
    """
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        if any(name in os.environ for name in _OF_LAUNCHERS) and any("accelerate" in w or "torch" in w for w in words):
            return os.getppid()
    return None


def _asked_of_launcher() -> int:
    """Processes that the line or the file of `accelerate launch` asks for, if that started this one; else 1."""
    launcher, words = _launcher(), list[str]()
    with suppress(psutil.Error):
        words = psutil.Process(launcher).cmdline() if launcher else []
    of_line = of_file = ""
    words = words[words.index("launch") :] if "launch" in words else []
    for word, following in pairwise([*words, ""]):
        if word.endswith(".py"):
            break  # what comes now is for the script
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config_file" and (file := Path(value or following)).is_file():
            of_file = str((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("num_processes", ""))
        elif name in ("num_processes", "num-processes"):
            of_line = value or following
    return int(asked) if (asked := of_line or of_file).isdecimal() else 1


class StopRequest:
    """Remembers that the process was asked to stop; the loop looks at it between steps.

    SIGTERM and SIGUSR1 (schedulers), SIGHUP (a terminal that is closed; under nohup it stays ignored) and SIGINT (the
    keyboard) ask to stop after the current step, and so does the end of the time limit; a second SIGINT interrupts at
    once. A launcher that dies does not always tell its processes, so that they look whether it is still there.
    """

    def __init__(self, deadline: float = float("inf")) -> None:
        """Begin to listen; `deadline` is a time of `time.monotonic()`."""
        self.reason = ""
        self._deadline = deadline
        self._launcher = _launcher()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        """Whether this process was asked to stop, is out of time, or has lost its launcher."""
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = "--max_time"
        if not self.reason and self._launcher not in (None, os.getppid()):
            self.reason = "the end of its launcher"
        return bool(self.reason)


# ---- how fast they are -------------------------------------------------------------------------------------------


def guessed_time(operations: float, accelerator: Accelerator, fewer: str) -> tuple[float, str]:
    """Seconds that a run may take, from the speed of a matrix product here, before a step was measured; in words.

    Args:
        operations: floating-point operations of this process.
        accelerator: the running processes, all of which call it; the slowest decides.
        fewer: what makes a run shorter that takes days.
    """
    device, size = accelerator.device, 512 if accelerator.device.type == "cpu" else 4096
    matrix, times = torch.ones(size, size, device=device, dtype=product_dtype(accelerator)), list[float]()
    while len(times) < 3 or sum(times) < 0.05:
        began = time.monotonic()
        (matrix @ matrix)[0, 0].item()  # waits for it
        times.append(time.monotonic() - began)
    speed = 2 * size**3 / min(times)
    seconds = torch.tensor(operations / (_SHARE_OF_PEAK * speed), device=device, dtype=torch.float32)
    slowest = float(accelerator.gather(seconds).max())
    text = f"about {duration_text(slowest)}, guessed from {speed / 1e9:,.0f} GFLOP/s of a matrix product here"
    if slowest > _LONG:
        text += f"; {fewer}, a smaller model or more machines make it shorter"
    return slowest, text


def product_dtype(accelerator: Accelerator) -> Any:
    """In which products are computed."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
