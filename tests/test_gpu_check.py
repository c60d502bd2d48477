"""benchmarks/gpu_check.py: what ends one item ends no other, and whatever was measured makes a table."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings
from multiprocessing import get_context

import psutil
import pytest
import torch
from conftest import PATIENCE, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
import gpu_table
import watching
from gpu_check import Bench, Item
from gpu_items import dying, fine, hanging, machine, raising

MACHINE = {"item": "machine", "seconds": 3.0, "estimate": 20, "status": "ok", "device": "NVIDIA H200", "cores": 16}
MACHINE |= {"memory_gib": 139.8, "capability": "9.0", "cuda": "13.0", "product_tflops": 790.4, "commit": "abc1234"}
MACHINE |= {"versions": {"torch": "2.11.0"}}


def calls(folder):
    return (folder / "calls.txt").read_text().split()


def test_what_ends_one_item_ends_no_other(tmp_path):
    results = []
    todo = [Item("a", 1, raising), Item("b", 1, dying), Item("c", 9000, fine), Item("d", 1, fine, {"figure": 2.5})]
    gpu_check.run_items(todo, Bench(tmp_path), 60.0, results.append, ["gpu_items"])
    assert [(each["item"], each["status"]) for each in results] == [
        *(("a", "failed"), ("b", "failed"), ("c", "skipped"), ("d", "ok"))
    ]
    assert "illegal memory access" in results[0]["error"]
    assert "more about it" in results[0]["error"]  # the last that it printed
    assert str(-signal.SIGABRT) in results[1]["error"]
    assert results[2]["estimate"] == 9000
    assert results[3]["ms"] == 2.5
    assert calls(tmp_path) == ["2.5"]


def test_an_item_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    for patience in (2, 10, 50, 250):  # until it had the time to begin
        result = gpu_check.run_item(get_context("forkserver"), Item("a", 1, hanging), Bench(tmp_path), patience)
        assert result["status"] == "late"
        if (tmp_path / "pid.txt").exists():
            break
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid.txt").read_text())).wait(PATIENCE)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run main with items of this file on an output; gives its results."""
    before = signal.getsignal(signal.SIGTERM)
    for name in (
        "PYTHONPATH",
        "HF_HUB_OFFLINE",
        "TOKENIZERS_PARALLELISM",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "PYTHONWARNINGS",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(gpu_check, "PRELOADED", [])
    output = tmp_path / "gpu.jsonl"

    def run(*todo):
        monkeypatch.setattr(gpu_check, "items", lambda smoke: [Item("machine", 1, machine), *todo])
        monkeypatch.setattr(sys, "argv", ["", "--output_file", str(output), "--work_dir", str(tmp_path)])
        gpu_check.main()
        return gpu_table.read(output)

    yield run
    signal.signal(signal.SIGTERM, before)


def test_the_same_command_again_does_what_is_missing(tmp_path, command):
    first, second = Item("first", 1, fine, {"figure": 1}), Item("second", 1, fine, {"figure": 2})
    assert [each["status"] for each in command(first, Item("second", 1, raising))] == ["ok", "ok", "failed"]
    with open(tmp_path / "gpu.jsonl", "a") as file:
        file.write('{"item": "second", "sta')  # cut off
    results = {each["item"]: each for each in command(first, second)}
    assert results["second"]["ms"] == 2
    assert results["machine"]["planned"] == ["machine", "first", "second"]
    assert calls(tmp_path) == ["1", "2"]


def test_results_of_two_machines_are_not_mixed(tmp_path, command):
    (tmp_path / "gpu.jsonl").write_text(json.dumps(MACHINE) + "\n")
    with pytest.raises(SystemExit, match="is of NVIDIA H200, this is cpu: name another"):
        command(Item("first", 1, fine))
    assert not (tmp_path / "calls.txt").exists()


def test_a_run_that_was_cut_off_makes_a_table(tmp_path):
    speed = {"item": "bert T=512 B=128 eager", "seconds": 20.0, "estimate": 20, "status": "ok", "ms_per_step": 98.25}
    speed |= {"ms_from": 97.0, "ms_to": 99.0, "tokens_per_second": 667000.4, "mfu": 0.371, "gpu_memory_gib": 31.25}
    speed |= {"idle": 0.034, "waiting_for_data": 0.001, "synchronisations": 2.0, "synchronised_at": ["a.py:3 (6)"]}
    speed |= {"busy_ms": 95.0, "launched": 1234.0, "kernels": [["gemm<a | b>", 40.5, 72.0]]}
    late = {"item": "slow one", "seconds": 9.0, "estimate": 2, "status": "late", "error": "not done after 9 s"}
    skipped = {"item": "long one", "status": "skipped", "estimate": 70, "left": 12}
    loss = {"item": "loss", "seconds": 8.0, "estimate": 8, "status": "ok", "ms": 14.23456, "same_bits": True}
    planned = {"planned": ["machine", speed["item"], "slow one", "long one", "loss", "torn", "last"]}
    lines = [json.dumps(each) for each in (MACHINE | planned, speed, late, skipped, loss)]
    output = tmp_path / "gpu.jsonl"
    output.write_text("\n".join([*lines, '{"item": "torn", "ms": 3']))
    page = gpu_table.page(gpu_table.read(output))
    assert page.startswith("NVIDIA H200, 140 GiB, CUDA 13.0, a bf16 product of 8,192 x 8,192 reaches 790 TFLOP/s")
    assert "| bert T=512 B=128 eager | 98.2 (97.0 to 99.0) | 667,000 | 37.1% | 31.2 | 3% | 0.1% | 2.0 |  |\n" in page
    assert "| loss | ms 14.23, same bits True |" in page
    assert "| slow one | late | not done after 9 s |" in page
    assert "| long one | skipped | about 70 s, 12 s were left |" in page
    assert all(f"| {name} | not reached |  |" in page for name in ("torn", "last"))
    assert "| `gemm<a \\| b>` | 40.500 | 72.0 |" in page
    assert "The host waits at a.py:3 (6)." in page
    assert gpu_table.page([loss]).startswith("What machine this was is not known.")  # cut off by its first line


def test_time_in_which_kernels_run_together_counts_once():
    class Profile:
        def export_chrome_trace(self, file):
            times = {"a": [(0, 3000), (10_000, 3000)], "b": [(2000, 3000)]}
            events = [dict(name=n, cat="kernel", ts=ts, dur=d) for n, all_ in times.items() for ts, d in all_]
            events += [{"name": "host", "cat": "cuda_runtime", "ts": 0, "dur": 90_000}, {"name": "no time", "ph": "M"}]
            with open(file, "w") as out:
                json.dump({"traceEvents": events}, out)

    found = watching.kernels(Profile(), on_gpu=True)
    assert found["busy_ms"] == pytest.approx(8 / watching.STEPS)
    assert found["launched"] == 1.0
    assert found["kernels"] == [["a", 2.0, pytest.approx(2 / 3)], ["b", 1.0, pytest.approx(1 / 3)]]


def test_synchronisations_of_the_host_are_counted_by_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    watch = object.__new__(watching._Watch)
    watch.on_gpu, watch.seen, watch.places = True, {}, collections.Counter()
    before = warnings.showwarning
    watch._count_synchronisations(True)
    for number in range(2 * watching.STEPS):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn(f"another {number}, of synchronizing nothing", stacklevel=1)
    watch._count_synchronisations(False)
    assert modes == ["warn", "default"]
    assert watch.seen["synchronisations"] == 2.0
    place, times = watch.seen["synchronised_at"][0].split()
    assert place.startswith("tests/test_gpu_check.py:")
    assert times == f"({2 * watching.STEPS})"
    assert warnings.showwarning is before


@pytest.mark.slow
def test_smoke(tmp_path):
    output = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--smoke", "--minutes", "60"]
    command += ["--output_file", str(output), "--work_dir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr
    results = {each["item"]: each for each in gpu_table.read(output)}
    assert [*results] == [item.name for item in gpu_check.items(True)]
    assert {each["status"] for each in results.values()} == {"ok"}, results
    speeds = [each for each in results.values() if "ms_per_step" in each]
    assert len(speeds) == 4
    for each in speeds:
        assert each["ms_per_step"] > 0
        assert 0 <= each["waiting_for_data"] < 1
        assert len(each["kernels"]) == 20
    saved = speeds[0]
    assert saved["checkpoint_whole_after"] > 0
    assert results["electra-tiny no --deterministic stopped and continued"]["same_bits"]
    assert "not reached" not in gpu_table.page([*results.values()])
