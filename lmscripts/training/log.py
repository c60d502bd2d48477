"""What a run leaves to look at: log.jsonl and the curves; how fast it is."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from importlib import metadata
from math import isfinite, nan
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lmscripts.files import write_text
from lmscripts.options.checks import duration_text
from lmscripts.training import trackers
from lmscripts.training.pace import Balance, Batches, Pace, Steps
from lmscripts.training.peers import progress
from lmscripts.training.processes import slots, sum_over_processes
from lmscripts.training.state import TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = Callable[[Mapping[str, float], Mapping[str, float]], dict[str, float]]
ENDLESS = sys.maxsize  # step at which nothing ends
_NONE: Mapping[str, float] = MappingProxyType({})
_SPOKEN = ("loss", "perplexity", "_byte")
SHARES = ("accuracy", "precision", "recall")  # how metrics end that are shares
_TEXT_TRACKERS = ("tensorboard", "trackio")  # whose `log` takes text beside numbers
_EARLY_SECONDS = 10.0
_UNEVEN = 0.15  # of the time, by which waiting has to differ between processes to be worth a word
_CENTURY = 100 * 365 * 86400
# Dense bf16 with sums in float32, from the makers' data sheets, by the exact names that CUDA gives: variants differ.
_NAMES_BY_TFLOPS = {
    2250.0: "NVIDIA B200",
    989.0: "NVIDIA H100 80GB HBM3, NVIDIA H200, NVIDIA GH200 480GB",
    835.0: "NVIDIA H100 NVL, NVIDIA H200 NVL",
    756.0: "NVIDIA H100 PCIe",
    362.0: "NVIDIA L40S",
    312.0: "NVIDIA A100-SXM4-40GB, NVIDIA A100-SXM4-80GB, NVIDIA A100-PCIE-40GB, NVIDIA A100 80GB PCIe",
    165.2: "NVIDIA GeForce RTX 4090",
    149.7: "NVIDIA A40",
    125.0: "NVIDIA A10",
    121.0: "NVIDIA L4",
    71.0: "NVIDIA GeForce RTX 3090",
}
PEAKS = {name: tflops * 1e12 for tflops, names in _NAMES_BY_TFLOPS.items() for name in names.split(", ")}
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


def read_log(file: Path) -> list[dict[str, Any]]:
    """Records of a log.jsonl; a damaged line, such as a last one cut off by a crash, is left out."""
    records: list[dict[str, Any]] = []
    if not file.is_file():
        return records
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


class Reporter:
    """Shows and writes down what a run measures: progress bar or lines, log.jsonl, tracker.

    On a continued run the records after the step it continues from are dropped: they will be written again.

    Attributes:
        bar: the progress bar; plain lines instead where there is no terminal.
    """

    def __init__(self, accelerator: Accelerator, run_dir: Path, step: int, stop_step: int, continued: bool) -> None:
        """Every process makes one; the main process shows and writes.

        Args:
            accelerator: the running processes, with their trackers.
            run_dir: folder of the run.
            step: steps done.
            stop_step: step at which this job ends; `ENDLESS` for none.
            continued: keep the log up to `step` instead of beginning it anew.
        """
        from tqdm import tqdm

        main, self._file = accelerator.is_main_process, run_dir / "log.jsonl"
        self._accelerator, self._stop_step, self._lost = accelerator, stop_step, False
        self._of = "" if stop_step == ENDLESS else f"/{stop_step:,}"
        self._told_before = set[tuple[Any, ...]]()  # step and names that trackers were told behind the checkpoint
        if main:
            kept = read_log(self._file) if continued and self._file.exists() else []
            lines = (json.dumps(record) + "\n" for record in kept if record.get("step", 0) <= step)
            write_text(self._file, "".join(lines))
            self._told_before = {(record["step"], *record) for record in kept if record.get("step", 0) > step}
        self._first: tuple[int, float] | None = None  # a step whose end is known: the very first may compile
        self._told = self._unsaid = False
        total = stop_step if self._of else None
        self.bar = tqdm(total=total, initial=step, disable=not (main and sys.stderr.isatty()), unit="step")
        trackers.begin(accelerator, run_dir, continued)

    def advance(self, step: int) -> None:
        """Count a step; early, and whatever the time between log lines, say once how long all of them will take."""
        self.bar.update()
        progress["step"] = step
        self._first = self._first or (step, time.monotonic())
        begun, began = self._first
        if not self._told and step > begun and time.monotonic() - began > _EARLY_SECONDS:
            self._told = True
            if left := self._left(step):
                each = (time.monotonic() - began) / (step - begun)
                self._accelerator.print(f"step {step:,}{self._of}  {each:.2g} s a step, {left}", flush=True)

    def _left(self, step: int) -> str:
        """How long the rest will take at the speed since the first step, evaluations and checkpoints among it."""
        begun, began = self._first or (step, 0.0)
        if not begun < step < self._stop_step or not self._of:
            return ""
        seconds = (time.monotonic() - began) / (step - begun) * (self._stop_step - step)
        end = datetime.now() + timedelta(seconds=min(seconds, _CENTURY))
        when = f"{end:%H:%M}" if end.date() == datetime.now().date() else f"{end:%Y-%m-%d %H:%M}"
        return f"{duration_text(seconds)} left, until {when}"

    def __call__(
        self, step: int, record: Mapping[str, float], words: str, tags: Mapping[str, float] = _NONE, tag_step: int = 0
    ) -> None:
        """Write a record of a step and show it in words; `tags` go to TensorBoard alone, at a step of their own."""
        if self._accelerator.is_main_process:
            known = {name: value if isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
            with self._unharmed(), open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **known}, ensure_ascii=False) + "\n")
        again = (step, "step", *record) in self._told_before
        is_last = again and step == max(self._told_before)[0]
        for tracker in self._accelerator.trackers:
            if not (again and trackers.has_kept(tracker.name, is_last)):
                tracker.log(dict(record), step=step)
            if tags and tracker.name == "tensorboard":  # others take steps in their order only
                tracker.log(dict(tags), step=tag_step)
        self.bar.set_postfix_str(words)
        if self.bar.disable:
            self._told, line = True, ", ".join(filter(None, (words, self._left(step))))
            self._accelerator.print(f"step {step:,}{self._of}  {line}", flush=True)

    def texts(self, step: int, answer: Callable[[], Mapping[str, Sequence[str]]]) -> None:
        """Write down and show lines of text by name, on the main process; what goes wrong is said once, and no more."""
        try:
            named = {name: list(lines) for name, lines in answer().items()}
            with open(self._file, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps({"step": step, "samples": named}, ensure_ascii=False) + "\n")
            said = [f"step {step:,}: {k} → {' | '.join(' '.join(one.split()) for one in v)}" for k, v in named.items()]
            (self._accelerator.print if self.bar.disable else self.bar.write)("\n".join(said))
            for tracker in self._accelerator.trackers:
                if hasattr(tracker, "log_table"):
                    rows = [[name, "\n".join(lines)] for name, lines in named.items()]
                    tracker.log_table("samples", columns=["prompt", "text"], data=rows, step=step)
                elif tracker.name in _TEXT_TRACKERS:
                    tracker.log({f"samples/{name}": "\n\n".join(lines) for name, lines in named.items()}, step=step)
        except Exception as error:  # of a model or a tracker of any kind
            if not self._unsaid:
                self._accelerator.print(f"warning: no samples ({type(error).__name__}: {error}); training goes on")
            self._unsaid = True

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """What cannot be written down, as on a full disk, is said once, and costs no training."""
        try:
            yield
        except OSError as error:
            if not self._lost:
                self._accelerator.print(f"warning: {self._file}: {error.strerror}; training goes on")
            self._lost = True


def gpu_statistics(device: torch.device) -> dict[str, float]:
    """Memory that this process held at most since the last call, in GiB, and how busy its GPU is, as a share.

    The second is what NVML says, which needs the package nvidia-ml-py. What cannot be had is left out.
    """
    found: dict[str, float] = {}
    if device.type != "cuda":
        return found
    with suppress(Exception):  # NVML's errors, as in a container or of a part of a GPU, share no other class
        found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        found["gpu_utilization"] = torch.cuda.utilization(device) / 100
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = metadata.version(package)
    return found


def in_words(metrics: Mapping[str, float]) -> str:
    """Losses, shares and speed of a record as one line, such as "loss 2.1034, accuracy 54.20%"."""
    words, said = [], ""
    for name, value in metrics.items():
        if name.endswith((*_SPOKEN, *SHARES)):
            owner, _, what = ("", "", "bits per text byte") if name == "bits_per_text_byte" else name.rpartition("_")
            words.append(f"{owner if owner != said else ''} {what} ".lstrip())
            words[-1] += f"{value:.2%}" if name.endswith(SHARES) else f"{value:.4f}"
            said = owner
        elif name == "tokens_per_second":
            words.append(f"{value:,.0f} tokens/s")
    waits = [value for name, value in metrics.items() if name.startswith("waiting_")]
    if waits and max(waits) - min(waits) > _UNEVEN:
        words.append(f"process {waits.index(max(waits))} waits {max(waits):.0%} of the time")
    return ", ".join(words)


def draw_curves(run_dir: Path, switches: Sequence[int] = ()) -> None:
    """Draw losses, held-out shares with the probes of tasks, and the learning rate over the steps, as curves.png.

    Args:
        run_dir: folder of a run, with its log.jsonl.
        switches: steps at which a phase ends and the next begins.
    """
    from matplotlib.figure import Figure  # pyplot would take as long to import as all else here

    records = read_log(run_dir / "log.jsonl")
    train = [r for r in records if "loss" in r]
    held_out = [r for r in records if "eval_loss" in r]
    # Where the loss is a weighted sum of several, the terms are drawn.
    losses = [name for name in (train or [{}])[-1] if name.endswith("_loss")] or ["loss"]
    shares = [name for name in (held_out or [{}])[-1] if name.endswith(SHARES)]
    probes = dict.fromkeys(name for r in records for name in r if re.fullmatch("probe_.+_accuracy", name))
    figure = Figure(figsize=(15, 4.2))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(0.05, 0.125, 0.99, 0.94, wspace=0.2)  # a layout that is found is drawn twice
    for number, name in enumerate(losses):
        label, color = name.removesuffix("loss").replace("_", " "), f"C{number}"
        panels[0].plot(*_curve(train, name), label=f"{label}training", linewidth=1, color=color, alpha=0.7)
        if any(f"eval_{name}" in record for record in held_out):
            panels[0].plot(*_curve(held_out, f"eval_{name}"), "o-", label=f"{label}held out", markersize=4, color=color)
    for name in shares:
        label = name.removeprefix("eval_").replace("_", " ")
        panels[1].plot(*_curve(held_out, name, 100), "o-", markersize=4, label=label)
    for name in probes:
        label = name.removesuffix("_accuracy").replace("_", " ", 1)
        panels[1].plot(*_curve([r for r in records if name in r], name, 100), "s--", markersize=4, label=label)
    panels[0].legend()
    if several := len(shares) + len(probes) > 1:
        panels[1].legend()
    panels[2].plot(*_curve(train, "learning_rate"))
    panels[2].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    labels = ("loss (nats per target)", "held out (%)" if several else "held-out accuracy (%)", "learning rate")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        for step in switches:
            panel.axvline(step, color="gray", linestyle=":", linewidth=1)
    if len(losses) > 1:
        panels[0].set_yscale("log")
    figure.savefig(run_dir / "curves.png", dpi=110)


def _curve(records: list[dict[str, Any]], name: str, factor: float = 1) -> tuple[list[int], list[float]]:
    return [r["step"] for r in records], [nan if r[name] is None else factor * r[name] for r in records]


class Meter:
    """Loss and speed between two log lines.

    Attributes:
        waiting: a context around what the processes agree on before they compute a step.
    """

    def __init__(
        self,
        device: torch.device,
        sums: Mapping[str, float] | None = None,
        counts: Mapping[str, float] | None = None,
        model: Any = None,
    ) -> None:
        """Start the clock.

        Args:
            device: where the model is.
            sums: of the steps since the last log line before the run was interrupted, on one process alone.
            counts: of those steps.
            model: prepared for the processes, which wait for each other in it.
        """
        self._device, self._pace, self._advised = device, Pace(device, model), False
        self._slow = list[int | None]()
        self.waiting = self._pace.waiting
        self._gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._reset()
        self._sums.update(sums or {})
        self._counts.update(counts or {})

    def _reset(self) -> None:
        self._began = time.monotonic()
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, float] = {}
        self._tokens = self._operations = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock, for evaluation and saving."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add_sums(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Add this process' sums; they stay on the device, so nothing waits for them."""
        self._pace.exchanged()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def batches(
        self,
        accelerator: Accelerator,
        steps: Steps,
        state: TrainingState,
        stop_step: int,
        report: Reporter,
        balance: Balance,
    ) -> Batches:
        """What this process computes from the state's step on, divided by speed if that is to be balanced.

        See `lmscripts.training.pace.Batches`.
        """
        self._advised = balance == "auto"
        return Batches(accelerator, steps, state, stop_step, self._pace, report, balance)

    def add_step(self, counts: Mapping[str, float], operations: float = 0.0) -> None:
        """Add a step's counts over all processes, whatever is counted, and its floating-point operations if known."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + value
        self._tokens += counts.get("tokens", 0.0)
        self._operations += operations

    def open_window(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts since the last reading over all processes, to be kept in a checkpoint.

        Every process must call it.
        """
        return self._totals(accelerator, [])[0], dict(self._counts)

    def _totals(self, accelerator: Accelerator, more: list[float]) -> tuple[dict[str, float], list[float]]:
        """The sums over all processes, and those of more values."""
        values = [*(float(value) for value in self._sums.values()), *more]
        totals = sum_over_processes(accelerator, values) if values else []
        return dict(zip(self._sums, totals)), totals[len(self._sums) :]

    def read(self, accelerator: Accelerator, metrics: Metrics) -> dict[str, float]:
        """What the objective makes of sums and counts since the last reading, and the speed.

        Every process must call it. Speed counts real tokens only; utilisation, on a known GPU, all positions that
        were computed. Where processes wait for each other, "waiting_RANK" is the share of the time in which each did.
        """
        self._pace.settle(wait=True)
        alone = self._pace.waited if self._pace.is_shared else None
        sums, waited = self._totals(accelerator, [] if alone is None else slots(accelerator, alone))
        counts, seconds = dict(self._counts), max(1e-9, time.monotonic() - self._began)
        record = metrics(sums, counts) | {f"waiting_{rank}": each / seconds for rank, each in enumerate(waited)}
        self._advise(accelerator, waited, _UNEVEN * seconds)
        if "tokens" in counts:
            record["tokens_per_second"] = self._tokens / seconds
        record |= gpu_statistics(self._device)
        if self._operations and self._gpu in PEAKS:
            record["mfu"] = self._operations / seconds / (PEAKS[self._gpu] * accelerator.num_processes)
        elif self._operations and self._gpu:
            accelerator.print(f"no utilisation (mfu) in the log: the peak of a {self._gpu} is not known here")
            self._gpu = ""
        self._reset()
        self._pace.waited = 0.0
        return record

    def _advise(self, accelerator: Accelerator, waited: list[float], uneven: float) -> None:
        """Say once which process is slow, when the others have waited for it in three windows one after another."""
        slow = waited.index(min(waited)) if waited and max(waited) - min(waited) > uneven else None
        self._slow = [*self._slow, slow][-3:]
        if self._slow == [slow] * 3 and slow is not None and not self._advised:
            self._advised = True
            name = self._pace.names[slow]
            accelerator.print(f"{name} is slower than others, which wait for it: --balance auto gives it fewer rows")
