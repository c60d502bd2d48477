"""Nodes meet before any of them starts a process: who has not come is named, and so is who was told of another world.

The launchers below would say how many have come, wait for processes that are too many, or leave out some. Node 0
listens at the port that the processes will use, and is gone from there before it says that all are there.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lmscripts.cluster.announced import AnnouncedNode, announcement
from lmscripts.cluster.nodes import Cluster
from lmscripts.errors import UserError

_STRANGER = 5  # seconds for a connection to say who it is
_MOST = 1 << 16  # bytes of what a node says
_SUM = "--other_gpus is what all other machines have together"


def meet(cluster: Cluster, rank: int) -> Mapping[str, str]:
    """Meet the other nodes at the address of node 0.

    Args:
        cluster: what this node was told.
        rank: its place.

    Returns:
        What to announce to the processes: the nodes, each as it knows itself.

    Raises:
        UserError: a node did not come, or was told another thing than node 0; on every node, with the node's name.
    """
    own = cluster.nodes[rank]
    mine = asdict(AnnouncedNode(own.host, own.gpus, own.batch_size))
    facts = mine | {"rank": rank, "nodes": len(cluster.nodes), "world": cluster.world_size}
    verdict = _gather(cluster, facts) if rank == 0 else _join(cluster, facts)
    if isinstance(verdict, str):
        raise UserError(verdict)
    return announcement([AnnouncedNode(**node) for node in verdict])


def _join(cluster: Cluster, facts: dict[str, Any]) -> Any:
    """What node 0 says once it has heard of this node."""
    place, until = (cluster.main_host, cluster.main_port), time.monotonic() + cluster.timeout
    reason = "it has gone"
    while time.monotonic() < until:
        try:
            with socket.create_connection(place, timeout=cluster.timeout) as node0:
                node0.sendall(json.dumps(facts).encode() + b"\n")
                node0.settimeout(cluster.timeout + 5)
                with node0.makefile("rb") as answers:
                    if answer := answers.readline(_MOST * len(cluster.nodes)):
                        return json.loads(answer)
        except socket.gaierror as error:
            raise UserError(f"node 0 at {place[0]} is not known here: {error.strerror}") from None
        except ValueError:
            raise UserError(f"another program answers at {place[0]}:{place[1]}: give all nodes another port") from None
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.3)
    raise UserError(
        f"node 0 did not answer at {place[0]}:{place[1]} in {cluster.timeout} seconds ({reason}): start it, and look "
        "whether that is its address, the same on all nodes, and open in its firewall"
    )


def _gather(cluster: Cluster, own: dict[str, Any]) -> str | list[dict[str, Any]]:
    """The nodes in the order of their ranks, or a sentence of what is wrong; the others are told the same."""
    by_rank, problem, until = {0: own}, "", time.monotonic() + cluster.timeout
    connections: list[socket.socket] = []
    with _listening(cluster.main_port) as listener:
        while len(by_rank) < own["nodes"] and not problem and (left := until - time.monotonic()) > 0:
            listener.settimeout(left)
            with suppress(OSError, ValueError, TypeError, KeyError):  # nobody has come, or a stranger
                connections.append(listener.accept()[0])
                connections[-1].settimeout(_STRANGER)
                with connections[-1].makefile("rb") as said:
                    node = json.loads(said.readline(_MOST))
                problem = _problem(node, by_rank.get(node["rank"]), own)
                by_rank[node["rank"]] = node
    verdict = problem or _verdict(by_rank, own, cluster)
    for connection in connections:
        with suppress(OSError), connection:
            connection.sendall(json.dumps(verdict).encode() + b"\n")
            connection.recv(1)  # the other side closes first, so that the port is free at once
    return verdict


def _listening(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(f"port {port} is in use here: give another one, the same on all nodes") from None


def _problem(node: dict[str, Any], before: dict[str, Any] | None, own: dict[str, Any]) -> str:
    """What is wrong with a node that has come; empty for nothing."""
    said = f"node {node['rank']} ({node['host']})"
    if before is not None:
        return f"{said} has the --node_rank of {before['host']}: give every machine its own"
    for name, what in (("nodes", "nodes"), ("world", "processes in all")):
        if node[name] != own[name]:
            return f"{said} was told of {node[name]} {what}, and node 0 of {own[name]}: tell them the same; {_SUM}"
    return ""


def _verdict(by_rank: dict[int, dict[str, Any]], own: dict[str, Any], cluster: Cluster) -> str | list[dict[str, Any]]:
    if missing := [rank for rank in range(own["nodes"]) if rank not in by_rank]:
        hosts = {rank: cluster.nodes[rank].host for rank in missing}
        names = ", ".join(f"node {n}" + (f" ({host})" if host != f"node-{n}" else "") for n, host in hosts.items())
        return f"{names} did not come in {cluster.timeout} seconds: start it, and look whether it reaches node 0"
    nodes = [by_rank[rank] for rank in sorted(by_rank)]
    if sum(node["processes"] for node in nodes) != own["world"]:
        each = " + ".join(str(node["processes"]) for node in nodes)
        return f"the nodes start {each} processes, but were told of {own['world']} in all: {_SUM}"
    return [{name: node[name] for name in ("host", "processes", "batch_size")} for node in nodes]
