"""What goes wrong between machines: how long until every process has ended, and which sentence stays on the screen.

Two nodes with 2 + 1 processes on the loopback address. With `-s` a table of what was seen is printed.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import PATIENCE, TINY_PRESET, free_port
from runs import SCRIPT, newest_step, same_bits, weights
from test_launch_pattern import node_file

pytestmark = pytest.mark.launch

TIMEOUT = 12  # seconds; of --timeout
SLACK = 15  # seconds beyond it until the last process has ended
FILES = ("rank0_4gpu_fp16.yaml", "rank1_2gpu_fp16.yaml")
MARK = "LMSCRIPTS_TEST_OF_FAULTS"  # in the environment of every process of a world, so that orphans are found
TABLE: list[tuple[str, float, list[str]]] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what was seen, under -s."""
    yield
    for fault, seconds, sentences in TABLE:
        print(f"\n{fault:44} {seconds:6.1f} s")
        for sentence in sentences:
            print(f"    {sentence}")


class World:
    """Nodes that train one run; each writes what it prints to a file of its own."""

    def __init__(self, folder, arguments):
        self.folder, self.arguments, self.run_dir = folder, [*map(str, arguments)], folder / "run"
        self.nodes, self.port = [], free_port()

    def start(self, node, *more, processes=None, port=None, env=None, **settings):
        """Start a node: 0 with two processes, 1 with one."""
        file = node_file(self.folder, FILES[node], processes or (4, 2)[node], port or self.port)
        if address := settings.pop("address", None):
            file.write_text(file.read_text(encoding="utf-8").replace("127.0.0.1", address), encoding="utf-8")
        command = [sys.executable, "-m", "accelerate.commands.launch", *settings.pop("launcher", ())]
        command += ["--config_file", str(file), SCRIPT, *self.arguments, *map(str, more)]
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {MARK: str(self.folder), **(env or {})}
        with open(self.log(node), "ab") as log:
            self.nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, **settings))

    def log(self, node):
        return self.folder / f"node{node}.log"

    def printed(self, node):
        return self.log(node).read_text(encoding="utf-8", errors="replace")

    def processes(self):
        """All that belong to the world, with their environment, whoever has started them and whether that lives."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get(MARK) == str(self.folder):
                    found[process] = environment
        return found

    def process(self, rank):
        (found,) = [p for p, environment in self.processes().items() if environment.get("RANK") == str(rank)]
        return found

    def wait_for_step(self, step):
        deadline = time.monotonic() + PATIENCE
        while newest_step(self.run_dir) < step:
            assert all(node.poll() is None for node in self.nodes), [self.printed(n) for n in range(len(self.nodes))]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self, began):
        """Seconds from `began` until the last process was gone."""
        while self.processes():
            assert time.monotonic() - began < PATIENCE
            for node in self.nodes:
                node.poll()
            time.sleep(0.1)
        return time.monotonic() - began

    def end(self):
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for node in self.nodes:
            node.wait(timeout=PATIENCE)


@pytest.fixture
def world(store_dir, tmp_path):
    preset = {**TINY_PRESET, "train-steps": 100_000, "save-steps": 10, "keep-last": 2}
    (tmp_path / "presets.json").write_text(json.dumps({"bert-test": preset}), encoding="utf-8")
    arguments = ["--parameter_file", tmp_path / "presets.json", "--model_type", "bert-test", "--tracker", "none"]
    arguments += ["--dataset_dir", store_dir, "--model_dir", tmp_path / "run", "--timeout", TIMEOUT]
    made = World(tmp_path, [*arguments, "--logging_steps", 1000])
    yield made
    made.end()


def see(world, fault, began):
    seconds = world.ended(began)
    sentences = []
    for node in (0, 1):
        lines = [line for line in world.printed(node).splitlines() if line.strip()]
        said = [line for line in lines if "error: " in line]
        code = world.nodes[node].returncode if node < len(world.nodes) else "-"
        sentences += [f"node {node} ({code}): {line}" for line in [*said, f"LAST {lines[-1] if lines else ''}"]]
    TABLE.append((fault, seconds, sentences))
    return seconds


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_peer_in_mid_step(world, number, rank):
    world.start(0)
    world.start(1)
    world.wait_for_step(10)
    began = time.monotonic()
    world.process(rank).send_signal(number)
    seconds = see(world, f"{number.name} of process {rank}", began)
    assert seconds < TIMEOUT + SLACK
