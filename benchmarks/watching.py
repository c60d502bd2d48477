"""A script of the project in a fork of this process, watched from outside after its optimizer steps; for gpu_check.py.

The script runs as a user runs it, and nothing of its loop is repeated here: torch tells of every optimizer step, the
script's own log says how fast it was, and what remains is seen by torch's profiler and by its warnings.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
STEPS = 3  # in which host synchronisations are counted, and kernels then
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
_PATIENCE = 120  # seconds until a checkpoint must be whole


class Watched(NamedTuple):
    """What to look at: waiting for data in the steps (first, last], then `STEPS` for each of what comes after it."""

    first: int
    last: int
    run_dir: Path
    with_checkpoint: bool = False

    @property
    def save_step(self) -> int:
        """The step after which a checkpoint is saved."""
        return self.last + 2 * STEPS + 2


def run_script(name: str, arguments: Iterable[Any], watched: Watched | None = None) -> dict[str, Any]:
    """Run scripts/NAME in a fork, to its end or to where all was seen that was asked for, which is returned.

    Raises:
        RuntimeError: it ended otherwise; why stands where its output goes.
    """
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder, "seen.json")
        sys.stdout.flush()
        sys.stderr.flush()
        if (child := os.fork()) == 0:
            _run(name, [*map(str, arguments)], watched, seen, in_fork=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code or (watched and not seen.exists()):
            raise RuntimeError(f"{name} ended with {code}")
        return json.loads(seen.read_text()) if watched else {}


def _run(name: str, arguments: list[str], watched: Watched | None, seen: Path, in_fork: bool) -> NoReturn:
    import torch

    code = 1
    try:
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # what runs here runs as it would anywhere
        if in_fork and [*Path("/dev").glob("nvidia[0-9]*")] and not torch.cuda.is_available():
            # Something has begun with CUDA before the fork, which cannot go on with it: a new process can.
            job = json.dumps([name, arguments, watched, str(seen)], default=str)
            os.execv(sys.executable, [sys.executable, __file__, job])
        sys.argv = [str(SCRIPTS / name), *arguments]
        if watched:
            _Watch(watched, seen)
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Watch:
    """Looks after every optimizer step, and ends the process when it has seen all."""

    def __init__(self, asked: Watched, file: Path) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.asked, self.file, self.on_gpu = asked, file, torch.cuda.is_available()
        self.step, self.waited, self.whole_at = 0, 0.0, 0.0
        self.times, self.waits = [time.monotonic()], [0.0]
        self.seen = dict[str, Any]()
        self.places = Counter[str]()
        activities = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(activities=[activities.CUDA if self.on_gpu else activities.CPU])
        self._time_the_data()
        register_optimizer_step_post_hook(lambda *_: self.after_step())

    def _time_the_data(self) -> None:
        """How long the loop waits for its next micro-batches."""
        from lmscripts.data.steps import Prefetcher

        taken = Prefetcher.__next__

        def timed(prefetcher: Prefetcher[Any]) -> Any:
            began = time.monotonic()
            item = taken(prefetcher)
            self.waited += time.monotonic() - began
            return item

        Prefetcher.__next__ = timed  # type: ignore[method-assign]

    def after_step(self) -> None:
        self.step += 1
        self.times.append(time.monotonic())
        self.waits.append(self.waited)
        first, last = self.asked.first, self.asked.last
        if self.step == last + 1:  # the log line of the last step is written by now
            waited = self.waits[last] - self.waits[first]
            self.seen["waiting_for_data"] = waited / (self.times[last] - self.times[first])
            self._count_synchronisations(True)
        elif self.step == last + 1 + STEPS:
            self._count_synchronisations(False)
            self._synchronize()
            self.profile.start()
        elif self.step == last + 1 + 2 * STEPS:
            self._synchronize()
            self.profile.stop()
            self.seen |= kernels(self.profile, self.on_gpu)
            if not self.asked.with_checkpoint:
                self._end()
        elif self.step == self.asked.save_step:
            threading.Thread(target=self._wait_for_checkpoint, daemon=True).start()
        elif self.step > self.asked.save_step and (self.whole_at or self._seconds() > _PATIENCE):
            begun = self.asked.save_step
            usual = (self.times[last] - self.times[first]) / (last - first)
            self.seen["checkpoint_stops_the_loop"] = max(0.0, self.times[begun + 1] - self.times[begun] - usual)
            if self.whole_at:
                self.seen["checkpoint_whole_after"] = self.whole_at - self.times[begun]
            self._end()

    def _seconds(self) -> float:
        """Since the checkpoint became due."""
        return time.monotonic() - self.times[self.asked.save_step]

    def _synchronize(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def _count_synchronisations(self, on: bool) -> None:
        import torch

        if not self.on_gpu:
            return
        if on:
            self.restored = warnings.showwarning, warnings.filters[:]
            warnings.simplefilter("always")
            warnings.showwarning = self._count  # type: ignore[assignment]
        else:
            warnings.showwarning, warnings.filters[:] = self.restored
            self.seen["synchronisations"] = sum(self.places.values()) / STEPS
            self.seen["synchronised_at"] = [f"{place} ({times})" for place, times in self.places.most_common(5)]
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def _count(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            self.places[f"{'/'.join(Path(filename).parts[-2:])}:{lineno}"] += 1

    def _wait_for_checkpoint(self) -> None:
        folder = self.asked.run_dir / f"checkpoint-{self.asked.save_step}"
        while not folder.exists():
            time.sleep(0.002)
        self.whole_at = time.monotonic()

    def _end(self) -> NoReturn:
        """Without the last checkpoint and the export, which are not asked for."""
        self.file.write_text(json.dumps(self.seen))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def kernels(profile: Any, on_gpu: bool) -> dict[str, Any]:
    """The 20 kernels of a profile with the most time, and for how long any ran: milliseconds of a step.

    On a CPU these are operators, with the time of those that they call.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    wanted = _ON_GPU if on_gpu else ("cpu_op",)
    events = sorted((event for event in events if event.get("cat") in wanted), key=lambda event: event["ts"])
    busy, end, times, calls = 0.0, 0.0, defaultdict[str, float](float), Counter[str]()
    for event in events:
        begin, stop = event["ts"], event["ts"] + event["dur"]
        busy, end = busy + max(0.0, stop - max(begin, end)), max(end, stop)
        times[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    most = sorted(times, key=times.__getitem__, reverse=True)[:20]
    of_step = 1000 * STEPS  # traces count microseconds
    return {
        "launched": len(events) / STEPS,
        "busy_ms": busy / of_step,
        "kernels": [[name[:120], times[name] / of_step, calls[name] / STEPS] for name in most],
    }


if __name__ == "__main__":
    name, arguments, watched, seen = json.loads(sys.argv[1])
    asked = watched and Watched(*watched[:2], Path(watched[2]), watched[3])
    _run(name, arguments, asked, Path(seen), in_fork=False)
