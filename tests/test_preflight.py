"""What is found wrong before the first step: all processes end within seconds, and say on which machine it is."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import worlds
from conftest import PATIENCE, ROOT, SAMPLE, TINY_PRESET, free_port, run_script
from torch.distributed import HashStore

from lmscripts.cluster.announced import AnnouncedNode, announcement
from lmscripts.errors import OfAnother, UserError
from lmscripts.training import joining

pytestmark = pytest.mark.launch
PRETRAINING = ROOT / "scripts" / "run_pretraining.py"
WORDS = ["--parameter_file", "preset.json", "--model_type", "bert-test", "--dataset_dir", "store", "--tracker", "none"]
WORDS += ["--model_dir", "run", "--stop_at_step", "1", "--timeout", "300"]


def errors(machines, *words, **how):
    """What all processes of a world say, which has to be the same."""
    codes, texts = worlds.run((1, 1), machines, PRETRAINING, *WORDS, *words, port=free_port(), **how)
    assert set(codes) == {2}, "\n".join(texts)
    said = [re.findall(r"error: (.*)", text)[-1] for text in texts]
    # The parser names no process where it has found something wrong itself.
    assert len({re.sub(r"^process \d \(host \S+\): ", "", each) for each in said}) == 1, said
    assert not (machines[0] / "run").exists()
    return max(said, key=len)


@pytest.mark.parametrize("fault", ["store", "preset", "option", "value"])
def test_what_one_machine_lacks_is_said_on_both(fault, machines):
    if fault == "store":
        shutil.rmtree(machines[1] / "store")
        said = errors(machines)
        assert "process 1 (host " in said
        assert "store is not a token store" in said
        assert "--send_inputs" in said
    elif fault == "preset":
        (machines[1] / "preset.json").write_text(json.dumps({"bert-other": TINY_PRESET}), encoding="utf-8")
        said = errors(machines)
        assert "process 1 (host " in said
        assert "bert-test" in said
    elif fault == "option":
        said = errors(machines, "--beta{}", 0.9)  # there is a --beta1
        assert re.match(r"process 0 \(host \S+\): unknown option --beta0", said)
    else:
        assert "--max_steps is 10 on process 0" in errors(machines, "--max_steps", "1{}")


def test_another_store_is_named_with_its_machine(machines, tokenizer_dir, tmp_path):
    (tmp_path / "few.txt").write_text((SAMPLE / "articles.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    arguments = ("--input_file", tmp_path / "few.txt", "--tokenizer_dir", tokenizer_dir)
    shutil.rmtree(machines[1] / "store")
    run_script("prepare_corpus.py", *arguments, "--output_dir", machines[1] / "store", "--num_workers", 1)
    said = errors(machines)
    assert re.match(r"token store is \S+ on process 0 \(host .*\) but \S+ on process 1 \(host ", said)
    assert "--send_inputs" in said


@pytest.mark.parametrize("fault", ["clock", "version", "cluster"])
def test_machines_that_are_set_up_otherwise(fault, machines, tmp_path):
    """Before anything of a run is read."""
    own, before = {}, tmp_path / "before.py"
    if fault == "clock":
        before.write_text("import time\nnow = time.time\ntime.time = lambda: now() - 3600\n", encoding="utf-8")
        own, expected = {"BEFORE": before}, r"the clock of process 1 \(host .*\) is 1 h 00 min behind that of process 0"
    elif fault == "version":
        before.write_text(
            "from importlib import metadata\nfound = metadata.version\n"
            "metadata.version = lambda name: '5.0.0' if name == 'transformers' else found(name)\n",
            encoding="utf-8",
        )
        own, expected = (
            {"BEFORE": before},
            r"transformers is \S+ on process 0 .* but 5\.0\.0 on process 1 .*install",
        )
    else:
        own = announcement([AnnouncedNode("x.example.org", 1), AnnouncedNode("z.example.org", 1)])
        expected = r"LMS_CLUSTER is .* on process 0 \(host x\.example\.org\)"
    usual = announcement([AnnouncedNode("x.example.org", 1), AnnouncedNode("y.example.org", 1)])
    assert re.search(expected, errors(machines, env=usual, of_node={1: own}))


ENDS = """
import os, signal
from torch.distributed import HashStore
from lmscripts.training.joining import World

met = World(HashStore(), 0, 1, 600)
met.tell("a problem")
met.part()
os.kill(os.getpid(), signal.SIGUSR2)  # of the thread, which has heard of it by now
"""


def test_who_hears_of_a_problem_while_it_ends_is_not_killed_by_that():
    assert subprocess.run([sys.executable, "-c", ENDS], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def test_who_hears_of_a_problem_while_it_is_about_to_tell_its_own_ends_with_a_sentence(monkeypatch):
    """The signal of the thread comes before the main thread has said that it is ending."""
    store = HashStore()
    monkeypatch.setattr(joining, "_meet", lambda timeout: joining.World(store, 0, 2, 600))
    monkeypatch.setattr(joining, "_check", lambda met, problem: None)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def slow(error):
        for key, value in {"problem": "process 1: its file is missing", "heard/1": ""}.items():
            store.set(key, value)
        time.sleep(PATIENCE)

    monkeypatch.setattr(joining, "sentence_of", slow)
    with pytest.raises(OfAnother, match=r"^process 1: its file is missing$"), joining.join():
        raise UserError("the file of this one is missing")


def test_who_ends_with_its_own_reason_is_not_ended_by_its_thread(monkeypatch):
    ended = []
    monkeypatch.setattr(joining, "_GRACE", 1)
    monkeypatch.setattr(joining, "end_with", lambda *args, **how: ended.append(args))
    met = joining.World(HashStore(), 0, 2, 600)
    told = threading.Thread(target=met._hear, args=["a problem"])
    met._is_ending = True
    told.start()
    time.sleep(1.2)  # as long as `tell` waits for the others, and a little more
    met.part()
    told.join()
    assert ended == []


def test_the_odd_one_is_named(monkeypatch):
    names = [f"process {rank} (host {host})" for rank, host in enumerate("aabb")]
    monkeypatch.setattr(joining, "who", names.__getitem__)
    with pytest.raises(UserError, match=r"tokenizer is Y on process 2 \(host b\) but X on the 3 others: copy it"):
        joining.check_same("tokenizer", ["X", "X", "Y", "X"], "copy it")
    with pytest.raises(UserError, match=r"is Y on process 2 \(host b\) and process 3 \(host b\) but X on the 2 others"):
        joining.check_same("tokenizer", ["X", "X", "Y", "Y"], "copy it")
    joining.check_same("tokenizer", ["X", "X"], "copy it")


@pytest.mark.parametrize(("started", "announced"), [("001", [1, 2]), ("01", [2]), ("011", [3])])
def test_machines_that_start_another_number(started, announced, monkeypatch):
    nodes = announcement([AnnouncedNode(f"{letter}.example.org", n) for letter, n in zip("abc", announced)])
    monkeypatch.setattr(os, "environ", {**os.environ, **nodes})
    with pytest.raises(UserError, match=r"a\.example\.org.*but \S.* were announced: correct the cluster file"):
        joining._check_nodes(started, announced)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (("torch", "2.13.0+cpu"), ("torch", "2.13.0+cu128"), True),
        (("torch", "2.13.0"), ("torch", "2.12.0"), False),
        (("python", "3.11.4"), ("python", "3.11.9"), True),
        (("python", "3.11.4"), ("python", "3.12.4"), False),
    ],
)
def test_what_of_a_version_decides(one, other, alike):
    assert (joining._deciding(*one) == joining._deciding(*other)) == alike


def test_processes_that_are_started_again_do_not_meet_what_earlier_ones_left():
    """A launcher that goes on after a failure keeps its store; the next ones may also be fewer."""
    store, names = HashStore(), []
    for size in (3, 3, 2):
        with ThreadPoolExecutor(size) as threads:
            found = set(threads.map(lambda rank: joining._call(store, rank, size, 60), reversed(range(size))))  # noqa: B023
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="nothing was heard of process 1 for 1 s"):
        joining._call(store, 0, 2, 1)
