"""Nodes meet before any of them starts a process: who has not come is named, and so is who was told of another world.

The launchers below would say how many have come, wait for processes that are too many, or leave out some.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from lmscripts.cluster.announced import WORLD_SIZE, AnnouncedNode, announced_nodes, announcement
from lmscripts.errors import UserError, shortened

_TICK = 0.1  # seconds
_SUM = "--other_gpus is what all other machines have together"


def meet(host: str, port: int, rank: int, num_nodes: int, processes: int, timeout: int) -> dict[str, str]:
    """Meet the other nodes at the address of node 0, which listens there meanwhile.

    Args:
        host: address of node 0.
        port: a port there.
        rank: of this node.
        num_nodes: how many are expected.
        processes: how many this one starts.
        timeout: seconds to wait.

    Returns:
        What to announce to the processes: the nodes as each of them was told.

    Raises:
        UserError: a node did not come, or was told another thing than this one; on every node, with the node's name.
    """
    from torch.distributed import DistError

    known = announced_nodes()
    mine = known[rank] if known else AnnouncedNode(socket.gethostname(), processes)
    facts = {"rank": rank, "nodes": num_nodes, "world": int(os.environ[WORLD_SIZE]), **asdict(mine)}
    try:
        store = _store(host, port, rank, timeout)
        store.set(f"arrival/{store.add('arrived', 1)}", json.dumps(facts))
        if rank == 0:
            verdict = _gathered(store, facts, known, timeout)
            store.set("verdict", json.dumps(verdict))
            _wait(lambda: store.add("left", 0) >= store.add("arrived", 0) - 1, 10)
        else:
            if not _wait(lambda: store.check(["verdict"]), timeout + 10):
                raise UserError(
                    f"node 0 at {host}:{port} has come, but not said in {timeout} seconds that all are there"
                )
            verdict = json.loads(store.get("verdict"))
            store.add("left", 1)
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {port} is in use here: give another one, the same on all nodes") from None
        raise UserError(f"node 0 at {host}:{port} has gone ({shortened(error, 100)}): it says why itself") from None
    if isinstance(verdict, str):
        raise UserError(verdict)
    return announcement([AnnouncedNode(**node) for node in verdict])


def _store(host: str, port: int, rank: int, timeout: int) -> Any:
    """The store at which the nodes meet.

    Torch tries for twice the time that it is given, and waits for ever where another program answers.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    made: list[Any] = []

    def make() -> None:
        try:
            waits = timedelta(seconds=timeout)
            made.append(TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=waits))
        except Exception as error:
            made.append(error)

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    maker.join(timeout + 1)
    if made and isinstance(made[0], Exception) and rank == 0:
        raise made[0]
    if made and not isinstance(made[0], Exception):
        return made[0]
    try:
        socket.create_connection((host, port), timeout=2).close()
        reason = "another program uses that port there: give another one, the same on all nodes"
    except OSError as error:
        reason = (
            f"{error.strerror or error}. Start it, and look whether this is its address and its firewall lets it in"
        )
    raise UserError(f"node 0 does not answer at {host}:{port}: {reason}")


def _wait(done: Any, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(_TICK)
    return True


def _gathered(
    store: Any, own: dict[str, Any], known: Sequence[AnnouncedNode], timeout: int
) -> str | list[dict[str, Any]]:
    """The nodes in the order of their ranks, or a sentence of what is wrong."""
    by_rank: dict[int, dict[str, Any]] = {}
    for number in range(1, own["nodes"] + 1):
        if not _wait(lambda number=number: store.check([f"arrival/{number}"]), timeout):
            break
        node = json.loads(store.get(f"arrival/{number}"))
        if problem := _problem(node, by_rank.get(node["rank"]), own):
            return problem
        by_rank[node["rank"]] = node
    if missing := [rank for rank in range(own["nodes"]) if rank not in by_rank]:
        names = ", ".join(f"node {rank}" + (f" ({known[rank].host})" if known else "") for rank in missing)
        return f"{names} did not come in {timeout} seconds: start it, and look whether it reaches node 0 at its address"
    nodes = [by_rank[rank] for rank in sorted(by_rank)]
    if sum(node["processes"] for node in nodes) != own["world"]:
        return (
            f"the nodes start {' + '.join(str(node['processes']) for node in nodes)} processes, but were told of "
            f"{own['world']} in all: {_SUM}"
        )
    return [{name: node[name] for name in ("host", "processes", "batch_size")} for node in nodes]


def _problem(node: dict[str, Any], before: dict[str, Any] | None, own: dict[str, Any]) -> str:
    """What is wrong with a node that has come; empty for nothing."""
    said = f"node {node['rank']} ({node['host']})"
    if before is not None:
        return f"{said} has the --node_rank of {before['host']}: give every machine its own"
    for name, what in (("nodes", "nodes"), ("world", "processes in all")):
        if node[name] != own[name]:
            return f"{said} was told of {node[name]} {what}, and node 0 of {own[name]}: tell them the same; {_SUM}"
    return ""
