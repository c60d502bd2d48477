"""Start a script on one machine or several, with any number of GPUs on each; run it once on every machine.

python scripts/launch.py [options of this script] scripts/run_pretraining.py [options of that script]

A script of the project may be given by its name alone: run_pretraining. What stands after the script is handed on as
it is. The machines are those of --cluster, or --other_gpus says how many GPUs the others have: as a number, or as a
JSON file {"host": GPUs, ...} in the order of the ranks.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import yaml

from lmscripts import commands
from lmscripts.cluster import gpus, meeting, nodes, starting, supervision
from lmscripts.errors import UserError, user_errors
from lmscripts.options import check_numbers, check_useless, option, parse_options

CARRIED = ("NCCL_", "GLOO_", "TORCH_", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")  # variables that go over ssh


@dataclass(frozen=True)
class Options:
    """Options; those of the script that is started stand after its name."""

    node_rank: int | None = option(None, help="place of this machine among the nodes, from 0 on", group="machines")
    other_gpus: str | None = option(
        None, help="GPUs of all other machines together, or a JSON file {host: GPUs} of the machines", group="machines"
    )
    here_gpus: int | None = option(
        None, help="GPUs to use on this machine, the least busy ones; default: all", group="machines"
    )
    nnodes: int | None = option(
        None, help="number of machines; needed from three on where --other_gpus is a number", group="machines"
    )
    master_addr: str | None = option(None, help="address or name of node 0", group="machines")
    master_port: int | None = option(
        None,
        help=f"port of node 0, the same on all machines; default: {nodes.DEFAULT_PORT}",
        group="machines",
        most=65535,
    )
    cluster: str | None = option(
        None, help="YAML file of all machines, as accelerate_configs/cluster.example.yaml", group="machines"
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, help="in what the processes compute; default: no", group="how it runs"
    )
    timeout: int | None = option(
        None, help=f"seconds to wait for the other machines; default: {nodes.DEFAULT_TIMEOUT}", group="how it runs"
    )
    accelerate_config: str | None = option(
        None, help="Accelerate file of which all but the shape is kept, as FSDP", group="how it runs"
    )
    cpu: bool = option(False, help="numbers of GPUs are numbers of processes on the CPU", group="how it runs")
    module: bool = option(False, short="m", help="the script is a module, as after `python -m`", group="how it runs")
    no_python: bool = option(False, help="the script is a program of its own", group="how it runs")
    quiet: bool = option(False, short="q", help="say nothing of the launch", group="how it runs")
    dry_run: bool = option(False, help="say what would be started, and start nothing", group="how it runs")
    local_cpu: bool = option(
        False, help="start every node on this machine, on the CPU and the loopback address", group="all nodes from here"
    )
    over_ssh: bool = option(False, help="start every node from here, over ssh", group="all nodes from here")
    ssh: str = option("ssh -o BatchMode=yes", help="the command in front of a host", group="all nodes from here")
    node_dir: str | None = option(
        None, help="folder in which a node works, {} being its place; default: this one", group="all nodes from here"
    )
    remote_python: str | None = option(
        None, help="Python of the other machines; default: the same path as here", group="all nodes from here"
    )
    signals_from_stdin: bool = option(
        False, help="signals come as lines on standard input, as --over_ssh sends them", group="all nodes from here"
    )


def main() -> None:
    """Parse, find this machine, start its processes, end as they do."""
    own, program = split(sys.argv[1:])
    options = parse_options(Options, description=__doc__ or "", argv=own)
    with user_errors():
        if options.signals_from_stdin:
            supervision.heed_stdin()
        try:
            code = run(options, program)
        except UserError as error:
            if options.signals_from_stdin:
                supervision.tell_end(2, str(error))
            raise
        sys.exit(code)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The options of this script, and the script that is started with all that follows it."""
    kinds = {field.name: str(field.type) for field in fields(Options)} | {"help": "bool", "print_config": "bool"}
    place, values = 0, 0  # how many words may still be values of the option before
    while place < len(words) and (words[place].startswith("-") or values):
        name, equals, _ = words[place].removeprefix("--").replace("-", "_").partition("=")
        if words[place].startswith("-"):
            is_flag = equals or not words[place].startswith("--") or kinds.get(name.removeprefix("no_"), "") == "bool"
            values = 0 if is_flag or kinds.get(name) == "bool" else 1
        else:
            values -= 1
        place += 1
    return words[:place], words[place:]


def run(options: Options, program: list[str]) -> int:
    """Start what is asked for; the exit code."""
    elsewhere = options.module or options.no_python or options.over_ssh
    if program and not (elsewhere or Path(program[0]).is_file()):
        program = [str(commands.scripts().get(program[0].replace("-", "_"), program[0])), *program[1:]]
    check(options, program)
    on_cpu = options.cpu or options.local_cpu
    there = [] if on_cpu or options.over_ssh else gpus.gpus_here()
    said = (options.cluster, options.other_gpus, options.here_gpus)
    if not there and not options.over_ssh and said == (None, None, None):
        on_cpu = True
        say(options, "no GPU was found: one process on the CPU")
    cluster, rank = find_cluster(options, 1 if on_cpu else len(there))
    unit = "CPU process" if on_cpu else "GPU"
    if options.local_cpu or options.over_ssh:
        say(options, starting.rank_table(cluster, None, (), unit))
        return run_all(options, cluster, program)
    node, visible = cluster.nodes[rank], ()
    if not on_cpu:
        chosen = gpus.choose_gpus(there, node.gpus, node.ids, least_busy=node.least_busy)
        visible = chosen if chosen != tuple(gpu.name for gpu in there) else ()
    say(options, starting.rank_table(cluster, rank, visible, unit))
    return run_one(options, cluster, rank, on_cpu, visible, program)


def check(options: Options, program: list[str]) -> None:
    """Refuse what cannot be meant."""
    if not program:
        raise UserError("no script to start: write its name after the options of launch.py, and its own after it")
    if options.module and options.no_python:
        raise UserError("--module and --no_python differ: the second starts a program that is no Python")
    if not (options.module or options.no_python or options.over_ssh or Path(program[0]).is_file()):
        raise UserError(f"{program[0]} is no file: give the script to start, or --module or --no_python")
    check_numbers(vars(options), positive=["here_gpus", "nnodes", "timeout", "master_port"], not_negative=["node_rank"])
    if options.cluster is not None:
        of_line = ("other_gpus", "here_gpus", "nnodes", "master_addr", "master_port")
        check_useless(vars(options), "with --cluster, where it stands", *of_line)
    if options.local_cpu and options.over_ssh:
        raise UserError("--local_cpu and --over_ssh differ: the first starts all nodes on this machine")
    is_number = (options.other_gpus or "0").isdecimal()
    if not (options.local_cpu or options.over_ssh):
        check_useless(vars(options), "without --local_cpu or --over_ssh", "node_dir")
    else:
        of_this = ["node_rank"] + ["master_addr"] * options.local_cpu + ["here_gpus", "nnodes"] * (not is_number)
        check_useless(vars(options), "where all nodes are started from here", *of_this)
    if options.over_ssh and options.cluster is None and is_number:
        raise UserError("--over_ssh has to know the machines: give --cluster, or --other_gpus with a file of them")


def say(options: Options, text: str) -> None:
    """Words about the launch."""
    if not options.quiet:
        print(text, flush=True)


def find_cluster(options: Options, here: int) -> tuple[nodes.Cluster, int]:
    """The machines, and the place of this one where not all are started from here.

    Args:
        options: the line.
        here: how many GPUs this machine has.
    """
    if options.cluster is None:
        cluster, rank = from_line(options, here)
    else:
        cluster = nodes.read_cluster(options.cluster)
        if (
            options.local_cpu or options.over_ssh or options.signals_from_stdin
        ):  # who starts all knows which one this is
            rank = options.node_rank or 0
        else:
            rank = nodes.find_own(cluster.nodes, options.node_rank)
    given = {name: getattr(options, name) for name in ("mixed_precision", "timeout") if getattr(options, name)}
    if options.local_cpu:
        given |= {"main_host": "127.0.0.1", "main_port": options.master_port or nodes.free_port()}
        given |= {"network_interface": None}
    return replace(cluster, **given), rank


def from_line(options: Options, here: int) -> tuple[nodes.Cluster, int]:
    """The machines of --other_gpus and --here_gpus."""
    own = nodes.Node(socket.gethostname(), options.here_gpus or here, least_busy=True)
    other, rank = options.other_gpus or "0", options.node_rank or 0
    if other.isdecimal():
        found = nodes.by_sum(own, int(other), rank, options.nnodes)
        world_size = own.gpus + int(other)
    else:
        found = nodes.read_gpu_file(Path(other))
        if not (options.local_cpu or options.over_ssh):
            found, rank = nodes.with_own(found, own, options.here_gpus, options.node_rank, options.nnodes)
        world_size = sum(node.gpus for node in found)
    if own in found and own.gpus == 0:
        raise UserError("no GPU was found on this machine: give --cpu to start processes without")
    main_host = options.master_addr or ("127.0.0.1" if rank == 0 and not options.over_ssh else found[0].host)
    if rank and options.master_addr is None and (main_host == "node-0" or nodes.is_loopback(main_host)):
        raise UserError("--master_addr is missing: give the address by which this machine reaches node 0")
    port = options.master_port or nodes.DEFAULT_PORT
    return nodes.Cluster(tuple(found), world_size, main_host, port), rank


def run_one(
    options: Options, cluster: nodes.Cluster, rank: int, on_cpu: bool, visible: tuple[str, ...], program: list[str]
) -> int:
    """Start the processes of this node."""
    base = starting.read_base(options.accelerate_config)
    settings = starting.accelerate_settings(cluster, rank, on_cpu=on_cpu, visible=visible, base=base)
    environment = starting.environment(cluster, on_cpu=on_cpu)
    with tempfile.TemporaryDirectory(prefix="accelerate-") as folder:
        file = Path(folder) / f"node{rank}.yaml"
        words = starting.command(file, cluster, program, module=options.module, no_python=options.no_python)
        as_yaml = yaml.safe_dump(settings, sort_keys=False)
        if options.dry_run:
            told = (f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value)
            print(f"{as_yaml}\nwould start: {shlex.join(told)} accelerate launch {shlex.join(words)}")
            return 0
        file.write_text(as_yaml, encoding="utf-8")
        if len(cluster.nodes) > 1:
            environment |= meeting.meet(cluster, rank)
        how = {"alone": settings["distributed_type"] == "NO", "from_stdin": options.signals_from_stdin}
        return supervision.run_node(starting.agent(words), environment, **how)


def run_all(options: Options, cluster: nodes.Cluster, program: list[str]) -> int:
    """Start every node from here, as somebody would on each of them."""
    local = [node.host for node in cluster.nodes if nodes.is_loopback(node.host)]
    if options.over_ssh and len(cluster.nodes) > 1 and local:
        raise UserError(f"{local[0]} means another machine on each node: give the address by which the others reach it")
    if not cluster.is_known:
        raise UserError("--nnodes with a sum does not say how many processes each node has: give a file of the nodes")
    if options.local_cpu and Path(program[0]).is_file():  # which each node finds from its own folder
        program = [str(Path(program[0]).resolve()), *program[1:]]
    own = ["--signals_from_stdin", "--quiet"] + ["--cpu"] * (options.cpu or options.local_cpu)
    own += [f"--{name}" for name in ("module", "no_python", "dry_run") if getattr(options, name)]
    own += ["--accelerate_config", options.accelerate_config] if options.accelerate_config else []
    commands = []
    for rank, node in enumerate(cluster.nodes):
        folder = os.path.abspath((options.node_dir or ".").replace("{}", str(rank)))
        words = ["--cluster", cluster.as_text(), "--node_rank", str(rank), *own, *program]
        if options.over_ssh and not nodes.is_this_machine(node.host):
            carried = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(CARRIED)]
            there = shlex.join(["env", *carried, options.remote_python or sys.executable, sys.argv[0], *words])
            line = [*shlex.split(options.ssh), node.host, f"cd {shlex.quote(folder)} && exec {there}"]
        else:
            line = [sys.executable, str(Path(__file__).resolve()), *words]
        commands.append(supervision.NodeCommand(node.host if rank else "", line, folder))
    return supervision.run_nodes(commands)


if __name__ == "__main__":
    main()
