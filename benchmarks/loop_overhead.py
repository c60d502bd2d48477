"""What the loop of run_pretraining.py costs beside a bare one of twenty lines, with a model so small that it shows.

python benchmarks/loop_overhead.py --store store

The script runs in this process as it is, with an optimizer step of a single micro-batch. After every so many of its
steps its clock stands still, and the bare loop does the same steps on a copy of the model, with batches from the same
source. Nothing is logged or saved meanwhile, as a longer run would do rarely. In the end the weights must be
the same bits.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from paired import Pairs

from lmscripts import objectives
from lmscripts.training import optim

ROOT = Path(__file__).resolve().parent.parent


def bare_loop(data: Any, rate: Callable[[int], float], model: Any, optimizer: Any) -> Iterator[float]:
    """The loop without anything that a long run needs; a step each time it is asked."""
    batches = data.prefetch(0, data.num_steps, 0)
    model.train()
    for step in range(data.num_steps):
        micro_batches, counts = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for batch in micro_batches:
            loss = sum(model(batch)[term] / counts[term] for term in model.weights)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield norm
    batches.close()


class InTurns:
    """The data of a run, whose every so many steps are followed by those of the bare loop, each under its clock."""

    def __init__(self, data: Any, bare: Iterator[float], steps: int) -> None:
        self._data, self._bare, self._steps, self.pairs = data, bare, steps, Pairs()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def prefetch(self, *asked: Any) -> InTurns:
        """As that of the data; what comes is taken one after another by `next`."""
        self._batches, self._taken, self._began = self._data.prefetch(*asked), 0, self._now()
        return self

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _count(self, way: int) -> None:
        for clocks, now, began in zip((self.pairs.wall, self.pairs.cpu), self._now(), self._began, strict=True):
            clocks[way].append(now - began)
        gc.collect()
        self._began = self._now()

    def take_turns(self) -> None:
        """End the turn of the script, and have that of the bare loop."""
        self._count(0)
        for _ in range(self._steps):
            next(self._bare)
        self._count(1)

    def __next__(self) -> Any:
        if self._taken and self._taken % self._steps == 0:
            self.take_turns()
        self._taken += 1
        return next(self._batches)

    def close(self) -> None:
        """As that of the batches; the last turn has been had."""
        self._batches.close()


def main() -> None:
    """Run the script with its loop in turns with the other, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="token store of prepare_corpus.py")
    parser.add_argument("--model_type", default="bert-tiny")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=64, help="of a row")
    parser.add_argument("--steps", type=int, default=50, help="of a turn")
    parser.add_argument("--pairs", type=int, default=15)
    given, more = parser.parse_known_args()
    spec: Any = importlib.util.spec_from_file_location("run_pretraining", ROOT / "scripts" / "run_pretraining.py")
    script: Any = importlib.util.module_from_spec(spec)
    sys.modules["run_pretraining"] = script
    spec.loader.exec_module(script)
    train = script.train

    def train_in_turns(options: Any, run: Any) -> str:
        kind, own = run.objective.kind.__name__.rpartition(".")[2], run.objective
        model = objectives.trained(kind, own.family, copy.deepcopy(own.models), own.attention, own.settings)
        arguments = {"betas": (options.beta1, options.beta2), "epsilon": options.epsilon}
        arguments |= {"learning_rate": options.learning_rate, "weight_decay": options.weight_decay}
        optimizer = optim.build_optimizer(options.optimizer, model, **arguments)
        run.data = InTurns(run.data, bare_loop(run.data, run.rate, model, optimizer), given.steps)
        run.folder.save = lambda *_: run.data.take_turns()  # at the end of the last turn
        train(options, run)
        both = zip(run.objective.parameters(), model.parameters(), strict=True)
        apart = max(float((ours - theirs).abs().max()) for ours, theirs in both)
        if apart > 0:
            raise SystemExit(f"the loops computed something else: weights differ by {apart:.1e}")
        print(f"weights differ by at most {apart:.1e}")
        pairs = run.data.pairs
        for clocks in (pairs.wall, pairs.cpu):
            del clocks[0][0], clocks[1][0]  # the first warms up
        print(pairs.report(given.steps, "steps"))
        raise SystemExit(0)

    script.train, number = train_in_turns, given.steps * (given.pairs + 1)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--dataset_dir", given.store, "--model_dir", Path(folder, "run"), "--model_type", given.model_type]
        words += ["--max_steps", number, "--save_steps", number, "--logging_steps", number, "--eval_rows", 0]
        words += ["--batch_size", given.rows, "--sequence_length", given.length, "--tracker", "none"]
        sys.argv = ["run_pretraining.py", *map(str, words), *more]
        script.main()


if __name__ == "__main__":
    main()
