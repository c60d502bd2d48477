import os
import signal
from types import SimpleNamespace

import pytest
import torch

from lmscripts.errors import UserError
from lmscripts.options.checks import parse_duration
from lmscripts.training import joining, processes
from lmscripts.training.processes import StopRequest, choose_precision, process_shares
from lmscripts.training.state import TrainingState


def test_equal_shares_by_default():
    assert process_shares(32, [0, 0, 0, 0]) == [8, 8, 8, 8]
    assert process_shares(10, [0, 0, 1]) == [3, 4, 3]


def test_node_map_is_divided_over_the_processes_of_each_node():
    assert process_shares(256, [0, 1, 2, 3], {0: 80, 1: 80, 2: 48, 3: 48}) == [80, 80, 48, 48]
    assert process_shares(256, [0, 0, 0, 1, 2, 2], {0: 100, 1: 100, 2: 56}) == [33, 34, 33, 100, 28, 28]
    # 100 rows over 3 processes: none is lost, as the older int() lost one.
    assert sum(process_shares(100, [0, 0, 0], {0: 100})) == 100


def test_node_map_follows_another_batch_size():
    assert process_shares(512, [0, 1, 2, 3], {0: 80, 1: 80, 2: 48, 3: 48}) == [160, 160, 96, 96]


def test_node_map_for_other_nodes_is_refused():
    with pytest.raises(UserError, match=r"\[0, 1\].*\[0\]"):
        process_shares(256, [0, 0], {0: 100, 1: 156})


def test_weights():
    assert process_shares(32, [0, 0], weights=[3, 1]) == [24, 8]
    assert process_shares(3, [0, 0, 0], weights=[1, 0, 2]) == [1, 0, 2]
    with pytest.raises(UserError, match="3 process shares were given for 2"):
        process_shares(32, [0, 0], weights=[1, 1, 1])


def test_precision(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert choose_precision(None, 0, False) is None
    assert choose_precision(None, 1, False) == "fp16"
    assert choose_precision(None, 0, True) == "bf16"
    assert choose_precision(2, 0, False) == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision(0, 1, False) == "bf16"
    with pytest.raises(UserError, match="bf16"):
        choose_precision(1, 0, False)
    with pytest.raises(UserError, match="got 4"):
        choose_precision(4, 0, False)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("2m", 120), ("1h30m", 5400), ("2d", 172800)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:30", "-5", "3 h"])
def test_wrong_durations(text):
    with pytest.raises(UserError, match="90m"):
        parse_duration(text)


def test_stop_request_remembers_signals_and_time():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    earlier = {number: signal.getsignal(number) for number in numbers}
    try:
        stop = StopRequest()
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop()
        assert stop.reason == "SIGUSR1"
        late = StopRequest(deadline=0.0)
        assert late()
        assert late.reason == "--max_time"
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("parent", "exported", "is_one"),
    [
        (["python", "/venv/bin/accelerate", "launch"], True, True),
        (["/venv/bin/torchrun", "x.py"], True, True),
        (["bash", "-c", "nohup"], True, False),
        (["python", "/venv/bin/accelerate", "launch"], False, False),
    ],
)
def test_a_shell_that_exports_the_variables_of_a_launcher_is_none(parent, exported, is_one, monkeypatch):
    """Under nohup it ends before the run does."""
    for name in joining._OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if exported:
        monkeypatch.setenv(joining._OF_LAUNCHERS[0], "no")
    monkeypatch.setattr(joining.psutil.Process, "cmdline", lambda self: parent)
    assert joining.launcher() == (os.getppid() if is_one else None)


def test_five_steps_without_a_finite_gradient_stop_the_run():
    state = TrainingState()
    bad = torch.tensor(float("nan"))
    for _ in range(4):
        assert not state.judge(bad, has_scaler=False)
    assert state.judge(torch.tensor(1.0), has_scaler=False)
    assert state.nonfinite_streak == 0
    assert state.skipped_steps == 4
    for _ in range(4):
        state.judge(torch.tensor(float("inf")), has_scaler=False)
    with pytest.raises(UserError, match="5 steps in a row"):
        state.judge(bad, has_scaler=False)


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("launch --cpu --num_processes 2 scripts/run.py --num_processes 9", 2),
        ("launch --num-processes=3 scripts/run.py", 3),
        ("launch --config_file {file} scripts/run.py", 4),
        ("launch --num_processes 1 --config_file={file} scripts/run.py", 1),
        ("launch --config_file absent.yaml scripts/run.py", 1),
        ("launch scripts/run.py", 1),
    ],
)
def test_a_launcher_that_started_fewer_than_asked(line, asked, tmp_path, monkeypatch):
    """accelerate launch does so with --cpu, and says nothing."""
    (tmp_path / "one.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n", encoding="utf-8")
    words = ["python", "-m", "accelerate.commands.accelerate_cli", *line.format(file=tmp_path / "one.yaml").split()]
    monkeypatch.setattr(joining.psutil, "Process", lambda number: SimpleNamespace(cmdline=lambda: words))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if asked == 1:
        assert joining.asked_of_launcher() == 1
        return
    with pytest.raises(UserError, match=f"was asked for {asked} processes and started one"):
        processes.start_processes()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")  # started from a shell of somebody who launches
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert joining.asked_of_launcher() == 1
