"""Trackers: checked by name, begun with all options, gone on with in the same run, and never the end of one."""

import importlib.util
import json
import signal
import sqlite3
import sys
from contextlib import closing
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import PartialState, tracking
from conftest import run_script

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
    mlflow.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
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


def test_signals_still_stop_the_run_after_a_step(tmp_path, fakes, monkeypatch):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    before = signal.getsignal(signal.SIGTERM)
    start = sys.modules["wandb"].init
    takes = lambda **given: (signal.signal(signal.SIGTERM, signal.SIG_IGN), start(**given))[1]  # noqa: E731
    monkeypatch.setattr(sys.modules["wandb"], "init", takes)
    begin(tmp_path, "wandb")
    assert signal.getsignal(signal.SIGTERM) == before


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
    assert calls == [0, 50]


def test_a_tracker_that_does_not_start_is_refused_or_done_without(tmp_path, fakes, monkeypatch):
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")

    def fails(**_):
        raise RuntimeError("no key\nanywhere")

    monkeypatch.setattr(sys.modules["wandb"], "init", fails)
    with pytest.raises(UserError, match=r"wandb does not start \(RuntimeError: no key anywhere\): set it up"):
        begin(tmp_path, "wandb", "mlflow")
    assert not [*tmp_path.iterdir()]  # what was tried is tried again with the same line
    (tmp_path / "config.yaml").write_text(OPTIONS, encoding="utf-8")
    accelerator = begin(tmp_path, "wandb", "mlflow", continued=True)
    assert [tracker.name for tracker in accelerator.trackers] == ["mlflow"]
    assert "the run goes on without it" in accelerator.said[0]


@pytest.mark.parametrize(("name", "told_again"), [("mlflow", [8, 8]), ("wandb", [6, 8, 8]), ("tensorboard", [6, 8, 8])])
def test_after_a_kill_what_a_tracker_has_is_not_told_twice(name, told_again, tmp_path, monkeypatch):
    told = []
    tracker = SimpleNamespace(name=name, log=lambda values, step: told.append((step, *values)))
    monkeypatch.setattr(trackers, "begin", lambda accelerator, *_: accelerator.trackers.append(tracker))
    for step, continued in ((0, False), (4, True)):
        told.clear()
        report = log.Reporter(Begun(name), tmp_path, step, 12, continued)
        for number in range(step + 2, 11 if continued else 9, 2):
            report(number, {"loss": number / 2}, "")
            if number == 8:
                report(number, {"eval_loss": 1.0}, "", {"Validation loss": 1.0}, 1)
    ours = [step for step, value in told if value != "Validation loss"]
    assert ours == [*told_again, 10]
    assert ((1, "Validation loss") in told) == (name == "tensorboard")
    assert [record["step"] for record in log.read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 8, 10]


# ---- real ones, offline ------------------------------------------------------------------------------------------

SMALL = "--model_type bert-tiny --n_layer 1 --n_embd 32 --n_head 2 --batch_size 4 --sequence_length 32"
SMALL += " --max_steps 6 --save_steps 2 --logging_steps 1 --eval_rows 4"


def run_twice(store_dir, tmp_path, name):
    """A run that stops at its fourth step and goes on; what both said."""
    run_dir, said = tmp_path / "small", ""
    for more in (["--stop_at_step", 4], ["--do_continue"]):
        words = ["--dataset_dir", store_dir, "--model_dir", run_dir, *SMALL.split(), *more, "--tracker", "tensorboard"]
        done = run_script("run_pretraining.py", *words, name, cwd=tmp_path)
        said += done.stdout + done.stderr
    assert "the tracker" not in said
    assert len([*run_dir.glob("tensorboard/events*")]) == 2
    return run_dir


def test_trackio_has_one_run_with_every_step_and_option(store_dir, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    run_twice(store_dir, tmp_path, "trackio")
    with closing(sqlite3.connect(tmp_path / "kept" / "lmscripts.db")) as kept:
        rows = kept.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        config = json.loads(kept.execute("select config from configs").fetchone()[0])
    assert len({run_id for run_id, *_ in rows}) == 1
    assert {run_name for _, run_name, *_ in rows} == {"small"}
    assert [step for _, _, step, metrics in rows if "loss" in json.loads(metrics)] == [1, 2, 3, 4, 5, 6]
    assert (config["tracker"], config["n_embd"], config["seed"]) == ("tensorboard, trackio", 32, 42)


def test_wandb_has_both_parts_of_one_run_offline(store_dir, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = run_twice(store_dir, tmp_path, "wandb")
    run_id = json.loads((run_dir / "trackers.json").read_text(encoding="utf-8"))["wandb"]
    kept = sorted(run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    first, second = ([*wandb_records(file.read_bytes())] for file in kept)
    assert [step for record in first for step in steps_of(record)] == [1, 2, 3, 4]
    assert [step for record in second for step in steps_of(record)] == [5, 6]
    for records in (first, second):
        (run,) = (record.run for record in records if record.HasField("run"))
        assert (run.run_id, run.project, run.display_name) == (run_id, "lmscripts", "small")
        options = {update.key: json.loads(update.value_json) for record in records for update in record.config.update}
        assert (options["tracker"], options["n_embd"], options["seed"]) == ("tensorboard, wandb", 32, 42)


def wandb_records(data):
    """Records of a file of wandb of less than 32 KiB: a log of LevelDB (7 bytes before each) of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert len(data) < 2**15
    at = 7
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        yield Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size


def steps_of(record):
    """The steps in whose line a training loss stands."""
    items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
    return [int(items["_step"])] if "loss" in items else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "offline"),
    [
        ("mlflow", {"MLFLOW_TRACKING_URI": "file:kept", "MLFLOW_ALLOW_FILE_STORE": "true"}),
        ("swanlab", {"SWANLAB_MODE": "offline"}),
        ("comet_ml", {"COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": "kept"}),
        ("clearml", {"CLEARML_OFFLINE_MODE": "1"}),
        ("dvclive", {}),
        ("aim", {}),
    ],
)
def test_others_go_on_in_their_run(name, offline, store_dir, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no package {name}")
    for key, value in offline.items():
        monkeypatch.setenv(key, value)
    run_dir = run_twice(store_dir, tmp_path, name)
    run_id = json.loads((run_dir / "trackers.json").read_text(encoding="utf-8"))[name]
    if name == "mlflow":
        (metrics,) = tmp_path.glob(f"kept/*/{run_id}/metrics/loss")
        assert [line.split()[2] for line in metrics.read_text(encoding="utf-8").splitlines()] == [*"123456"]
    elif name == "dvclive":
        (metrics,) = run_dir.glob("dvclive/plots/metrics/loss.tsv")
        assert [line.split()[0] for line in metrics.read_text(encoding="utf-8").splitlines()[1:]] == [*"123456"]
