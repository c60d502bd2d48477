"""What a run says of its time while it runs."""

import pytest

from lmscripts.options.checks import duration_text, parse_duration
from lmscripts.training import log


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3599, "1 h 00 min"),
        (12_000, "3 h 20 min"),
        (172_799, "2 days 0 h"),
        (200_000, "2 days 8 h"),
        (400 * 86400, "400 days"),
    ],
)
def test_durations(seconds, words):
    assert duration_text(seconds) == words


def test_a_duration_is_read_as_it_is_said():
    assert parse_duration(duration_text(12_000).replace("min", "m").replace(" ", "")) == 12_000


class Said:
    is_main_process, log_with, trackers = True, (), ()

    def __init__(self):
        self.lines = []

    def print(self, line, **_):
        self.lines.append(line)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_the_end_is_told_early_and_with_every_line(tmp_path, clock):
    said = Said()
    report = log.Reporter(said, tmp_path, 0, 1000, continued=False)
    for step in range(1, 1001):
        clock[0] += 60 if step == 1 else 4  # the first one compiles, and says nothing of the others
        report.advance(step)
        if step in (500, 1000):
            report(step, {"loss": 1.0}, "loss 1.0000")
    early, half, end = said.lines
    assert early.startswith("step 4/1,000  4 s a step, 1 h 06 min left, until ")
    assert half.startswith("step 500/1,000  loss 1.0000, 33 min left, until ")
    assert end == "step 1,000/1,000  loss 1.0000"


def test_a_run_of_some_seconds_is_told_nothing_early(tmp_path, clock):
    said = Said()
    report = log.Reporter(said, tmp_path, 0, 20, continued=False)
    for step in range(1, 21):
        clock[0] += 0.1
        report.advance(step)
    assert said.lines == []
