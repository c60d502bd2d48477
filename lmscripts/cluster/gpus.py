"""The GPUs of this machine, asked of the driver: torch would take seconds to say the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import NamedTuple

from lmscripts.errors import UserError


class Gpu(NamedTuple):
    """A GPU that may be used.

    Attributes:
        name: what stands for it in CUDA_VISIBLE_DEVICES: its number in the order of the PCI bus, or an identifier.
        uuid: its identifier; empty where the driver does not tell.
        memory: MiB in use; endless where the driver does not tell.
        utilisation: per cent of the time; likewise.
    """

    name: str
    uuid: str = ""
    memory: float = inf
    utilisation: float = inf


def gpus_here() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; without it all of this machine.

    The driver is asked through NVML (the package nvidia-ml-py) or `nvidia-smi`. Where both refuse, as in a container or
    with MIG, its device files are counted, and nothing is known of how busy they are.
    """
    there = _from_nvml() or _from_nvidia_smi() or _from_files()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    found: list[Gpu] = []
    for name in (text.strip() for text in visible.split(",")):
        gpu = next((gpu for gpu in there if name and (name == gpu.name or gpu.uuid.startswith(name))), None)
        if gpu is None and not name.startswith(("GPU-", "MIG-")):
            break  # CUDA too looks no further than the first that is not there
        found.append(Gpu(name) if gpu is None else gpu._replace(name=name))
    return found


def choose_gpus(
    there: Sequence[Gpu], count: int, ids: Sequence[str] = (), *, least_busy: bool = False
) -> tuple[str, ...]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs to use, in the order of `there`.

    Args:
        there: what `gpus_here` found.
        count: how many.
        ids: which ones; else the first.
        least_busy: instead of the first, those with the least memory in use, then with the least to do.

    Raises:
        UserError: there are fewer, or not these.
    """
    names = [gpu.name for gpu in there]
    has = f"this machine has {len(there)}" + f" ({', '.join(names)})" * bool(names)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        has += f", as CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    if missing := [name for name in ids if name not in names]:
        raise UserError(f"the GPU {', '.join(missing)} was asked for, but {has}")
    if count > len(there):
        raise UserError(f"{count} GPUs were asked for, but {has}: give the number that is there, or --cpu")
    if least_busy:
        busy = sorted(there, key=lambda gpu: (gpu.memory, gpu.utilisation))
        ids = [gpu.name for gpu in busy[:count]]
    return tuple(name for name in names if name in ids) if ids else tuple(names[:count])


def _from_nvml() -> list[Gpu]:
    """What NVML says; nothing where it is not installed or refuses."""
    found = []
    with suppress(Exception):  # of a library that need not be there, for which there is another way
        import pynvml

        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            uuid, memory, utilisation = pynvml.nvmlDeviceGetUUID(handle), inf, inf
            with suppress(pynvml.NVMLError):
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20
                utilisation = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
            found.append(Gpu(str(number), uuid.decode() if isinstance(uuid, bytes) else uuid, memory, utilisation))
    return found


def _from_nvidia_smi() -> list[Gpu]:
    """What `nvidia-smi` says; nothing where it is missing or refuses."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [Gpu(row[0], row[1], *map(_number, row[2:4])) for row in rows if len(row) == 4 and row[0].isdecimal()]


def _number(text: str) -> float:
    return float(text) if text.replace(".", "", 1).isdecimal() else inf


def _from_files() -> list[Gpu]:
    names = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [Gpu(name) for name in sorted(names, key=int)]
