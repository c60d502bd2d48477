"""A stand-in for Slurm on one machine: its commands, as files on PATH, and the controller that runs their jobs.

Knows what slurm/ uses: sbatch with #SBATCH lines, singleton and parts that are divided by a colon; srun with one task a
node and --het-group; squeue, scancel and `scontrol requeue`. A job that is at its limit is treated as by Slurm: every
process of its steps, launchers and shells among them, gets the signal of --signal, then all are killed.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
PLACE = "SLURM_STANDIN"


def write(job):
    place = Path(os.environ[PLACE]) / f"{job['id']}.json"
    place.with_suffix(".new").write_text(json.dumps(job))
    place.with_suffix(".new").replace(place)


def jobs():
    return [json.loads(file.read_text()) for file in sorted(Path(os.environ[PLACE]).glob("*.json"))]


def change(number, **values):
    job = next(job for job in jobs() if job["id"] == int(number))
    write(job | values)


def options_of(words):
    """Options of a line and what follows them; `name value` only where the next word is no option."""
    found = {}
    while words and words[0].startswith("-"):
        name, _, value = words.pop(0).lstrip("-").partition("=")
        found[name] = value
    return found, words


def sbatch(words):
    parts = []
    while not parts or (words and words[0] == ":"):
        found, words = options_of(words[1:] if parts else words)
        parts.append(found)
    script = Path(words[0]).read_text()
    of_file, _ = options_of([word for line in re.findall(r"^#SBATCH (.*)", script, re.M) for word in shlex.split(line)])
    parts[0] = of_file | parts[0]
    assert len({part.get("job-name") for part in parts}) == len(parts), "parts of one name wait for each other for ever"
    assert "singleton" in parts[0].get("dependency", "singleton")
    number = 1 + max((job["id"] for job in jobs()), default=0)
    job = {"id": number, "parts": parts, "script": script, "words": words[1:], "state": "PENDING", "restarts": 0}
    write(job | {"environment": dict(os.environ), "folder": os.getcwd()})
    print(f"Submitted batch job {number}")


def srun(words):
    found, words = options_of(words)
    assert found["ntasks-per-node"] == "1"
    number = os.environ["SLURM_JOB_ID"]
    parts = next(job for job in jobs() if job["id"] == int(number))["parts"]
    groups = found.get("het-group", "0").split(",")
    gpus = [parts[int(group)] for group in groups]
    gpus = [part["gres"].rpartition(":")[2] for part in gpus for _ in range(int(part["nodes"]))]
    tasks = []
    for place, of_node in enumerate(gpus):
        own = {"SLURM_PROCID": str(place), "SLURM_GPUS_ON_NODE": of_node, "SLURMD_NODENAME": f"n{place}.invalid"}
        tasks.append(subprocess.Popen(words, env=os.environ | own))
        with open(Path(os.environ[PLACE]) / f"{number}.tasks", "a") as file:
            file.write(f"{tasks[-1].pid}\n")
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def squeue(words):
    found, _ = options_of(words)
    assert found["format"] == "%A"
    assert {"noheader", "user"} <= set(found)
    for job in jobs():
        if job["state"] == found["states"] and job["parts"][0]["job-name"] == found["name"]:
            print(job["id"])


def scancel(words):
    for number in words:
        change(number, state="CANCELLED")


def scontrol(words):
    assert words[0] == "requeue"
    change(words[1], state="REQUEUED")
    time.sleep(60)  # the controller ends the script that asks for it


class Controller:
    """Runs jobs as Slurm would, one after the other; `path` goes into the environment of who submits them."""

    def __init__(self, folder):
        bin_dir, self.place = folder / "bin", folder / "jobs"
        bin_dir.mkdir()
        self.place.mkdir()
        for name in COMMANDS:
            file = bin_dir / name
            file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n')
            file.chmod(0o755)
        os.environ[PLACE] = str(self.place)
        self.environment = os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}

    def states(self):
        return [job["state"] for job in jobs()]

    def run(self, at_limit=lambda job: False, save_in=300):
        """Run the next job to its end or its limit; its number, None where no job is left.

        Args:
            at_limit: says when a job has used up its time.
            save_in: seconds from the signal to the kill.
        """
        job = next((job for job in jobs() if job["state"] == "PENDING"), None)
        if job is None:
            return None
        number, name = job["id"], job["parts"][0]["job-name"]
        write(job | {"state": "RUNNING"})
        script, tasks = self.place / f"{number}.sh", self.place / f"{number}.tasks"
        script.write_text(job["script"])
        tasks.write_text("")
        own = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NAME": name, "SLURM_RESTART_COUNT": str(job["restarts"])}
        own |= {"SLURM_HET_SIZE": str(len(job["parts"]))} if len(job["parts"]) > 1 else {}
        log = job["parts"][0]["output"].replace("%x", name).replace("%j", str(number))
        with open(Path(job["folder"]) / log, "a") as output:
            words = ["bash", str(script), *job["words"]]
            batch = subprocess.Popen(
                words, cwd=job["folder"], env=job["environment"] | own, stdout=output, stderr=output
            )
        state = self._watch(batch, number, tasks, at_limit, save_in)
        if state == "REQUEUED" and "requeue" in job["parts"][0]:
            change(number, state="PENDING", restarts=job["restarts"] + 1)
        else:
            change(number, state=state)
        return number

    def _watch(self, batch, number, tasks, at_limit, save_in):
        killed_at = float("inf")
        while batch.poll() is None:
            if next(job for job in jobs() if job["id"] == number)["state"] == "REQUEUED":
                _signal(_tree([batch.pid]), signal.SIGKILL)
                batch.wait()
                return "REQUEUED"
            if killed_at == float("inf") and at_limit(number):
                _signal(_tree(map(int, tasks.read_text().split())), signal.SIGUSR1)
                killed_at = time.monotonic() + save_in
            if time.monotonic() > killed_at:
                _signal(_tree([batch.pid, *map(int, tasks.read_text().split())]), signal.SIGKILL)
                batch.wait()
                return "TIMEOUT"
            time.sleep(0.02)
        return "FAILED" if batch.returncode else "COMPLETED"


def _tree(roots):
    found = []
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found += [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    return found


def _signal(processes, number):
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
