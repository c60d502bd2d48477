"""slurm/chain.sh and slurm/pretrain.sbatch, whole chains of them, with a stand-in for Slurm."""

import json
import os
import re
import subprocess
import sys

import pytest
import runs
from conftest import PATIENCE, ROOT, TINY_PRESET, run_script
from slurm_standin import PLACE, Controller

SLURM = ROOT / "slurm"


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """The stand-in, with an environment for who submits jobs."""
    monkeypatch.setenv(PLACE, "")
    controller = Controller(tmp_path)
    controller.environment |= {"VENV": str(tmp_path / "venv"), "MODEL_DIR": str(tmp_path / "runs" / "bert")}
    controller.environment |= {"LOGS": str(tmp_path / "logs"), "LAUNCH_OPTIONS": "--cpu", "MIXED_PRECISION": "no"}
    return controller


def python(controller, lines='exec "$PYTHON_OF_TESTS" "$@"'):
    """What stands where make setup puts Python."""
    file = os.path.join(controller.environment["VENV"], "bin", "python")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "w") as script:
        script.write(f"#!/bin/sh\n{lines}\n")
    os.chmod(file, 0o755)
    controller.environment["PYTHON_OF_TESTS"] = sys.executable


def submit(controller, *arguments, command=("slurm/chain.sh",), **variables):
    environment = controller.environment | {name: str(value) for name, value in variables.items()}
    line = [*command, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def logs(tmp_path):
    return {file.name: file.read_text() for file in sorted((tmp_path / "logs").iterdir())}


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """Two phases under one schedule, as recipes/finbert_base.yaml; makes the file for so many steps of each."""

    def written(first, second, save_steps):
        (tmp_path / "presets.json").write_text(json.dumps({"bert-test": TINY_PRESET}))
        settings = {"parameter_file": str(tmp_path / "presets.json"), "model_type": "bert-test", "tracker": "none"}
        settings |= {"phase_steps": [first, second], "sequence_length": [32, 64], "batch_size": [4, 2]}
        settings |= {"hidden_dropout": 0.1, "save_steps": save_steps, "logging_steps": 50, "eval_rows": 0}
        (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
        return tmp_path / "recipe.yaml"

    return written


def past(run_dir, step):
    """The limit of a job: a checkpoint of this step or a later one is there."""
    return lambda job: runs.newest_step(run_dir) >= step


@pytest.fixture
def whole(tmp_path, store_dir):
    """Weights of a run that nothing ends."""

    def trained(recipe):
        given = ["--config", recipe, "--dataset_dir", store_dir, "--model_dir", tmp_path / "whole"]
        run_script("run_pretraining.py", *given)
        return runs.weights(tmp_path / "whole")

    return trained


@pytest.mark.slow
def test_a_chain_ends_at_the_bits_of_one_run(controller, tmp_path, store_dir, recipe, whole):
    """One job is ended at its limit with the next one waiting, one without, and one is left when all is done."""
    python(controller)
    file, run_dir = recipe(120, 40, 20), tmp_path / "runs" / "bert"
    said = submit(controller, JOBS=2, NODES="1x1", RECIPE=file, DATASET_DIR=store_dir, JOB_NAME="chain")
    assert said.count("Submitted") == 2
    assert controller.run(past(run_dir, 20)) == 1
    assert controller.states() == ["FAILED", "PENDING"]  # with 75, which says that it goes on
    assert controller.run(past(run_dir, 120)) == 2
    assert controller.states() == ["FAILED", "PENDING"]  # back in the queue
    submit(controller, JOBS=1, NODES="1x1", RECIPE=file, DATASET_DIR=store_dir, JOB_NAME="chain")
    assert controller.run() == 2
    assert controller.states() == ["FAILED", "COMPLETED", "CANCELLED"]
    assert controller.run() is None

    assert runs.same_bits(runs.weights(run_dir), whole(file))
    first, second = logs(tmp_path).values()
    assert list(logs(tmp_path)) == ["chain-1.txt", "chain-2.txt"]
    assert re.search("stopped by SIGUSR1 .*the next job of the chain goes on", first, re.S)
    assert re.search("attempt 1.*back into the queue.*attempt 2", second, re.S)
    assert "is finished" in submit(controller, JOBS=2)
    assert len(controller.states()) == 3
    weights = next((run_dir / "final").glob("*.safetensors"))
    assert weights.stat().st_mode & 0o777 == 0o660  # as the umask of the job says


@pytest.mark.slow
def test_show_900_and_100_steps_in_a_chain(controller, tmp_path, store_dir, recipe, whole):
    """The phases of FinBERT a thousand times shorter; one of the jobs does not come to save and is killed."""
    python(controller)
    file, run_dir = recipe(900, 100, 100), tmp_path / "runs" / "bert"
    submit(controller, JOBS=6, NODES="1x1", RECIPE=file, DATASET_DIR=store_dir)
    for step, save_in in ((100, 300), (400, 0), (700, 300), (900, 300)):
        controller.run(past(run_dir, step), save_in)
    controller.run()
    assert controller.states() == ["FAILED", "TIMEOUT", "FAILED", "FAILED", "COMPLETED", "CANCELLED"]
    assert runs.same_bits(runs.weights(run_dir), whole(file))


@pytest.mark.slow
def test_unequal_nodes_in_a_chain(controller, tmp_path, store_dir, recipe, whole):
    """A heterogeneous job of 2 and 1 processes, ended once, against one process."""
    python(controller)
    file, run_dir = recipe(60, 20, 10), tmp_path / "runs" / "bert"
    submit(controller, JOBS=2, NODES="1x2 1x1", RECIPE=file, DATASET_DIR=store_dir, MAIN_HOST="127.0.0.1")
    controller.run(past(run_dir, 10))
    controller.run()
    assert controller.states() == ["FAILED", "COMPLETED"], logs(tmp_path)
    assert runs.largest_difference(runs.weights(run_dir), whole(file)) < 1e-5


# ---- what it tells the launcher, and what follows from how that ends -------------------------------------------------


def test_nodes_are_told_as_slurm_gave_them(controller, tmp_path):
    """Ranks in the order of the parts, a process for each GPU, another port for another job."""
    python(controller)
    controller.environment["LAUNCH_OPTIONS"] = "--cpu --dry_run"
    submit(controller, JOBS=2, NODES="1xa100:3 2x1", MAIN_HOST="10.0.0.5", NETWORK_INTERFACE="ib0")
    controller.run()
    (log,) = logs(tmp_path).values()
    for line in (r"node 0 +n0.invalid +3 CPU processes +ranks 0 to 2", r"node 2 +n2.invalid +1 CPU process +rank 4"):
        assert re.search(line, log), log
    assert "5 processes, meeting at 10.0.0.5:20001" in log
    assert len(re.findall("NCCL_SOCKET_IFNAME=ib0", log)) == 3
    assert controller.states() == ["COMPLETED", "CANCELLED"]  # it ended with 0: there is nothing more to do
    first, second, *_ = (json.loads(file.read_text()) for file in sorted(controller.place.glob("*.json")))
    assert [part["cpus-per-task"] for part in first["parts"]] == ["18", "6"]
    assert first["parts"][0]["job-name"] == second["parts"][0]["job-name"] != first["parts"][1]["job-name"]


def test_a_job_that_fails_is_not_repeated_for_ever(controller, tmp_path):
    """The next of the chain tries again; the last does not go back into the queue."""
    python(controller, "echo went wrong >&2; exit 3")
    submit(controller, JOBS=2, NODES="1x1")
    controller.run()
    assert controller.states() == ["FAILED", "PENDING"]
    controller.run()
    assert controller.states() == ["FAILED", "FAILED"]
    for log in logs(tmp_path).values():
        assert log.index("went wrong") < log.index("ended with exit code 3")


def test_a_job_of_a_finished_run_starts_nothing(controller, tmp_path):
    python(controller, "touch started")
    submit(controller, JOBS=2, NODES="1x1")
    (tmp_path / "runs" / "bert" / "final").mkdir(parents=True)
    controller.run()
    assert controller.states() == ["COMPLETED", "CANCELLED"]
    (log,) = logs(tmp_path).values()
    assert "is finished" in log
    assert not (ROOT / "started").exists()


def test_an_image_takes_the_place_of_the_environment(controller, tmp_path):
    (tmp_path / "bin" / "apptainer").write_text('#!/bin/sh\necho apptainer "$@"\n')
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    submit(controller, JOBS=1, NODES="1x1", APPTAINER_IMAGE="/images/lmscripts.sif")
    controller.run()
    (log,) = logs(tmp_path).values()
    here = f"--bind {ROOT} --env PYTHONPATH={ROOT}"
    assert f"apptainer exec --nv {here} /images/lmscripts.sif python scripts/launch.py --cluster" in log


def test_every_variable_is_explained():
    batch, chain = (SLURM / "pretrain.sbatch").read_text(), (SLURM / "chain.sh").read_text()
    set_in_batch = re.findall(r'^(?:export )?([A-Z_]+)="\$\{\1:-[^}]*\}" *(#.+)?$', batch, re.M)
    assert len(set_in_batch) >= 10
    assert all(comment for _, comment in set_in_batch), set_in_batch
    for name in re.findall(r'^([A-Z_]+)="\$\{\1:-', chain, re.M):
        assert re.search(rf"^#   {name} |\b{name}\b.* \.\.\.", chain, re.M), name
    directives = re.findall(r"^#+SBATCH --([\w-]+)", batch, re.M)
    assert {"signal", "requeue", "open-mode", "output", "time", "gres"} <= set(directives)
