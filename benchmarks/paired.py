"""Timing of two ways in turn, so that whatever else the machine does meets both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Pairs:
    """Seconds of two ways over the same work, one entry per pair; and what each way returned last.

    Attributes:
        wall: elapsed seconds of (ours, theirs).
        cpu: CPU seconds of this process, all threads, of (ours, theirs).
    """

    wall: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    cpu: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def ratios(self) -> dict[str, list[float]]:
        """Theirs divided by ours of every pair, by clock."""
        return {
            "wall": [theirs / ours for ours, theirs in zip(*self.wall, strict=True)],
            "cpu": [theirs / ours for ours, theirs in zip(*self.cpu, strict=True)],
        }

    def report(self, work: float, unit: str) -> str:
        """Rates and ratios as text.

        Args:
            work: what one way does in one pair, in `unit`s.
            unit: of the work.
        """
        lines = []
        for clock, seconds in (("wall", self.wall), ("cpu", self.cpu)):
            ours, theirs = (work / statistics.median(way) for way in seconds)
            lines.append(f"{clock:<5} ours {ours:>10,.3f} {unit}/s   theirs {theirs:>10,.3f} {unit}/s")
        for clock, ratios in self.ratios().items():
            lines.append(
                f"{clock:<5} ratio {statistics.median(ratios):.2f} "
                f"(from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs)"
            )
        return "\n".join(lines)


def seconds_of(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Elapsed seconds, CPU seconds and the result of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def compare(
    ours: Callable[[int], Any],
    theirs: Callable[[int], Any],
    num_pairs: int,
    check: Callable[[Any, Any], None] = lambda ours, theirs: None,
) -> Pairs:
    """Run two ways in turn on the same work; which goes first changes from pair to pair.

    Args:
        ours: does the work of the pair with the given number.
        theirs: the same.
        num_pairs: number of pairs.
        check: called with both results of each pair, outside the clock.
    """
    pairs = Pairs()
    for pair in range(num_pairs):
        results = {}
        for number in (0, 1) if pair % 2 == 0 else (1, 0):
            way = (ours, theirs)[number]
            wall, cpu, results[number] = seconds_of(lambda way=way, pair=pair: way(pair))
            pairs.wall[number].append(wall)
            pairs.cpu[number].append(cpu)
        check(results[0], results[1])
    return pairs
