"""What the launcher announces of the cluster to the processes that it starts, over their environment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

NODES, WORLD_SIZE = "LMS_CLUSTER", "LMS_EXPECTED_WORLD_SIZE"


@dataclass(frozen=True)
class AnnouncedNode:
    """A machine as the launcher was told of it.

    Attributes:
        host: its address or name.
        processes: how many it starts.
        batch_size: rows of an optimizer step on it; None where nobody said.
    """

    host: str
    processes: int
    batch_size: int | None = None


def announcement(nodes: Sequence[AnnouncedNode]) -> dict[str, str]:
    """The variables that tell the processes of the nodes, in the order of their ranks."""
    return {
        NODES: json.dumps([asdict(node) for node in nodes]),
        WORLD_SIZE: str(sum(node.processes for node in nodes)),
    }


def announced_nodes() -> list[AnnouncedNode]:
    """The nodes that the launcher told of, in the order of their ranks; empty where there was no `launch.py`."""
    return [AnnouncedNode(**node) for node in json.loads(os.environ.get(NODES, "[]"))]
