"""Items for gpu_check.py that end in every way; their processes import nothing else."""

import os
import subprocess
import sys
import time


def machine(bench):
    return {"device": "cpu", "cores": 2, "versions": {"torch": "2.13.0"}, "commit": ""}


def fine(bench, figure=1.5):
    with open(bench.work_dir / "calls.txt", "a") as file:
        file.write(f"{figure}\n")
    return {"ms": figure}


def raising(bench):
    print("more about it")
    raise RuntimeError("an illegal memory access was encountered")


def dying(bench):
    os.abort()


def hanging(bench):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (bench.work_dir / "pid.txt").write_text(str(child.pid))
    time.sleep(600)
