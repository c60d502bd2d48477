"""The machines of a cluster in the order of their ranks: what a file or the line says, and which is this one."""

from __future__ import annotations

import ipaddress
import json
import random
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmscripts.errors import UserError, shortened

_PRECISIONS = ("no", "fp16", "bf16")
_LEAST_BUSY = "least_busy:"
DEFAULT_PORT = 29500
DEFAULT_TIMEOUT = 600  # seconds


@dataclass(frozen=True)
class Node:
    """A machine and what of it is used.

    Attributes:
        host: its address or name.
        gpus: how many GPUs, with a process each; 0 where that is not known.
        ids: which GPUs, by their numbers; empty for the first.
        least_busy: the least busy ones instead of the first.
        batch_size: rows of an optimizer step that it computes; None where nobody said.
    """

    host: str
    gpus: int
    ids: tuple[str, ...] = ()
    least_busy: bool = False
    batch_size: int | None = None


@dataclass(frozen=True)
class Cluster:
    """Machines that make one world, the same on each of them.

    Attributes:
        nodes: the machines; their processes are numbered in this order.
        world_size: processes of all machines.
        main_host: by which address the others reach the first machine.
        main_port: where it listens.
        mixed_precision: "no", "fp16" or "bf16".
        network_interface: over which the processes talk; None leaves the choice to NCCL and gloo.
        timeout: seconds to wait for the other machines.
    """

    nodes: tuple[Node, ...]
    world_size: int
    main_host: str
    main_port: int = DEFAULT_PORT
    mixed_precision: str = "no"
    network_interface: str | None = None
    timeout: int = DEFAULT_TIMEOUT

    @property
    def is_known(self) -> bool:
        """Whether the number of processes of each machine is known."""
        return all(node.gpus for node in self.nodes)

    def as_text(self) -> str:
        """What `read_cluster` makes the same cluster of."""
        nodes = []
        for node in self.nodes:
            gpus = list(node.ids) or (f"{_LEAST_BUSY}{node.gpus}" if node.least_busy else node.gpus)
            nodes.append({"host": node.host, "gpus": gpus, "batch_size": node.batch_size})
        rest = {name: getattr(self, name) for name in ("mixed_precision", "network_interface", "timeout")}
        return json.dumps({"nodes": nodes, "main": {"host": self.main_host, "port": self.main_port}, **rest})


# ---- the file of --cluster -------------------------------------------------------------------------------------------


def read_cluster(given: str) -> Cluster:
    """A cluster as a YAML file describes it; see `accelerate_configs/cluster.example.yaml`.

    Args:
        given: the file, or what it would hold, where that begins with a brace.

    Raises:
        UserError: it names all that is wrong in the file, with what it should be.
    """
    name = "--cluster" if given.startswith("{") else given
    try:
        content = yaml.safe_load(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} cannot be read: {shortened(error)}") from None
    wrong: list[str] = []
    top = _checked(content, "the file", _TOP, ("nodes",), wrong)
    main = _checked(top.get("main", {}), "main", _MAIN, (), wrong)
    listed = enumerate(top.get("nodes", []))
    rows = [_checked(each, f"nodes[{place}]", _NODE, ("host", "gpus"), wrong) for place, each in listed]
    if top.get("nodes") == []:
        wrong.append("nodes is empty: name at least one machine")
    if wrong:
        raise UserError(f"{name}: {'; '.join(wrong)}")
    nodes = tuple(_node(**row) for row in rows)
    known = {name: top[name] for name in ("network_interface", "timeout") if top.get(name) is not None}
    precision = top.get("mixed_precision", "no") or "no"  # a bare no is false in YAML
    cluster = Cluster(
        nodes,
        sum(node.gpus for node in nodes),
        main.get("host", nodes[0].host),
        main.get("port", DEFAULT_PORT),
        mixed_precision=precision,
        **known,
    )
    if cluster.main_host in [node.host for node in nodes[1:]]:
        raise UserError(
            f"{name}: main.host is {cluster.main_host}, but nodes begins with {nodes[0].host}: the main machine is the "
            "first one, put it there"
        )
    return cluster


def _node(host: str, gpus: Any, batch_size: int | None = None) -> Node:
    if isinstance(gpus, list):
        return Node(host, len(gpus), tuple(map(str, gpus)), batch_size=batch_size)
    if isinstance(gpus, str):
        return Node(host, int(gpus.removeprefix(_LEAST_BUSY)), least_busy=True, batch_size=batch_size)
    return Node(host, gpus, batch_size=batch_size)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_gpus(value: Any) -> bool:
    if isinstance(value, list):
        names = [str(each) for each in value]
        return len(names) == len(set(names)) > 0 and all(n.isdecimal() or n.startswith(("GPU-", "MIG-")) for n in names)
    if isinstance(value, str) and value.startswith(_LEAST_BUSY):
        number = value.removeprefix(_LEAST_BUSY)
        return number.isdecimal() and int(number) > 0
    return _is_count(value)


def _is_host(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.split() == [value] and not value.startswith("-")


_COUNT = (_is_count, "a whole number greater than 0")
_HOST = (_is_host, "an address or a host name")
_GPUS = (_is_gpus, "a number, a list of their numbers, or least_busy:2")
_NODE = {"host": _HOST, "gpus": _GPUS, "batch_size": _COUNT}
_MAIN = {"host": _HOST, "port": (lambda value: _is_count(value) and value < 1 << 16, "a port from 1 to 65535")}
_TOP = {
    "nodes": (lambda value: isinstance(value, list), "a list of machines"),
    "main": (lambda value: isinstance(value, dict), "host and port"),
    "mixed_precision": (lambda value: value is False or value in _PRECISIONS, " or ".join(_PRECISIONS)),
    "network_interface": (_is_host, "the name of a network interface, as eth0"),
    "timeout": _COUNT,
}


def _checked(
    given: Any, place: str, known: Mapping[str, Any], required: Collection[str], wrong: list[str]
) -> dict[str, Any]:
    """The keys of a mapping that hold what they should; what does not joins the list of what is wrong."""
    if not isinstance(given, dict):
        wrong.append(f"{place} must hold {', '.join(known)}, not {given!r}")
        return {}
    beyond = [str(key) for key in given if key not in known]
    if beyond:
        wrong.append(f"{place} has the unknown key {', '.join(beyond)} (known are {', '.join(known)})")
    wrong += [f"{place} has no {key}" for key in required if given.get(key) is None]
    found = {}
    for key, value in given.items():
        if key in known and value is not None:
            fits, words = known[key]
            if fits(value):
                found[key] = value
            else:
                wrong.append(f"{place}.{key} must be {words}, not {value!r}")
    return found


# ---- the numbers of --other_gpus -------------------------------------------------------------------------------------


def read_gpu_file(file: Path) -> list[Node]:
    """The machines of a JSON file {host: GPUs}, in its order.

    Raises:
        UserError: it is no such file.
    """
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {shortened(error)}") from None
    form = f'{file} must hold {{"host": number of GPUs, ...}}'
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs) or not pairs:
        raise UserError(form)
    wrong = [f"{host!r} has {number!r}" for host, number in pairs if not (_is_host(host) and _is_count(number))]
    hosts = [host for host, _ in pairs]
    wrong += [f"{host} stands there twice" for host in dict.fromkeys(hosts) if hosts.count(host) > 1]
    if wrong:
        raise UserError(f"{form}, each number greater than 0, but {'; '.join(wrong)}")
    return [Node(host, number, least_busy=True) for host, number in pairs]


def with_own(
    listed: Sequence[Node], own: Node, here_gpus: int | None, node_rank: int | None, num_nodes: int | None
) -> tuple[list[Node], int]:
    """The machines with this one among them, and its place; the file may have left it out.

    Args:
        listed: the machines of the file.
        own: this machine, for where it is left out.
        here_gpus: its number of GPUs, if the line says it.
        node_rank: its place, if the line says it.
        num_nodes: how many machines there are, if the line says it.

    Raises:
        UserError: it is not clear which of them this machine is, or its number of GPUs is another one.
    """
    count = len(listed)
    if not any(is_loopback(node.host) or is_this_machine(node.host) for node in listed):
        expected = num_nodes or (2 if count == 1 else count + (node_rank == count))
        place = node_rank or 0
        if expected == count + 1 and place <= count:
            return [*listed[:place], own, *listed[place:]], place
    if num_nodes not in (None, count):
        raise UserError(f"--nnodes is {num_nodes}, but the file names {count}: name all in it, or all but this machine")
    place = find_own(listed, node_rank)
    if here_gpus not in (None, listed[place].gpus):
        raise UserError(
            f"--here_gpus is {here_gpus}, but the file says {listed[place].gpus} for {listed[place].host}: give one"
        )
    return list(listed), place


def by_sum(own: Node, other_gpus: int, node_rank: int, num_nodes: int | None) -> list[Node]:
    """The machines when only the sum of the others' GPUs is known.

    Of two machines both numbers are known. Of more each knows its own and the sum, which is enough: the rest is said
    when they meet.

    Raises:
        UserError: the number of machines is not known, or fits neither the rank nor the GPUs.
    """
    count = num_nodes or (2 if other_gpus else 1)
    if node_rank >= count:
        raise UserError(
            f"--node_rank {node_rank} cannot be of {count} machine{'s' * (count > 1)}: --other_gpus {other_gpus} is a "
            "sum and does not say of how many; give every machine the same --nnodes, or a file {host: GPUs}"
        )
    if other_gpus < count - 1:
        raise UserError(f"--nnodes {count} with --other_gpus {other_gpus}: every other machine has a GPU at least")
    others = [Node(f"node-{rank}", other_gpus if count == 2 else 0) for rank in range(count) if rank != node_rank]
    return [*others[:node_rank], own, *others[node_rank:]]


# ---- which one is this -----------------------------------------------------------------------------------------------


def find_own(nodes: Sequence[Node], node_rank: int | None) -> int:
    """The place of this machine.

    Args:
        nodes: the machines.
        node_rank: what the line says; it is checked against what can be known.

    Raises:
        UserError: it is none of them, several of them, or another one than the line says.
    """
    local = [place for place, node in enumerate(nodes) if is_loopback(node.host)]
    own = [place for place, node in enumerate(nodes) if is_this_machine(node.host)]
    if len(nodes) == 1 and local:
        own = local
    if node_rank is not None:
        _check_rank(nodes, node_rank, own, local)
        return node_rank
    if len(nodes) > 1 and local:
        raise UserError(
            f"{nodes[local[0]].host} means another machine on each of {len(nodes)} nodes: give the address by which "
            "the others reach it, or --node_rank on every node, counted from 0 in the order of the file"
        )
    if len(own) > 1:
        raise UserError(f"{' and '.join(nodes[place].host for place in own)} are both this machine: give --node_rank")
    if not own:
        raise UserError(
            f"this machine ({', '.join(sorted(_names() | _addresses()))}) is none of "
            f"{', '.join(node.host for node in nodes)}: correct that, or give --node_rank"
        )
    return own[0]


def _check_rank(nodes: Sequence[Node], node_rank: int, own: Sequence[int], local: Sequence[int]) -> None:
    if node_rank >= len(nodes):
        raise UserError(f"--node_rank is {node_rank}, but there are {len(nodes)} nodes, counted from 0")
    said = f"--node_rank {node_rank} is {nodes[node_rank].host}"
    if own and node_rank not in own:
        raise UserError(f"{said}, but this machine is {nodes[own[0]].host}, which is node {own[0]}")
    if local and not own and node_rank not in local:
        raise UserError(
            f"{said}, which is not known to be this machine, and {nodes[local[0]].host} could be it as well: give the "
            "addresses by which the nodes reach each other"
        )


def is_loopback(host: str) -> bool:
    """Whether a name or an address means, on every machine, that machine."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.partition(".")[0].casefold() in ("localhost", "ip6-localhost", "ip6-loopback")


def is_this_machine(host: str) -> bool:
    """Whether a host that is no loopback name is this machine: by its name, or by an address of an interface."""
    if is_loopback(host):
        return False
    if host.casefold() in _names() or host in _addresses():
        return True
    with suppress(OSError, UnicodeError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
        # A name that is no loopback name and leads to a loopback address is this machine's own in /etc/hosts.
        return any(address in _addresses() or is_loopback(address) for address in found)
    return False


def _names() -> set[str]:
    name = socket.gethostname().casefold()
    return {name, name.partition(".")[0]}


def _addresses() -> set[str]:
    import psutil

    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    found = {entry.address.partition("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)}
    return {address for address in found if not is_loopback(address)}


def free_port() -> int:
    """A port below those that the system gives to others, so that none takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
