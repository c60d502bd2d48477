"""The output of gpu_check.py as Markdown, for the README: machine, speeds, all other items, kernels.

    python benchmarks/gpu_table.py gpu.jsonl

An output that was cut off gives a table too, which says what was not reached.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_FACTS = {"item", "seconds", "estimate", "status", "kernels", "synchronised_at"}  # not figures of their own


def read(file: Path) -> list[Record]:
    """The newest result of every item in the order of the file; lines that are cut off are left out."""
    found = dict[str, Record]()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            result = json.loads(line)
            found[result["item"]] = result
        except (ValueError, KeyError, TypeError):
            continue
    return [*found.values()]


def page(results: list[Record]) -> str:
    """All of it as Markdown."""
    machine = next((result for result in results if result["item"] == "machine"), {})
    done = {result["item"]: result for result in results if result["status"] == "ok"}
    missing = [name for name in machine.get("planned", []) if name not in {result["item"] for result in results}]
    speeds = [result for result in done.values() if "ms_per_step" in result]
    others = [result for result in done.values() if "ms_per_step" not in result and result is not machine]
    parts = [_machine(machine)]
    if speeds:
        head = ("run_pretraining.py", "ms a step", "tokens/s", "MFU", "peak GiB", "idle", "waiting for data")
        parts.append(_table((*head, "host syncs a step", "checkpoint: loop stops, whole after"), map(_speed, speeds)))
    if others:
        parts.append(_table(("item", "figures"), ((result["item"], _figures(result)) for result in others)))
    not_ok = [result for result in results if result["status"] != "ok"]
    if not_ok or missing:
        rows = [(result["item"], result["status"], _why(result)) for result in not_ok]
        parts.append(_table(("not measured", "", "why"), [*rows, *((name, "not reached", "") for name in missing)]))
    parts += [_kernels(result) for result in speeds if result.get("kernels")]
    return "\n\n".join(parts) + "\n"


def _machine(machine: Record) -> str:
    if "device" not in machine:
        return "What machine this was is not known."
    words = [machine["device"]]
    if "memory_gib" in machine:
        words += [f"{machine['memory_gib']:.0f} GiB", f"CUDA {machine['cuda']}"]
        words.append(f"a bf16 product of 8,192 x 8,192 reaches {machine['product_tflops']:.0f} TFLOP/s")
    words += [f"{machine['cores']} cores", *(f"{name} {value}" for name, value in machine["versions"].items())]
    return ", ".join([*words, f"commit {machine['commit'] or 'unknown'}"]) + "."


def _speed(result: Record) -> tuple[str, ...]:
    """A row of speeds; what was not measured there is left empty."""

    def shown(name: str, form: str) -> str:
        return format(result[name], form) if name in result else ""

    checkpoint = " / ".join(
        f"{result[name]:.2f} s" for name in ("checkpoint_stops_the_loop", "checkpoint_whole_after") if name in result
    )
    spread = f"{result['ms_per_step']:.1f} ({result['ms_from']:.1f} to {result['ms_to']:.1f})"
    names = {"tokens_per_second": ",.0f", "mfu": ".1%", "gpu_memory_gib": ".1f", "idle": ".0%"}
    names |= {"waiting_for_data": ".1%", "synchronisations": ".1f"}
    return (result["item"], spread, *(shown(name, form) for name, form in names.items()), checkpoint)


def _figures(result: Record) -> str:
    shown = []
    for name, value in result.items():
        if name in _FACTS:
            continue
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, dict):
            value = " ".join(f"{key}: {each:,}" for key, each in value.items())
        shown.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(shown)


def _why(result: Record) -> str:
    if result["status"] == "skipped":
        return f"about {result['estimate']:.0f} s, {result['left']} s were left"
    return result.get("error", "")


def _kernels(result: Record) -> str:
    rows = [(f"`{name}`", f"{ms:.3f}", f"{calls:.1f}") for name, ms, calls in result["kernels"]]
    title = f"{result['item']}: {result['launched']:,.0f} launched in a step, busy for {result['busy_ms']:.1f} ms"
    places = result.get("synchronised_at")
    said = f"\n\nThe host waits at {', '.join(places)}." if places else ""
    table = _table(("kernel", "ms a step", "times a step"), rows)
    return f"<details><summary>{title}</summary>{said}\n\n{table}\n\n</details>"


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    body = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_file", type=Path, help="of gpu_check.py")
    print(page(read(parser.parse_args().output_file)), end="")


if __name__ == "__main__":
    main()
