"""What goes wrong between machines: how long until every process has ended, and which sentence stays on the screen.

Two nodes with 2 + 1 processes on the loopback address, each started by a launcher of its own, as on two machines. With
`-s` a table of what was seen is printed: the fault, the seconds until the last process had ended, and of each node its
exit code and what it printed last.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import PATIENCE, ROOT, SAMPLE, TINY_PRESET, free_port, run_script
from runs import SCRIPT, heed_signals, largest_difference, newest_step, weights
from test_launch_pattern import node_file

from lmscripts.models.finding import find_damage, list_checkpoints
from lmscripts.training.peers import is_lost

pytestmark = pytest.mark.launch

TIMEOUT = 12  # seconds; --timeout of the launcher and of the script
SLACK = 15  # seconds beyond it until the last process has ended
START = 60  # seconds until all processes are there, on a machine with much else to do
MARK = "LMSCRIPTS_TEST_OF_FAULTS"  # in the environment of every process of a world, so that orphans are found
TABLE = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    for fault, seconds, lines in TABLE:
        print(f"\n{fault:60} {seconds:6.1f} s", *lines, sep="\n    ")


class World:
    """Nodes that train one run; each writes what it prints to a file of its own."""

    def __init__(self, folder, store_dir, preset=None):
        folder.mkdir(exist_ok=True)
        self.folder, self.run_dir, self.store_dir = folder, folder / "run", store_dir
        self.nodes, self.port, self.script = {}, free_port(), SCRIPT
        preset = preset or {**TINY_PRESET, "train-steps": 100_000, "save-steps": 10, "keep-last": 2}
        (folder / "presets.json").write_text(json.dumps({"bert-test": preset}), encoding="utf-8")

    def start(
        self, node, *, here=0, other=0, port=None, address="127.0.0.1", store=None, plain=False, env=None, more=()
    ):
        """Start a node: 0 with two processes or 1 with one, or as many as are said.

        Args:
            node: its place.
            here: GPUs of this node, as launch.py is told.
            other: of the other node.
            port: of node 0.
            address: of node 0.
            store: instead of that of the others.
            plain: by `accelerate launch`, not by launch.py.
            env: further variables.
            more: options of the script.
        """
        here, other, port = here or 2 - node, other or 1 + node, port or self.port
        if plain:
            file = node_file(self.folder, ("rank0_4gpu_fp16.yaml", "rank1_2gpu_fp16.yaml")[node], 2 * here, port)
            launcher = ["-m", "accelerate.commands.launch", "--config_file", file]
        else:
            launcher = [ROOT / "scripts" / "launch.py", "--cpu", "--node_rank", node, "--timeout", TIMEOUT]
            launcher += ["--here_gpus", here, "--other_gpus", other, "--master_addr", address, "--master_port", port]
        arguments = ["--parameter_file", self.folder / "presets.json", "--model_type", "bert-test", "--tracker", "none"]
        arguments += ["--dataset_dir", store or self.store_dir, "--model_dir", self.run_dir, "--timeout", TIMEOUT]
        words = [*launcher, self.script, *arguments, "--logging_steps", 1000, *more]
        environment = {**os.environ, MARK: str(self.folder), **(env or {})}
        with open(self.log(node), "ab") as log:
            self.nodes[node] = subprocess.Popen(
                [sys.executable, *map(str, words)], env=environment, stdout=log, stderr=log, preexec_fn=heed_signals
            )

    def log(self, node):
        return self.folder / f"node{node}.log"

    def printed(self, node):
        return self.log(node).read_text(encoding="utf-8", errors="replace") if self.log(node).exists() else ""

    def processes(self):
        """All that belong to the world with their environments, whoever has started them and whether that lives."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (environment := process.environ()).get(MARK) == str(self.folder):
                    found[process] = environment
        return found

    def process(self, rank):
        """The process of a rank, none that it started."""
        found = [p for p, environment in self.processes().items() if environment.get("RANK") == str(rank)]
        return min(found, key=lambda process: process.create_time())

    def wait_for_step(self, step):
        deadline = time.monotonic() + PATIENCE
        while newest_step(self.run_dir) < step:
            assert all(node.poll() is None for node in self.nodes.values()), self.printed(0) + self.printed(1)
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ended(self, began):
        """Seconds from `began` until the last process was gone."""
        while self.processes():
            assert time.monotonic() - began < PATIENCE
            for node in self.nodes.values():
                node.poll()
            time.sleep(0.1)
        seconds = time.monotonic() - began
        for node in self.nodes.values():
            node.wait()
        return seconds

    def end(self):
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for node in self.nodes.values():
            node.wait(timeout=PATIENCE)

    def see(self, fault, began, most=TIMEOUT + SLACK):
        """Wait until all have ended, and note how long that took and what each node printed last."""
        seconds, lines = self.ended(began), []
        for node, process in self.nodes.items():
            last = [line for line in self.printed(node).splitlines() if line.strip()][-1]
            lines.append(f"node {node}, exit code {process.returncode}: {last}")
        TABLE.append((fault, seconds, lines))
        assert seconds < most
        assert all(process.returncode != 0 for process in self.nodes.values())
        return [line.partition(": ")[2] for line in lines]


@pytest.fixture
def world(store_dir, tmp_path):
    made = World(tmp_path, store_dir)
    yield made
    made.end()


def sentences(world, lines):
    """What stands last on each node's screen is a sentence, and nothing else frightens."""
    for node, last in enumerate(lines):
        assert last.startswith("error: "), world.printed(node)[-3000:]
        assert "Traceback" not in world.printed(node)
    return lines


# ---- before the first step -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_the_other_node_never_comes(world, node):
    began = time.monotonic()
    world.start(node)
    (last,) = sentences(world, world.see(f"only node {node} is started", began, START + TIMEOUT + SLACK))
    assert last.startswith(f"error: node {1 - node} ")
    assert "did not" in last  # come, or answer


@pytest.mark.slow
def test_wrong_address(world):
    began = time.monotonic()
    world.start(0)
    world.start(1, address="192.0.2.1")  # which is nobody's
    lines = sentences(world, world.see("node 1 has a wrong address of node 0", began, START + TIMEOUT + SLACK))
    assert "192.0.2.1" in lines[1]


@pytest.mark.slow
def test_another_port(world):
    began = time.monotonic()
    world.start(0)
    world.start(1, port=free_port())
    sentences(world, world.see("node 1 has another port", began, START + TIMEOUT + SLACK))


@pytest.mark.slow
def test_port_in_use(world):
    with socket.socket() as other:
        other.bind(("0.0.0.0", world.port))
        other.listen()
        began = time.monotonic()
        world.start(0)
        world.start(1)
        lines = sentences(world, world.see("the port is in use", began, START + TIMEOUT + SLACK))
    assert f"port {world.port} is in use" in lines[0]


@pytest.mark.slow
def test_wrong_counts(world):
    began = time.monotonic()
    world.start(0, other=2)
    world.start(1)
    lines = sentences(world, world.see("node 0 is told of 2 other GPUs, there is 1", began, START + TIMEOUT + SLACK))
    assert all("told of 3 processes in all, and node 0 of 4" in line for line in lines)


def patched(folder, text):
    """Variables of a node whose Python runs this text first."""
    (folder / "patch").mkdir()
    (folder / "patch" / "sitecustomize.py").write_text(text, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder / "patch"), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_a_clock_an_hour_off(world):
    late = patched(world.folder, "import time\nnow = time.time\ntime.time = lambda: now() + 3600\n")
    began = time.monotonic()
    world.start(0)
    world.start(1, env=late)
    lines = sentences(world, world.see("the clock of node 1 is an hour off", began, START + TIMEOUT + SLACK))
    assert all("the clock of process 2" in line for line in lines)


@pytest.mark.slow
def test_another_version(world):
    (world.folder / "patch" / "transformers-4.0.0.dist-info").mkdir(parents=True)
    metadata = world.folder / "patch" / "transformers-4.0.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n", encoding="utf-8")
    began = time.monotonic()
    world.start(0)
    world.start(1, env={"PYTHONPATH": f"{metadata.parents[1]}:{os.environ.get('PYTHONPATH', '')}"})
    lines = sentences(world, world.see("node 1 has another version of transformers", began, START + TIMEOUT + SLACK))
    assert all("transformers is 4.0.0 on process 2" in line for line in lines)


@pytest.fixture(scope="session")
def others(tokenizer_dir):
    """Stores of other text, and of the same text with another tokenizer."""
    place = tokenizer_dir.parent
    text, words = SAMPLE / "articles.txt", ("--validation_fraction", 0.1, "--num_workers", 1)
    run_script("train_tokenizer.py", "--input_file", text, "--model_dir", place / "other", "--vocab_size", 1500)
    whole = text.read_text(encoding="utf-8").split("\n\n")
    (place / "less.txt").write_text("\n\n".join(whole[:-1]), encoding="utf-8")
    for name, source, tokenizer in (("text", place / "less.txt", tokenizer_dir), ("tokenizer", text, place / "other")):
        inputs = ("--input_file", source, "--tokenizer_dir", tokenizer, "--output_dir", place / f"other_{name}")
        run_script("prepare_corpus.py", *inputs, *words)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("what", ["text", "tokenizer"])
def test_another_store(world, others, what):
    began = time.monotonic()
    world.start(0)
    world.start(1, store=others / f"other_{what}")
    lines = sentences(world, world.see(f"node 1 has a store with another {what}", began, START + TIMEOUT + SLACK))
    assert all("store" in line and "process 2" in line for line in lines)


@pytest.mark.slow
def test_a_missing_store(world):
    began = time.monotonic()
    world.start(0)
    world.start(1, store=world.folder / "nowhere")
    lines = sentences(world, world.see("node 1 has no store", began, START + TIMEOUT + SLACK))
    assert all("nowhere" in line and "process 2" in line for line in lines)


# ---- in mid-step -----------------------------------------------------------------------------------------------------


def struck(world, fault, strike, plain=False):
    """Strike a world in mid-step; what stands last on the screens."""
    for node in (0, 1):
        world.start(node, plain=plain)
    world.wait_for_step(10)
    began = time.monotonic()
    strike()
    return world.see(fault + " (accelerate launch)" * plain, began)


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 2, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_gone_or_stopped_is_named(world, number, rank):
    lines = struck(world, f"{number.name} of process {rank}", lambda: world.process(rank).send_signal(number))
    sentences(world, lines)
    other = 0 if rank == 2 else 1
    assert f"process {rank} (host" in lines[other]
    assert "--do_continue" in lines[other]
    assert f"process {rank}" in lines[1 - other]
    assert "SIGKILL" in lines[1 - other]
    assert not find_damage(list_checkpoints(world.run_dir)[-1])


BROKEN = """
import os, runpy, sys
from lmscripts.training import optim
set_rate, calls = optim.set_rate, []

def broken(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "2" and len(calls) == 5:
        raise RuntimeError("a fault of mine")
    set_rate(*arguments)

optim.set_rate = broken
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_fault_of_the_program_keeps_its_traceback_and_is_named_on_all(world):
    world.script = world.folder / "broken.py"
    world.script.write_text(f"import sys\nsys.argv[0] = {SCRIPT!r}\n{BROKEN}", encoding="utf-8")
    began = time.monotonic()
    for node in (0, 1):
        world.start(node)
    lines = world.see("a fault of the program on process 2", began, START + TIMEOUT + SLACK)
    assert all("process 2 (" in line and "RuntimeError: a fault of mine" in line for line in lines)
    assert "Traceback" in world.printed(1)
    assert "Traceback" not in world.printed(0)


def test_the_loss_of_a_process_is_told_from_faults():
    assert is_lost(RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:188"))
    assert is_lost(RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 12000ms for recv"))
    assert is_lost(torch.distributed.DistNetworkError("failed to recv, got 0 bytes"))
    assert not is_lost(RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:456] preamble.length <= nbytes"))
    assert not is_lost(torch.distributed.DistBackendError("NCCL error: invalid usage"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(TimeoutError("timed out: gloo"))


def test_a_process_that_is_stopped_is_killed_and_one_that_works_is_not():
    program = "import os, signal, time; from lmscripts.training.peers import Clock; Clock(3); time.sleep(6); "
    program += "print('lives', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "lives\n"), done.stderr


def test_a_process_that_ends_is_killed_where_that_hangs_but_not_before_its_checkpoint_is_written():
    program = (
        "import threading, time; from lmscripts.training.peers import Clock; from lmscripts.errors import WRITER; "
    )
    program += (
        "clock = Clock(600); writer = threading.Thread(target=time.sleep, args=[5], name=WRITER); writer.start(); "
    )
    program += "clock.end_within(2); writer.join(); print('written', flush=True); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "written\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_our_launcher(world, number):
    world_of = lambda: world.process(2).send_signal(number)  # noqa: E731
    struck(world, f"{number.name} of process 2", world_of, plain=True)
    said = [line for line in world.printed(0).splitlines() if line.startswith("error: ")]
    assert said
    assert all("process 2 (host" in line for line in said)
    assert "traceback : process 2 (host" in world.printed(0)  # torch's table, which comes last
    assert "rank0" not in world.printed(0)


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("who", ["agent", "launcher"])
def test_a_launcher_that_is_killed(world, who, node):
    """Its processes are not left behind, and save."""

    def strike():
        launcher = psutil.Process(world.nodes[node].pid)
        (launcher if who == "launcher" else launcher.children()[0]).kill()

    struck(world, f"SIGKILL of the {who} of node {node}", strike)
    assert not find_damage(list_checkpoints(world.run_dir)[-1])


FULL = """
import os, resource, signal
if os.environ.get("RANK") == "{rank}":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "size"), [(0, 500_000), (2, 9_000)])
def test_a_disk_is_full(world, rank, size):
    limited = patched(world.folder, FULL.format(rank=rank, size=size))
    for node in (0, 1):
        world.start(node, env=limited if node == rank // 2 else None)
    while not any("error: " in world.printed(node) for node in world.nodes):
        assert world.processes()
        time.sleep(0.05)
    lines = sentences(world, world.see(f"no space on the disk of process {rank}", time.monotonic()))
    assert all(f"process {rank}" in line and "large" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["process", "main process", "agent", "launcher"])
def test_killed_again_and_again_nothing_is_lost(world, what):
    """LMSCRIPTS_KILLS times, at any moment after a checkpoint, and started again at once, with the same port."""
    moment, times, kills = random.Random(what), int(os.environ.get("LMSCRIPTS_KILLS", 2)), 0
    preset = {**TINY_PRESET, "train-steps": 20 + 12 * times, "save-steps": 5, "keep-last": 3}
    (world.folder / "presets.json").write_text(json.dumps({"bert-test": preset}), encoding="utf-8")
    lost = []
    while True:
        for node in (0, 1):
            world.start(node, more=["--do_continue"])
        before, wait = newest_step(world.run_dir), kills < times
        while wait and newest_step(world.run_dir) == before and all(n.poll() is None for n in world.nodes.values()):
            time.sleep(0.01)
        if not wait:
            break
        time.sleep(moment.random() * 0.3)
        reached, node = newest_step(world.run_dir), moment.randrange(2)
        launcher, began = psutil.Process(world.nodes[node].pid), time.monotonic()
        with contextlib.suppress(psutil.Error, ValueError):
            if what == "launcher":
                launcher.kill()
            elif what == "agent":
                launcher.children()[0].kill()
            else:
                world.process(0 if what == "main process" else 1 + node).kill()
            kills += 1
        seconds = world.ended(began)
        assert seconds < TIMEOUT + SLACK, world.printed(0) + world.printed(1)
        assert newest_step(world.run_dir) >= reached
        assert not any(find_damage(folder) for folder in list_checkpoints(world.run_dir))
        lost.append(seconds)
    world.ended(time.monotonic())
    TABLE.append((f"{kills} kills of the {what}, the slowest end", max(lost), []))
    assert [node.returncode for node in world.nodes.values()] == [0, 0], world.printed(0)
    whole = World(world.folder / "whole", world.store_dir, preset)
    for node in (0, 1):
        whole.start(node)
    whole.ended(time.monotonic())
    difference = largest_difference(weights(world.run_dir), weights(whole.run_dir))
    TABLE.append((f"largest difference of a weight: {difference:.1e}", 0.0, []))
    assert difference == 0
