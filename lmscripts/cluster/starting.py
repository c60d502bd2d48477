"""What one node starts: its file for Accelerate, its environment, its command, and the table of ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lmscripts.cluster.announced import NODES, WORLD_SIZE, AnnouncedNode, announcement
from lmscripts.cluster.nodes import Cluster, is_loopback
from lmscripts.errors import UserError, shortened

# What is left of another world would be taken for this one. With WORKER_IDENTICAL torch takes every machine for alike
# and unequal ones wait for ever.
_OF_A_WORLD = {"RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", NODES, WORLD_SIZE}
_OF_A_WORLD |= {"WORLD_SIZE", "TORCH_ELASTIC_WORKER_IDENTICAL", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"}


def accelerate_settings(
    cluster: Cluster, rank: int, *, on_cpu: bool, visible: Sequence[str], base: Mapping[str, Any]
) -> dict[str, Any]:
    """The node's own Accelerate file.

    Accelerate starts num_processes // num_machines processes, so that a machine says its own number times the number
    of machines; the ranks follow from what the machines tell each other when they meet.

    Args:
        cluster: all machines.
        rank: place of this one.
        on_cpu: leave GPUs alone.
        visible: names of the GPUs to use; empty for all.
        base: keys of another file, of which the shape is not taken.
    """
    here, machines = cluster.nodes[rank].gpus, len(cluster.nodes)
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if cluster.world_size == 1 else "MULTI_GPU",
        "num_machines": machines,
        "machine_rank": rank,
        "num_processes": here * machines,
        "gpu_ids": ",".join(visible) or "all",
        "main_process_ip": cluster.main_host if machines > 1 else None,
        "main_process_port": cluster.main_port if machines > 1 else 0,
        "rdzv_backend": "static",
        "same_network": True,
        "mixed_precision": cluster.mixed_precision,
        "use_cpu": on_cpu,
    }
    kept = {key: value for key, value in base.items() if key not in settings or key == "mixed_precision"}
    if base.get("distributed_type") == "FSDP":
        kept["distributed_type"] = "FSDP"
    return settings | kept


def read_base(file: str | None) -> dict[str, Any]:
    """The keys of an Accelerate file.

    Raises:
        UserError: it is none.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {shortened(error)}") from None
    if not isinstance(content, dict) or (file and "distributed_type" not in content):
        raise UserError(f"{file} is no file for Accelerate: it has no key distributed_type")
    if content.get("distributed_type") in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise UserError(f"{file} is for {content['distributed_type']}, which is not started by launch.py: use FSDP")
    return content


def environment(cluster: Cluster, *, on_cpu: bool) -> dict[str, str]:
    """The environment of a node's processes."""
    mine = {k: v for k, v in os.environ.items() if k not in _OF_A_WORLD and not k.startswith(("PET_", "TORCHELASTIC_"))}
    nodes = [AnnouncedNode(node.host, node.gpus, node.batch_size) for node in cluster.nodes]
    are_named = not any(node.host == f"node-{place}" for place, node in enumerate(nodes))  # by each machine alike
    mine |= announcement(nodes) if cluster.is_known and are_named else {WORLD_SIZE: str(cluster.world_size)}
    if on_cpu:
        mine |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    else:
        mine.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # in which the driver numbers them
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if cluster.network_interface:
            mine[name] = cluster.network_interface
        elif on_cpu and is_loopback(cluster.main_host) and Path("/sys/class/net/lo").exists():
            mine.setdefault(name, "lo")
    return mine


def command(
    file: Path, cluster: Cluster, program: Sequence[str], *, module: bool = False, no_python: bool = False
) -> list[str]:
    """What follows `accelerate launch` on the line of a node, for a script with its arguments."""
    how = ["--module"] * module + ["--no_python"] * no_python
    return ["--config_file", str(file), "--rdzv_conf", f"timeout={cluster.timeout}", *how, *program]


def agent(words: Sequence[str]) -> list[str]:
    """The command that runs these words of `accelerate launch`."""
    return [sys.executable, "-m", "lmscripts.cluster.agent", *words]


def rank_table(cluster: Cluster, rank: int | None, visible: Sequence[str], unit: str) -> str:
    """The machines, what each of them starts, and the ranks of its processes, in words."""
    rows, first, whole = [], 0, sum(node.batch_size or 0 for node in cluster.nodes)
    for place, node in enumerate(cluster.nodes):
        count = in_words(node.gpus, unit) if node.gpus else "some"
        ranks = f"ranks {first} to {first + node.gpus - 1}" if node.gpus > 1 else f"rank {first}"
        known = all(before.gpus for before in cluster.nodes[: place + 1])
        rows.append([f"node {place}", node.host, count, ranks if known else "ranks when they meet"])
        rows[-1] += [f"{node.batch_size:,} of {whole:,} rows"] if node.batch_size else []
        rows[-1] += [f"<- this machine{', ' + unit + ' ' + ', '.join(visible) if visible else ''}"] * (place == rank)
        first += node.gpus
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), *row[4:]]).rstrip() for row in rows]
    at = f", meeting at {cluster.main_host}:{cluster.main_port}" if len(cluster.nodes) > 1 else ""
    processes = in_words(cluster.world_size, "process")
    return "\n".join([*lines, f"{processes}{at}, mixed precision {cluster.mixed_precision}"])


def in_words(count: int, what: str) -> str:
    """A number of things."""
    return f"{count} {what}" + ("es" if what.endswith("s") else "s") * (count > 1)
