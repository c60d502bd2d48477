"""scripts/launch.py: unequal machines as nodes on this one, and what it refuses before anything is started."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import forked
import pytest
import yaml
from cluster import launch_nodes, start_nodes
from conftest import PATIENCE, ROOT, free_port

from lmscripts.cluster import gpus as gpus_module
from lmscripts.cluster import nodes
from lmscripts.errors import UserError

LAUNCH = str(ROOT / "scripts" / "launch.py")
TWO, THREE = ["--other_gpus", 1], ["--nnodes", 3, "--other_gpus", 2]
EXAMPLE = {"foo.bar.com": 4, "127.0.0.1": 5, "172.12.145.1": 6}  # of the older launcher's document
# A process says where it stands in the world, without importing what would take seconds.
WHERE = """
import json, os, pathlib, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "LMS_EXPECTED_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
found = {name: os.environ.get(name, "") for name in names}
found |= {"arguments": sys.argv[1:], "folder": os.getcwd(), "cluster": json.loads(os.environ.get("LMS_CLUSTER", "[]"))}
(pathlib.Path(__file__).parent / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
"""
# Waits until it is told to stop, then ends as a training script does; process 2 may do something else.
WAITING = """
import os, pathlib, signal, sys, time
from lmscripts.errors import UserError, user_errors
here, rank = pathlib.Path(__file__).parent, os.environ["RANK"]
def stop(number, frame):
    (here / f"told{rank}").write_text(signal.Signals(number).name)
    os._exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
(here / f"ready{rank}").touch()
while len(list(here.glob("ready*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.05)
with user_errors():
    if rank == "2" and sys.argv[1] == "refuse":
        raise UserError("corpus.txt is empty")
    if rank == "2" and sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
time.sleep(900)
"""


@pytest.fixture
def where(tmp_path):
    """The first script."""
    script = tmp_path / "where.py"
    script.write_text(WHERE, encoding="utf-8")
    return script


@pytest.fixture
def waiting(tmp_path):
    """The second script."""
    script = tmp_path / "waiting.py"
    script.write_text(WAITING, encoding="utf-8")
    return script


def told(folder):
    """What the processes of the first script found, by rank."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    assert found
    return found


def launch(*words, check=True, env=None, cwd=None):
    done = forked.run([sys.executable, LAUNCH, *map(str, words)], cwd, {**os.environ, **(env or {})}, PATIENCE)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Makes an `nvidia-smi` that answers with rows of index, identifier, memory in use and utilisation."""

    def answers(*rows):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        lines = "\n".join(", ".join(map(str, row)) for row in rows)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n", encoding="utf-8")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setitem(sys.modules, "pynvml", None)

    return answers


def dry(*words, **how):
    """The Accelerate file that would be written, and all that was said."""
    done = launch(*words, "--dry_run", sys.executable, **how)
    start = done.stdout.index("compute_environment")
    return yaml.safe_load(done.stdout[start : done.stdout.index("would start")]), done.stdout


# ---- the world -------------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize("counts", [[1], [2], [2, 1], [3, 1, 2]], ids=str)
def test_every_process_has_its_rank_in_one_world(counts, where, tmp_path):
    for rank in range(len(counts)):
        (tmp_path / f"node{rank}").mkdir()
    arguments = ["a", "b c", "--x", "--", "--node_rank", "$HOME", "'"]
    launch_nodes(counts, where, *arguments, node_dir=tmp_path / "node{}", forks=counts != [2, 1])
    found = told(tmp_path)
    assert len(found) == sum(counts)
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    if sum(counts) > 1:
        assert [(int(each["GROUP_RANK"]), int(each["LOCAL_RANK"])) for each in found] == places
        assert {each["WORLD_SIZE"] for each in found} == {str(sum(counts))}
    assert {each["LMS_EXPECTED_WORLD_SIZE"] for each in found} == {str(sum(counts))}
    assert [each["folder"] for each in found] == [str(tmp_path / f"node{node}") for node, _ in places]
    assert all(each["arguments"] == arguments for each in found)
    assert [node["processes"] for node in found[0]["cluster"]] == counts


@pytest.mark.launch
def test_lines_of_the_older_document_run_as_written(where, tmp_path, gpus):
    """Node 0 has 3 GPUs and node 1 has 1; each line is started by itself, and knows the number of the others alone."""
    port = ["--master_port", free_port()]  # 29500 may be another run's
    gpus(*[(n, f"GPU-{n}", 10, 0) for n in range(3)])
    first = [sys.executable, LAUNCH, *map(str, port), "--other_gpus", "1", str(where), "leanings.csv"]
    node0 = forked.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert any("meeting at" in line for line in node0.stdout)  # it has asked for its GPUs
    gpus((0, "GPU-9", 10, 0))
    node1 = launch("--node_rank", 1, "--master_addr", "127.0.0.1", *port, "--other_gpus", 3, where, "leanings.csv")
    assert node0.wait(timeout=PATIENCE) == 0, node0.stdout.read()
    assert [(each["RANK"], each["LOCAL_RANK"]) for each in told(tmp_path)] == [
        ("0", "0"),
        ("1", "1"),
        ("2", "2"),
        ("3", "0"),
    ]
    assert "node 0  node-0" in node1.stdout
    assert re.search(r"1 GPU +rank 3 +<- this machine", node1.stdout)
    assert [(node["processes"]) for node in told(tmp_path)[3]["cluster"]] == [3, 1]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("nodes_told", "sentence"),
    [
        ([TWO], "node 1 did not come in 3 seconds"),
        ([["--other_gpus", 2], ["--node_rank", 1, *TWO]], "told of 2 processes in all, and node 0 of 3"),
        ([THREE, ["--node_rank", 1, *THREE], ["--node_rank", 1, *THREE]], "--node_rank of"),
        ([THREE, ["--node_rank", 1, "--other_gpus", 2]], "told of 2 nodes, and node 0 of 3"),
    ],
    ids=["missing", "world", "rank", "nodes"],
)
def test_nodes_that_were_told_different_things_say_so(nodes_told, sentence, where, tmp_path):
    common = [
        sys.executable,
        LAUNCH,
        "--cpu",
        "--timeout",
        str(3 if len(nodes_told) == 1 else 60),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
    ]
    common.append(str(free_port()))
    lines = [[*common, *map(str, words), str(where)] for words in nodes_told]
    started = [forked.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in lines]
    for process in started:
        assert sentence in process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 2
    assert not list(tmp_path.glob("rank*"))


@pytest.mark.launch
def test_a_port_that_is_in_use(where):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch("--cpu", "--other_gpus", 1, "--master_port", port, where, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: port {port} is in use here: give another one, the same on all nodes\n",
    )


# ---- how it ends -----------------------------------------------------------------------------------------------------


def ended(process, log):
    code = process.wait(timeout=PATIENCE)
    return code, log.read_text(errors="replace")


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_processes_and_their_code_is_the_launchers(number, waiting, tmp_path):
    log = tmp_path / "log"
    with open(log, "wb") as file:
        process = start_nodes([2, 1], waiting, "wait", log=file)
    wait_for(process, tmp_path, 3)
    process.send_signal(number)
    code, text = ended(process, log)
    assert code == 75, text
    assert [(tmp_path / f"told{rank}").read_text() for rank in range(3)] == [number.name] * 3
    assert "error" not in text


def wait_for(process, folder, count):
    until = time.monotonic() + PATIENCE
    while len(list(folder.glob("ready*"))) < count:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("refuse", 2, "error: process 2 (b.example.org): corpus.txt is empty"),
        ("die", 137, "error: process 2 (b.example.org) was ended by SIGKILL"),
    ],
)
def test_when_a_process_dies_all_end_with_its_words_last(what, code, words, waiting, tmp_path):
    done = launch_nodes([2, 1], waiting, what, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, words), done.stderr
    assert "Traceback" not in done.stderr
    assert [(tmp_path / f"told{rank}").read_text() for rank in range(2)] == ["SIGTERM"] * 2


@pytest.mark.launch
def test_processes_stop_when_their_launcher_is_killed(waiting, tmp_path):
    with open(tmp_path / "log", "wb") as file:
        line = [sys.executable, LAUNCH, "--cpu", "--here_gpus", "2", str(waiting), "wait"]
        process = forked.Popen(line, stdout=file, stderr=file)
    wait_for(process, tmp_path, 2)
    process.kill()
    process.wait()
    until = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("told*"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.launch
def test_all_nodes_over_ssh(where, tmp_path):
    """By a stand-in that notes the host and runs the command here, as a login shell there would."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\n[ "$1" = -q ] && shift\necho "$1" >> {tmp_path}/hosts\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    content = {"nodes": [{"host": "a.example.org", "gpus": 2}, {"host": "b.example.org", "gpus": 1}]}
    content["main"] = {"host": "127.0.0.1", "port": free_port()}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    arguments = ["a", "b c", "$HOME", "'", '"', ";"]
    launch(
        "--over_ssh", "--ssh", f"{ssh} -q", "--cpu", "--cluster", file, where, *arguments, env={"NCCL_DEBUG": "WARN"}
    )
    assert sorted((tmp_path / "hosts").read_text().split()) == ["a.example.org", "b.example.org"]
    assert [(each["RANK"], each["GROUP_RANK"]) for each in told(tmp_path)] == [("0", "0"), ("1", "0"), ("2", "1")]
    assert all(each["arguments"] == arguments for each in told(tmp_path))


# ---- what stands on the line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["-m", "json.tool"], "--module json.tool"),
        (["-q", "--no_python", "bash", "-c", "x y"], "--no_python bash -c 'x y'"),
        (["--no-python", "--master-port=3", "bash", "-m"], "--no_python bash -m"),
        (["--cpu", LAUNCH, "--cluster", "other.yaml", "--help"], f"{LAUNCH} --cluster other.yaml --help"),
    ],
)
def test_what_follows_the_script_is_handed_on_untouched(words, started):
    done = launch("--dry_run", *words)
    assert done.stdout.rstrip().endswith(f"--rdzv_conf timeout=600 {started}")


def test_starting_needs_nothing_heavy():
    program = f"""
import runpy, sys
sys.argv = [{LAUNCH!r}, "--dry_run", "--here_gpus", "3", "--cpu", "--other_gpus", "2", {LAUNCH!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = [n for n in ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy") if n in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--node_rank", 2, "--other_gpus", 3, LAUNCH], "--node_rank 2 cannot be of 2 machines"),
        (["--node_rank", 1, "--other_gpus", 3, LAUNCH], "--master_addr is missing"),
        (["--nnodes", 3, "--other_gpus", 1, LAUNCH], "every other machine has a GPU at least"),
        (["--here_gpus", 0, LAUNCH], "--here_gpus must be greater than 0, got 0"),
        (["--cluster", "{nodes: [{host: a, gpus: 1}]}", "--other_gpus", 1, LAUNCH], "has no effect with --cluster"),
        (["-m", "--no_python", LAUNCH], "--module and --no_python differ"),
        ([], "no script to start"),
        (["--cpu", "absent.py"], "absent.py is no file"),
        (["--other_gpu", "1", LAUNCH], "did you mean --other_gpus?"),
        (["--over_ssh", "--other_gpus", "1", LAUNCH], "--over_ssh has to know the machines"),
        (
            ["--local_cpu", "--node_rank", "1", LAUNCH],
            "--node_rank 1 has no effect where all nodes are started from here",
        ),
        (["--mixed_precision", "fp8", LAUNCH], "--mixed_precision must be no, fp16, bf16 or null, not fp8"),
        (
            ["--over_ssh", "--cluster", "{nodes: [{host: localhost, gpus: 1}, {host: b, gpus: 1}]}", LAUNCH],
            "localhost means another machine on each node",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(words, sentence):
    done = launch("--cpu", *words, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_three_machines_by_a_sum_know_the_world_but_not_each_other():
    """2, 1 and 3 GPUs; the older ranks were impossible from three machines on."""
    for rank, here, other in ((0, 2, 4), (1, 1, 5), (2, 3, 3)):
        words = ["--cpu", "--nnodes", 3, "--node_rank", rank, "--here_gpus", here, "--other_gpus", other]
        file, said = dry(*words, "--master_addr", "10.0.0.1")
        assert (file["num_machines"], file["machine_rank"], file["num_processes"]) == (3, rank, 3 * here)
        assert "LMS_EXPECTED_WORLD_SIZE=6" in said
        assert "LMS_CLUSTER" not in said  # a part of it would be wrong


# ---- files of machines -----------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Lets this machine have a name and an address."""

    def be(name, *addresses):
        monkeypatch.setattr(nodes.socket, "gethostname", lambda: name)
        monkeypatch.setattr(nodes, "_addresses", lambda: set(addresses))
        monkeypatch.setattr(nodes.socket, "getaddrinfo", lambda host, port: [])

    return be


def gpu_file(folder, content=EXAMPLE):
    file = folder / "gpus.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "address", "rank"), [("foo", "10.0.0.9", 0), ("x", "10.0.0.8", 1), ("y", "172.12.145.1", 2)]
)
def test_the_documents_file_is_the_same_world_on_each_node(name, address, rank, machine, tmp_path):
    """By the older rules it was a world of 11, 15 or 10. Which machine 127.0.0.1 is, only --node_rank can say."""
    machine("foo.bar.com" if name == "foo" else name, address)
    listed = nodes.read_gpu_file(gpu_file(tmp_path))
    found, own = nodes.with_own(listed, nodes.Node(name, 8), None, rank, None)
    assert ([(node.host, node.gpus) for node in found], own) == (list(EXAMPLE.items()), rank)
    with pytest.raises(UserError, match=r"127.0.0.1 means another machine on each of 3 nodes.*--node_rank on every"):
        nodes.with_own(listed, nodes.Node(name, 8), None, None, None)


def test_a_rank_that_cannot_be_is_refused(machine, tmp_path):
    machine("foo.bar.com", "10.0.0.9")
    listed = nodes.read_gpu_file(gpu_file(tmp_path))
    with pytest.raises(UserError, match=r"--node_rank 1 is 127.0.0.1, but this machine is foo.bar.com.*node 0"):
        nodes.find_own(listed, 1)
    machine("x", "10.0.0.8")
    with pytest.raises(UserError, match=r"--node_rank 2 is 172.12.145.1, which is not known.*127.0.0.1 could be it"):
        nodes.find_own(listed, 2)
    with pytest.raises(UserError, match="--node_rank is 3, but there are 3 nodes"):
        nodes.find_own(listed, 3)


def test_this_machine_is_found_by_address_or_name_and_never_guessed(machine):
    three = [nodes.Node("a.example.org", 1), nodes.Node("10.0.0.2", 1), nodes.Node("c", 1)]
    for name, address, place in (
        ("A.example.org", "10.0.0.1", 0),
        ("b", "10.0.0.2", 1),
        ("c.example.org", "10.0.0.3", 2),
    ):
        machine(name, address)
        assert nodes.find_own(three, None) == place
    machine("d", "10.0.0.4")
    with pytest.raises(UserError, match=r"this machine \(10.0.0.4, d\) is none of a.example.org, 10.0.0.2, c"):
        nodes.find_own(three, None)
    machine("c", "10.0.0.2")
    with pytest.raises(UserError, match=r"10.0.0.2 and c are both this machine: give --node_rank"):
        nodes.find_own(three, None)


def test_a_machine_that_the_file_leaves_out(machine, tmp_path):
    machine("a", "10.0.0.1")
    own, one = nodes.Node("a", 3), nodes.read_gpu_file(gpu_file(tmp_path, {"b": 1}))
    two = nodes.read_gpu_file(gpu_file(tmp_path, {"b": 1, "c": 2}))
    assert nodes.with_own(one, own, None, None, None) == ([own, *one], 0)  # two machines: the other one is named
    assert nodes.with_own(one, own, None, 1, None) == ([*one, own], 1)
    assert nodes.with_own(two, own, None, 1, 3) == ([two[0], own, two[1]], 1)
    with pytest.raises(UserError, match="is none of b, c"):  # is it one of two, or a third?
        nodes.with_own(two, own, None, None, None)
    with pytest.raises(UserError, match="--nnodes is 5, but the file names 2"):
        nodes.with_own(two, own, None, None, 5)
    machine("b", "10.0.0.2")
    with pytest.raises(UserError, match="--here_gpus is 3, but the file says 1 for b"):
        nodes.with_own(two, own, 3, None, None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "must hold"),
        ('{"a": 1, "a": 2}', "a stands there twice"),
        ('{"a": "2", "b c": 1, "c": 0, "d": true}', "'a' has '2'; 'b c' has 1; 'c' has 0; 'd' has True"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_of_numbers_that_is_none(content, words, tmp_path):
    with pytest.raises(UserError, match=words):
        nodes.read_gpu_file(gpu_file(tmp_path, content))


def test_the_example_is_read_as_it_explains_itself():
    cluster = nodes.read_cluster(str(ROOT / "accelerate_configs" / "cluster.example.yaml"))
    a, b, c = cluster.nodes
    assert (a.gpus, b.gpus, b.ids, c.gpus, c.least_busy) == (3, 1, ("2",), 2, True)
    assert (cluster.world_size, cluster.main_host, cluster.main_port, cluster.timeout) == (6, a.host, 29500, 120)
    assert (cluster.mixed_precision, cluster.network_interface) == ("bf16", None)
    assert [node.batch_size for node in cluster.nodes] == [128, 48, 80]
    assert nodes.read_cluster(cluster.as_text()) == cluster


def test_all_that_is_wrong_in_a_file_is_said_at_once():
    content = """{nodes: [{host: a, gpus: least_busy:0, batchsize: 3}, {gpus: [1, 1]}, 7], main: {port: 70000},
    mixed_precision: bf61, time: 3}"""
    with pytest.raises(UserError) as caught:
        nodes.read_cluster(content)
    for words in (
        "nodes[0] has the unknown key batchsize (known are host, gpus, batch_size)",
        "nodes[0].gpus must be a number, a list of their numbers, or least_busy:2, not 'least_busy:0'",
        "nodes[1] has no host",
        "nodes[1].gpus must be a number, a list of their numbers, or least_busy:2, not [1, 1]",
        "nodes[2] must hold host, gpus, batch_size, not 7",
        "main.port must be a port from 1 to 65535, not 70000",
        "mixed_precision must be no or fp16 or bf16, not 'bf61'",
        "the file has the unknown key time",
    ):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="the main machine is the first one"):
        nodes.read_cluster("{nodes: [{host: a, gpus: 1}, {host: b, gpus: 1}], main: {host: b}}")


# ---- GPUs ------------------------------------------------------------------------------------------------------------

FOUR = [(0, "GPU-a", 900, 50), (1, "GPU-b", 10, 90), (2, "GPU-c", 10, 5), (3, "GPU-d", 400, 0)]


@pytest.mark.parametrize(
    ("visible", "words", "chosen"),
    [
        (None, ["--here_gpus", 2], "1,2"),
        (None, ["--here_gpus", 3], "1,2,3"),
        (None, [], "all"),
        ("0,3,GPU-b", ["--here_gpus", 2], "3,GPU-b"),
        ("3,0", [], "all"),
        (None, ["--cluster", "{nodes: [{host: localhost, gpus: 2}]}"], "0,1"),
        (None, ["--cluster", "{nodes: [{host: localhost, gpus: [3, 1]}]}"], "1,3"),
        (None, ["--cluster", "{nodes: [{host: localhost, gpus: least_busy:1}]}"], "2"),
    ],
)
def test_gpus_are_chosen_among_those_that_are_there(visible, words, chosen, gpus, monkeypatch):
    gpus(*FOUR)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    file, _ = dry(*words)
    assert file["gpu_ids"] == chosen
    assert file["num_processes"] == (
        len(chosen.split(",")) if chosen != "all" else len((visible or "0,1,2,3").split(","))
    )
    assert not file["use_cpu"]


@pytest.mark.parametrize(
    ("visible", "words", "sentence"),
    [
        (None, ["--here_gpus", 5], "5 GPUs were asked for, but this machine has 4 (0, 1, 2, 3)"),
        ("1", ["--here_gpus", 2], "but this machine has 1 (1), as CUDA_VISIBLE_DEVICES is '1'"),
        (None, ["--cluster", "{nodes: [{host: localhost, gpus: [7, 1]}]}"], "the GPU 7 was asked for"),
        ("", ["--other_gpus", 2], "no GPU was found on this machine: give --cpu"),
    ],
)
def test_gpus_that_are_not_there(visible, words, sentence, gpus, monkeypatch):
    gpus(*FOUR)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    done = launch(*words, LAUNCH, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_driver_that_does_not_tell_ends_nothing(gpus):
    gpus((0, "GPU-a", "[N/A]", "[Not Supported]"), (1, "GPU-b", 300, 2))
    assert dry("--here_gpus", 1)[0]["gpu_ids"] == "1"


def test_without_a_driver_to_ask_the_variable_counts(tmp_path, monkeypatch):
    """As on a machine with GPUs of another maker."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for way in ("_from_nvml", "_from_files"):
        monkeypatch.setattr(gpus_module, way, list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert [gpu.name for gpu in gpus_module.gpus_here()] == ["0", "1", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_module.gpus_here() == []


def test_keys_of_another_accelerate_file_are_kept(gpus):
    gpus(*FOUR)
    file, _ = dry("--accelerate_config", ROOT / "accelerate_configs" / "fsdp2_bf16.yaml")
    assert (file["distributed_type"], file["mixed_precision"], file["num_processes"]) == ("FSDP", "bf16", 4)
    assert file["fsdp_config"]["fsdp_version"] == 2
