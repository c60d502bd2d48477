"""What a run leaves to look at: log.jsonl, the curves, the model card, and how fast it was."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmscripts.distributed import sum_over_processes
from lmscripts.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}  # dense bf16, from the makers' data sheets
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


class RunLog:
    """Appends records to RUN/log.jsonl, one JSON object a line.

    On a continued run the records after the step it continues from are dropped: they will be written again.
    """

    def __init__(self, run_dir: Path, continued_from: int | None) -> None:
        self.file = run_dir / "log.jsonl"
        kept: list[dict[str, Any]] = []
        if continued_from is not None and self.file.exists():
            kept = [r for r in read_log(self.file) if r.get("step", 0) <= continued_from]
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_log(file: Path) -> list[dict[str, Any]]:
    """Records of a log.jsonl; a last line cut off by a crash is left out."""
    records = []
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def flops_per_token(config: Any, sequence_length: int, slots: int) -> float:
    """Floating-point operations of a training step per position of a masked language model.

    6 per weight of the layers and, at the predicted positions, of the head, and 12 L H T for the attention scores
    (arXiv:2001.08361, section 2.1, with the attention term written out).

    Args:
        config: sizes of the model, as transformers names them.
        sequence_length: positions per row.
        slots: positions of a row that get logits.
    """
    width = config.hidden_size
    body: float = config.num_hidden_layers * (4 * width**2 + 2 * width * config.intermediate_size)
    head: float = width**2 + width * config.vocab_size
    attention = 12.0 * config.num_hidden_layers * width * sequence_length
    return float(6 * (body + slots / sequence_length * head) + attention)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 operations per second of a known GPU; None where utilisation cannot be stated."""
    return next((tflops * 1e12 for name, tflops in _PEAK_TFLOPS.items() if name in device_name), None)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = metadata.version(package)
    return found


def draw_curves(log_file: Path, image: Path) -> None:
    """Draw training and held-out loss, held-out accuracy and the learning rate over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(log_file)
    train = [r for r in records if "loss" in r]
    held_out = [r for r in records if "eval_loss" in r]
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    panels[0].plot([r["step"] for r in train], [r["loss"] for r in train], label="training", linewidth=1)
    if held_out:
        steps = [r["step"] for r in held_out]
        panels[0].plot(steps, [r["eval_loss"] for r in held_out], "o-", label="held out", markersize=4)
        panels[1].plot(steps, [100 * r["eval_accuracy"] for r in held_out], "o-", markersize=4)
    panels[0].legend()
    panels[2].plot([r["step"] for r in train], [r["learning_rate"] for r in train])
    labels = ("loss (nats per predicted token)", "held-out accuracy (%)", "learning rate")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    figure.savefig(image, dpi=110)
    pyplot.close(figure)


class Meter:
    """Loss and speed between two log lines."""

    def __init__(self, flops_per_token: float, device: torch.device, loss_sum: float = 0, targets: float = 0) -> None:
        """Start the clock.

        Args:
            flops_per_token: what utilisation is computed from.
            device: where the model is.
            loss_sum: of the steps since the last log line before the run was interrupted, on one process alone.
            targets: of those steps.
        """
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._reset(loss_sum, targets)

    def _reset(self, loss_sum: float = 0.0, targets: float = 0.0) -> None:
        self._began = time.monotonic()
        self._loss: torch.Tensor | float = loss_sum
        self._targets = targets
        self._tokens = self._positions = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock, for evaluation and saving."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add_loss(self, loss_sum: torch.Tensor) -> None:
        """Add this process' sum of losses; stays on the device, so nothing waits for it."""
        self._loss = self._loss + loss_sum

    def add_step(self, targets: float, tokens: float, positions: float) -> None:
        """Add a step's targets, real tokens and positions over all processes."""
        self._targets += targets
        self._tokens += tokens
        self._positions += positions

    def open_window(self, accelerator: Accelerator) -> tuple[float, float]:
        """Loss sum and targets since the last reading over all processes, to be kept in a checkpoint.

        Every process must call it.
        """
        return sum_over_processes(accelerator, [float(self._loss)])[0], self._targets

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Loss per target, real tokens per second and, on a known GPU, utilisation since the last reading.

        Every process must call it. Utilisation counts all positions that were computed; speed only real tokens.
        """
        loss = sum_over_processes(accelerator, [float(self._loss)])[0]
        seconds = max(1e-9, time.monotonic() - self._began)
        record = {"loss": loss / max(1.0, self._targets), "tokens_per_second": self._tokens / seconds}
        if self._peak is not None:
            done = self._flops_per_token * self._positions / seconds
            record["mfu"] = done / (self._peak * accelerator.num_processes)
        self._reset()
        return record
