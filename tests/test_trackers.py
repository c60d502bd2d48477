"""Trackers: checked by name, begun with all options, gone on with in the same run, and never the end of one."""

import importlib.util
import json
import sqlite3
import sys
from contextlib import closing
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import PartialState, tracking
from conftest import ROOT, SAMPLE, launch, run_script

from lmscripts.errors import UserError
from lmscripts.training import log, trackers

OPTIONS = "seed: 7\ndataset_dir: [one, two]\nmax_time: null\ntracker: [wandb]\n"


def test_a_tracker_is_known_to_accelerate_and_its_package_is_there(monkeypatch):
    trackers.check_trackers(["tensorboard"])
    trackers.check_trackers(["none"])
    with pytest.raises(UserError, match=r"must be some of aim, .*or none, not wanbd; did you mean wandb\?"):
        trackers.check_trackers(["tensorboard", "wanbd"])
    with pytest.raises(UserError, match="none is for no tracker"):
        trackers.check_trackers(["tensorboard", "none"])
    monkeypatch.setattr(tracking, "_available_trackers", ["mlflow"])
    trackers.check_trackers(["tensorboard", "mlflow"])
    with pytest.raises(UserError, match="--tracker aim needs the package aim: pip install aim"):
        trackers.check_trackers(["mlflow", "aim"])
    monkeypatch.setenv("RANK", "1")  # which shows nothing
    trackers.check_trackers(["aim"])


@pytest.mark.parametrize("name", ["run_pretraining.py", "finetune_classifier.py", "train_policy.py"])
def test_training_scripts_refuse_before_they_read(name, tmp_path):
    given = {
        "run_pretraining.py": ["--model_dir", tmp_path / "run", "--model_type", "bert-tiny", "--dataset_dir", "none"],
        "finetune_classifier.py": [tmp_path / "none.csv", "--output_dir", tmp_path],
        "train_policy.py": ["--training-data", "none", "--training-batch-size", 4, "--output-prefix", tmp_path],
    }
    done = run_script(name, *given[name], "--tracker", "mlflo", "wandb", check=False)
    assert done.returncode == 2
    assert "not mlflo; did you mean mlflow?" in done.stderr
    assert not [*tmp_path.iterdir()]


class FakeRun:
    """What wandb.init and mlflow.start_run give."""

    def __init__(self, known):
        self.seen, self.info, self.told = known, SimpleNamespace(run_id=known.get("run_id") or "made there"), []

    def log(self, values, step):
        if self.seen.get("broken"):
            raise ConnectionError("no such host")
        self.told.append((step, values))

    finish = log  # which gets no step, and fails: as a run that cannot be sent


class Begun:
    """The main process, and what was said there."""

    is_main_process, logging_dir = True, None

    def __init__(self, *names):
        self.log_with, self.trackers, self.said = names, [], []

    def print(self, text, **_):
        self.said.append(text)


@pytest.fixture
def fakes(monkeypatch):
    """Packages by name, each of which remembers how it was begun, and with which config."""
    PartialState(cpu=True)  # which accelerate's own log wants
    begun = {"wandb": [], "mlflow": []}
    configs = {"wandb": [], "mlflow": []}

    def start(name):
        def started(**given):
            begun[name].append(FakeRun(given))
            return begun[name][-1]

        return started

    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    wandb.init, mlflow.start_run = start("wandb"), start("mlflow")
    wandb.config = SimpleNamespace(update=lambda values, **_: configs["wandb"].append(values))
    mlflow.search_experiments = lambda **_: []
    mlflow.create_experiment = lambda name, **_: name
    mlflow.utils = SimpleNamespace(
        validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    )
    mlflow.log_params = configs["mlflow"].append
    mlflow.log_metrics = lambda values, step: begun["mlflow"][-1].log(values, step)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    return SimpleNamespace(begun=begun, configs=configs)


def begin(run_dir, *names, continued=False):
    accelerator = Begun(*names)
    trackers.begin(accelerator, run_dir, continued)
    return accelerator


def test_a_run_that_goes_on_is_the_same_run(tmp_path, fakes):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    for continued in (False, True, True, False):
        begin(tmp_path, "wandb", "mlflow", continued=continued)
    first, second, third, anew = (run.seen for run in fakes.begun["wandb"])
    assert first == second == third
    assert (first["project"], first["name"], first["resume"]) == ("lmscripts", tmp_path.name, "allow")
    assert first["dir"] == str(tmp_path)
    assert anew["id"] != first["id"]
    assert [run.seen["run_id"] for run in fakes.begun["mlflow"]] == [None, "made there", "made there", None]
    expected = {"seed": 7, "dataset_dir": "one, two", "max_time": None, "tracker": "wandb"}
    assert fakes.configs == {"wandb": [expected] * 4, "mlflow": [expected] * 2}
    assert json.loads((tmp_path / "trackers.json").read_text(encoding="utf-8")) == {
        "wandb": anew["id"],
        "mlflow": "made there",
    }


def test_the_project_is_what_the_options_or_the_tracker_say(tmp_path, fakes, monkeypatch):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    begin(tmp_path, "wandb")
    (tmp_path / "config.yaml").write_text(OPTIONS + "tracker_project: ours\n", encoding="utf-8")
    begin(tmp_path, "wandb")
    assert [run.seen["project"] for run in fakes.begun["wandb"]] == ["theirs", "ours"]


def test_a_damaged_note_or_one_of_another_tracker_costs_nothing(tmp_path, fakes):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    (tmp_path / "trackers.json").write_text('{"wandb": "a', encoding="utf-8")
    begin(tmp_path, "wandb", continued=True)
    begin(tmp_path, "mlflow", continued=True)
    begin(tmp_path, "wandb", continued=True)
    assert fakes.begun["wandb"][0].seen["id"] == fakes.begun["wandb"][1].seen["id"]


def test_a_tracker_that_fails_warns_once_and_the_others_are_told(tmp_path, fakes):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    accelerator = begin(tmp_path, "wandb", "mlflow")
    fakes.begun["wandb"][0].seen["broken"] = True
    for step in (1, 2):
        for tracker in accelerator.trackers:
            tracker.log({"loss": 1.0}, step=step)
    for tracker in accelerator.trackers[:1]:
        tracker.finish()
    assert [step for step, _ in fakes.begun["mlflow"][0].told] == [1, 2]
    assert len(accelerator.said) == 1
    assert "the tracker wandb (ConnectionError: no such host); training goes on" in accelerator.said[0]


def test_a_tracker_that_took_long_to_fail_is_left_alone_for_a_while(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])

    def fails(step):
        calls.append(step)
        now[0] += 10
        raise TimeoutError

    called = trackers._harmless("far", fails, lambda *_, **__: None, set())
    for step in range(100):
        called(step)
        now[0] += 10
    assert calls == [0, 51]


def test_a_tracker_that_does_not_start_is_refused_or_done_without(tmp_path, fakes, monkeypatch):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")

    def fails(**_):
        raise RuntimeError("no key\nanywhere")

    monkeypatch.setattr(sys.modules["wandb"], "init", fails)
    with pytest.raises(UserError, match=r"wandb does not start \(RuntimeError: no key anywhere\): set it up"):
        begin(tmp_path, "wandb", "mlflow")
    accelerator = begin(tmp_path, "wandb", "mlflow", continued=True)
    assert [tracker.name for tracker in accelerator.trackers] == ["mlflow"]
    assert "the run goes on without it" in accelerator.said[0]


def test_after_a_kill_no_number_is_told_twice(tmp_path, fakes):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    for step, continued in ((0, False), (4, True)):
        report = log.Reporter(Begun("mlflow"), tmp_path, step, 12, continued)
        for number in range(step + 2, 11 if continued else 9, 2):
            report(number, {"loss": number / 2}, "")
            if number == 8:
                report(number, {"eval_loss": 1.0}, "", {"Validation loss": 1.0}, 1)
    first, second = ([step for step, _ in run.told] for run in fakes.begun["mlflow"])
    assert first == [2, 4, 6, 8, 8]
    assert second == [10]
    assert [record["step"] for record in log.read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 8, 10]
