"""Two processes, of which one has half the speed: even shares, and --balance auto, in turn.

python benchmarks/balance.py --store store --model_type bert-tiny --pairs 5

The slow one is stopped half of the time. With --sleep, both sleep for every row instead, the slow one twice as long: as
two GPUs would take their time, on a machine whose cores have much else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
MEASURED = 25  # steps after which the rows are divided anew
TURN = 0.01  # seconds that the slow process runs, and is stopped


def second_of(launcher: int) -> int | None:
    """The process number of rank 1, once it is there."""
    with suppress(psutil.Error):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                if process.environ().get("RANK") == "1":
                    return process.pid
    return None


def one_run(given: argparse.Namespace, balance: str, folder: str) -> tuple[float, list[float]]:
    """Steps per second after the measuring, and the share of the time that each process waited."""
    run_dir = Path(folder, balance)
    words = ["--dataset_dir", given.store, "--model_type", given.model_type, "--model_dir", run_dir]
    words += ["--max_steps", given.steps, "--batch_size", given.rows, "--sequence_length", given.length]
    words += ["--micro_batch_size", given.micro_batch_size, "--warmup_steps", 1, "--save_steps", 10**9]
    words += ["--logging_steps", 5, "--eval_rows", 0, "--tracker", "none", "--balance", balance]
    script = ROOT / "scripts" / "run_pretraining.py"
    own = {**os.environ, "SLOWED": f"{given.sleep} {2 * given.sleep}"}
    words = [*([ROOT / "tests" / "slowed.py"] if given.sleep else []), script, *words]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *words]
    launcher = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own)
    slow = None
    while launcher.poll() is None:
        slow = slow or (None if given.sleep else second_of(launcher.pid))
        for number in (signal.SIGSTOP, signal.SIGCONT):
            with suppress(ProcessLookupError):
                if slow:
                    os.kill(slow, number)
            time.sleep(TURN)
    if launcher.returncode:
        raise SystemExit(f"the run ended with {launcher.returncode}: {' '.join(map(str, command))}")
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steady = [each for each in records if "tokens_per_second" in each and each["step"] > MEASURED + 5]
    tokens = (steady[-1]["tokens"] - steady[0]["tokens"]) / (steady[-1]["step"] - steady[0]["step"])
    waits = [statistics.mean(each[f"waiting_{rank}"] for each in steady) for rank in (0, 1)]
    return statistics.median(each["tokens_per_second"] for each in steady) / tokens, waits


def main() -> None:
    """Run both ways in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--model_type", default="bert-tiny")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds that the fast process sleeps for a row")
    given, ratios = parser.parse_args(), list[float]()
    for pair in range(given.pairs):
        rates: dict[str, float] = {}
        for way in ("even", "auto") if pair % 2 == 0 else ("auto", "even"):
            with tempfile.TemporaryDirectory() as folder:
                rates[way], waits = one_run(given, way, folder)
            print(f"{way}: {rates[way]:.2f} steps/s, waiting {waits[0]:.0%} and {waits[1]:.0%}", flush=True)
        ratios.append(rates["auto"] / rates["even"])
    spread = f"(from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs)"
    print(f"auto / even {statistics.median(ratios):.2f} {spread}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
