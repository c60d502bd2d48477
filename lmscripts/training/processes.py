"""Processes: starting them with a check, dividing a batch among them, agreeing on sums, stopping together.

Heavy modules are imported where they are used: scripts join before they read their options.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.util import find_spec
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lmscripts.cluster.announced import announced_nodes
from lmscripts.errors import AllAgree, UserError, shortened
from lmscripts.options.checks import duration_text
from lmscripts.training import joining
from lmscripts.training.handing import inputs as inputs_here
from lmscripts.training.handing import run_folder
from lmscripts.training.hub import open_hub
from lmscripts.training.joining import is_elastic, join, launcher, who
from lmscripts.training.sharding import asked_of_launcher, shard, whole_copies
from lmscripts.training.trackers import check_trackers

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel

    from lmscripts.objectives.module import Objective

# beside what is written here
__all__ = ["asked_of_launcher", "check_trackers", "join", "open_hub", "run_folder", "who"]
Result = TypeVar("Result")
# Options that may differ between machines.
_OF_MACHINE = {
    *("model_dir", "output_dir", "output_prefix", "output_file", "database", "logfile", "start_from", "decay_from"),
    *("node_rank", "num_workers", "cpu_threads", "device", "config"),
}
_DEVICES = ("cuda", "cpu")  # on others nothing was tried: MPS, for one, has no float64
_SHARE_OF_PEAK = 0.4  # of a matrix product's speed, what a training step reaches
_LONG = 2 * 86400  # seconds
_OWN_SIGNAL = 5  # seconds until an elastic launcher has told all its processes to stop
_SAME = "start every machine with the same options and inputs; --send_inputs hands over those of process 0"


def agree(values: Mapping[str, Any], inputs: Sequence[str]) -> dict[str, Any]:
    """Compare what all processes were asked for, before any of them reads its inputs.

    Args:
        values: the options of this process by name; with "send_inputs" the main process hands its inputs over.
        inputs: names of those that say where inputs are, which may differ.

    Returns:
        The inputs that this process finds elsewhere than it was told.

    Raises:
        UserError: an option differs.
    """
    if (met := joining.world()) is None:
        return {}
    shared = {name: value for name, value in values.items() if name not in {*_OF_MACHINE, *inputs}}
    everywhere = met.exchange("the options", shared)
    for name in shared:
        way_out = "start every machine with the same options"
        joining.check_same(f"--{name}", [theirs.get(name) for theirs in everywhere], way_out)
    if not values["send_inputs"]:
        met.hint = "; --send_inputs hands over what only the machine of process 0 has"
        return {}
    return {name: inputs_here(values[name]) for name in inputs}


def start_processes(
    *,
    mixed_precision: str | None = None,
    timeout_seconds: int = 600,
    trackers: Sequence[str] = (),
    project_dir: str | None = None,
    exact: bool = False,
) -> Accelerator:
    """Connect the processes for what they compute together, once all of them have read what they need.

    Args:
        mixed_precision: "no", "fp16" or "bf16"; None takes what the Accelerate config says.
        timeout_seconds: how long a collective operation may wait for a silent process.
        trackers: names for `Accelerator(log_with=...)`, and "none".
        project_dir: where trackers write.
        exact: multiply float32 numbers as such, also where a GPU has TF32, which is several times faster.

    Raises:
        UserError: the processes cannot reach each other, or fp16 was asked for on CPU.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if (met := joining.world()) is None:
        joining.check_number(None)
    else:
        met.hint = ""
        met.exchange("ready")  # who connects first would wait in a collective operation for who still reads
    # The library's own advice to drop an option that keeps every forward pass free of a broadcast.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if _on_cpu() and precision == "fp16":
        raise UserError("fp16 on a CPU has no loss scaling and would train on rounding errors: use bf16 or no")
    connect(timeout_seconds)
    with whole_copies():
        accelerator = Accelerator(
            cpu=_on_cpu(),
            mixed_precision=mixed_precision,
            log_with=[name for name in trackers if name != "none"] or None,
            project_dir=project_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    _check_world(accelerator)
    if accelerator.device.type == "cuda" and not exact and _is_ampere():
        torch.set_float32_matmul_precision("high")
    return accelerator


def connect(timeout_seconds: int) -> torch.device:
    """Let the processes exchange tensors from here on; the device of this one.

    On a host without CUDA the world is a gloo world: left alone, Accelerate would make every launched process the main
    process of a world of its own there, all writing to the same folder.

    Raises:
        UserError: they cannot reach each other.
    """
    import torch
    from accelerate import PartialState

    # NCCL ends a process without a word; before it does, the others have said who is silent.
    patience = timedelta(seconds=timeout_seconds + (0 if _on_cpu() else 12))
    # On GPUs also a gloo world, for numbers on the CPU: NCCL would let the host wait for all that is queued before.
    is_launched = int(os.environ.get("LOCAL_RANK", "-1")) != -1 and not _on_cpu()
    backend: dict[str, Any] = {"backend": "cpu:gloo,cuda:nccl"} if is_launched else {}
    try:
        device: torch.device = PartialState(cpu=_on_cpu(), timeout=patience, **backend).device
    except torch.distributed.DistError as error:
        raise UserError(
            f"the processes cannot exchange data ({shortened(error)}): say over which network interface, in the "
            "cluster file or by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on every machine, and open it in the firewall"
        ) from None
    return device


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available() or _asks_for_cpu()


def _asks_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _is_ampere() -> bool:
    """Whether the GPU of this process has bf16 and TF32."""
    import torch

    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.cuda.get_device_capability(number) >= (8, 0)


def only_deterministic(wanted: bool) -> None:
    """Let torch refuse operations that would not give the same bits again; cuBLAS has to be told beforehand."""
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def choose_compile(asked: bool | None, accelerator: Accelerator, **against: bool) -> tuple[bool, list[str]]:
    """Whether a model is compiled: as asked, else on a GPU where that works and nothing is against it; and a sentence.

    Args:
        asked: None decides here; what torch then cannot compile runs as it is.
        accelerator: the running processes.
        against: options that do without it, by name, and whether each is given.
    """
    import torch

    if asked or (asked is None and accelerator.device.type == "cuda"):
        torch._dynamo.config.recompile_limit = 64  # a graph for each phase, size of batch, and evaluation
    if asked is not None or accelerator.device.type != "cuda":
        return bool(asked), []
    why_not = [f"--{name}" for name, given in against.items() if given]
    if torch.cuda.get_device_capability() < (7, 0):
        why_not.append("a GPU from before Volta")
    if find_spec("triton") is None:
        why_not.append("no package triton")
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        why_not.append("no C compiler")
    if why_not:
        return False, [f"the model is not compiled: {', '.join(why_not)}; --compile does it all the same"]
    torch._dynamo.config.suppress_errors = True  # each is told by torch
    return True, ["the model is compiled, for which first steps take longer; --compile false leaves it as it is"]


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for the tensors of the next step.

    glibc gives large blocks back to the system at once, which has to fill them with zeros when they are asked for
    again: on a CPU a tenth of a step. For steps of one shape only, as others would leave gaps that nothing fits. Where
    the C library is another one nothing is done.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is the system's own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 16 << 20)  # M_TOP_PAD: it grows by so many bytes at once


def in_words(accelerator: Accelerator) -> str:
    """How many processes there are on what, and in which precision they compute."""
    import torch

    text, precision = f"{accelerator.num_processes} on {accelerator.device.type}", accelerator.mixed_precision
    other = None if _asks_for_cpu() else torch.accelerator.current_accelerator(check_available=True)
    name = other.type.upper() if other else "TPU" if find_spec("torch_xla") and not _asks_for_cpu() else "CUDA"
    if accelerator.device.type == "cpu" and name != "CUDA":
        text += f" (this machine's {name} is not used: models are trained on CUDA or on the CPU)"
    if accelerator.device.type == "cuda" and torch.get_float32_matmul_precision() == "high":
        precision += "; float32 products in TF32 (NVIDIA_TF32_OVERRIDE=0 forbids it)"
        precision += "; --precision bf16 takes less time and memory" if accelerator.mixed_precision == "no" else ""
    if accelerator.device.type == "cpu" and os.environ.get("ACCELERATE_USE_CPU") == "False":
        text += " (no GPU was found, but the Accelerate config does not say use_cpu: true)"
    if is_elastic() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        text += " (no machine can come back unless torchrun has TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 set)"
    met = joining.world()
    return "; ".join([text, f"precision {precision}", *(met.notices if met else [])])


def _check_world(accelerator: Accelerator) -> None:
    """Refuse a world in which training would silently be wrong."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(f"the launcher started {launched} processes but Accelerate sees {accelerator.num_processes}")
    if accelerator.device.type not in _DEVICES:
        raise UserError(
            f"Accelerate gives the device {accelerator.device.type}, and models are trained on CUDA or on the CPU: set "
            "ACCELERATE_USE_CPU=true, and no ACCELERATE_TORCH_DEVICE"
        )
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
        raise AllAgree(problem)
    return cast(Result, result)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compare facts that must be the same on all processes, such as the store's fingerprint and the options.

    Raises:
        UserError: on every process, naming what differs, where, and both values.
    """
    from accelerate.utils import gather_object

    everywhere = gather_object([dict(facts)])
    for name in facts:
        joining.check_same(name, [theirs.get(name) for theirs in everywhere], _SAME)


def choose_precision(
    fp16_type: int | None, preset_fp16_type: int, preset_bf16: bool, precision: str | None = None
) -> str | None:
    """Mixed precision: of --precision or the older --fp16_type, else of the Accelerate config, else of the preset.

    Where none of them asks for any it is bf16, if the GPUs of all processes have it; all of them call this.

    Args:
        fp16_type: 0 leaves it to the config; 1, 2 and 3, once levels of Apex, all mean fp16.
        preset_fp16_type: the preset's, likewise.
        preset_bf16: the preset asks for bf16.
        precision: no, fp16, bf16, or fp16_on_gpu: fp16 where there is a GPU, else full precision.

    Raises:
        UserError: no such type, or the config asks for another precision.
    """
    import torch

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
    if preset_bf16 or preset_fp16_type:
        return "bf16" if preset_bf16 else "fp16"
    here, met = not _on_cpu() and _is_ampere(), joining.world()
    return "bf16" if all(met.exchange("the GPUs", here) if met else [here]) else None


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sums of each value over all processes, in float64; no GPU is asked, nor waits for them."""
    import torch

    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    device = "cpu" if accelerator.device.type == "cuda" else accelerator.device  # see `connect`
    summed: torch.Tensor = accelerator.reduce(torch.tensor(list(values), dtype=torch.float64, device=device), "sum")
    return [float(value) for value in summed.tolist()]


def seed_dropout(seed: int, step: int, process: int) -> None:
    """Begin a step's random numbers anew, so that a run that is continued draws what it would have drawn."""
    import torch

    from lmscripts.counters import stream_key

    # What is for all devices writes down, for a GPU that nobody uses, from where it was called: a tenth of a tiny step.
    seeds = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seeds(stream_key(seed, step, process) >> 1)


def slots(accelerator: Accelerator, value: float) -> list[float]:
    """A value in a place of its own for each process, so that the sum over all has everyone's, by rank."""
    return [value if rank == accelerator.process_index else 0.0 for rank in range(accelerator.num_processes)]


def nodes_of_processes(accelerator: Accelerator, node_rank: int | None = None) -> list[int]:
    """The node of each process, in the order of the ranks.

    Args:
        accelerator: the running processes.
        node_rank: this process' node; None takes what `launch.py` announced, or what the launcher says (GROUP_RANK;
            SLURM_NODEID where `srun` started the processes itself), else 0.
    """
    announced = [number for number, node in enumerate(announced_nodes()) for _ in range(node.processes)]
    if node_rank is None and len(announced) == accelerator.num_processes:
        return announced
    said = os.environ.get("GROUP_RANK") or (os.environ.get("SLURM_NODEID") if accelerator.num_processes > 1 else None)
    node = node_rank if node_rank is not None else int(said or "0")
    return [int(value) for value in sum_over_processes(accelerator, slots(accelerator, float(node)))]


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
        node_batch_sizes: rows per node, of which the proportions are taken, a node's rows being divided evenly over its
            processes. Those of the cluster file, which is about these very machines, come before them.
        weights: relative share of each process instead.

    Raises:
        UserError: the map names other nodes than there are, or the weights another number of processes.
    """
    from lmscripts.counters import split_shares

    if weights is not None:
        if len(weights) != len(nodes):
            raise UserError(f"{len(weights)} process shares were given for {len(nodes)} processes")
        return split_shares(batch_size, list(weights))
    announced = {number: node.batch_size for number, node in enumerate(announced_nodes())}
    given = {number: rows for number, rows in announced.items() if rows is not None}
    node_batch_sizes = given or (None if is_elastic() else node_batch_sizes)  # for nodes that may not be there
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


def _check_same_weights(accelerator: Accelerator, objective: Objective) -> None:
    """Refuse weights of which processes would each keep a part of another model: copies are handed out, parts are not.

    Machines of different kinds may draw new weights that differ by a rounding.
    """
    import torch

    norms = [torch.linalg.vector_norm(p.detach(), dtype=torch.float64).item() for p in objective.parameters()]
    for own, total in zip(norms, sum_over_processes(accelerator, norms), strict=True):
        if abs(own * accelerator.num_processes - total) > 1e-4 * total:
            raise UserError(
                "the processes begin with different weights: is the pretrained model of all machines the same?"
            )


def check_sharded(accelerator: Accelerator, optimizer: str, balance: str) -> None:
    """Refuse, with a UserError, an optimizer, a precision or a balance that is not for sharded models."""
    if balance == "auto":
        raise UserError(
            "processes with sharded weights (FSDP) wait for each other in every layer, so that --balance auto cannot "
            "measure them: leave it out, or give --process_shares"
        )
    if optimizer == "lamb":
        raise UserError("the optimizer lamb does not know sharded weights (FSDP): choose another or use whole copies")
    if accelerator.mixed_precision == "fp16":
        raise UserError("fp16 is not supported with sharded weights (FSDP): use bf16 or no, or whole copies")


def prepare(
    accelerator: Accelerator, objective: Objective, average: AveragedModel | None = None, *, sharded: bool = False
) -> Any:
    """What is trained by all processes together, on its device: each has all of it (DDP), or a part (FSDP2).

    Args:
        accelerator: the running processes.
        objective: with whole weights on the CPU, the same on all processes; stays what computes without gradients.
        average: moving average of the weights, if there is one; treated likewise.
        sharded: divide weights, gradients and what the optimizer keeps among the processes. Each must then make the
            same number of forward passes.

    Returns:
        What is to be called for gradients; the objective's parameters are those that an optimizer steps.

    Raises:
        UserError: a sharded model is another one on some process.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    sharded = sharded and accelerator.num_processes > 1
    if accelerator.device.type == "cpu" and not sharded:
        keep_memory()
    modules: list[Any] = [objective, *([average.module] if average else [])]
    if sharded:
        _check_same_weights(accelerator, objective)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        dtype = product_dtype(accelerator)
        for module in modules:
            shard(module, mesh, None if dtype == torch.float32 else dtype)
    for module in modules:
        module.to(accelerator.device)
    return accelerator.prepare_model(objective, evaluation_mode=sharded)


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
        self._launcher = launcher()
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

    def words(self) -> str:
        """What stopped the run.

        Where machines come and go, the launcher of each stops its processes, a little after one another: a process that
        stopped with the others waits for its own signal, as its end would be taken for a failure before.
        """
        until = time.monotonic() + (_OWN_SIGNAL if is_elastic() or _starts_again() else 0)
        while not self() and time.monotonic() < until:
            time.sleep(0.1)
        return self.reason or "a signal to another process"


def stopped_early(reason: str = "") -> int:
    """The exit code of a run that a signal or a time limit ended after saving: 75 (EX_TEMPFAIL: try again).

    A launcher that starts again what failed would take it for a failure, and go on: there it is 0, where the end was
    asked for, and not by the launcher itself, which stops its processes to start them again.
    """
    return 0 if _starts_again() and reason in ("--max_time", "SIGUSR1") else 75


def _starts_again() -> bool:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


# ---- how fast they are -------------------------------------------------------------------------------------------


def guessed_time(operations: float, accelerator: Accelerator, fewer: str) -> tuple[float, str]:
    """Seconds that a run may take, from the speed of a matrix product here, before a step was measured; in words.

    Args:
        operations: floating-point operations of this process.
        accelerator: the running processes, all of which call it; the slowest decides.
        fewer: what makes a run shorter that takes days.
    """
    import torch

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
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
