"""The pool of worker processes: the order of what it gives, its errors, and that nothing of it outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from conftest import PATIENCE, ROOT

from lmscripts.errors import UserError
from lmscripts.workers import given_up, in_order


def slow_square(number):
    time.sleep(0.05 * (number % 3))
    return number * number


def fail_at(bad, number):
    if number == bad:
        raise UserError(f"{number} is bad")
    time.sleep(0.01)
    return number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_giving(number):
    """In the middle of a result, which is longer than what is given at once: its length is said, half of it is not."""
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals:
        frame = frame.f_back
    frame.f_locals["result_queue"]._writer._send((1000).to_bytes(4, "big") + b"half")
    die(number)


def work_until_given_up(mark, number):
    """The first item fails at once; the second one ends when it hears of that, and says so."""
    if number == 0:
        raise UserError("the first is bad")
    for _ in range(600):
        if given_up():
            mark.touch()
            return
        time.sleep(0.1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_come_in_the_order_of_the_items_and_few_are_taken_ahead(num_workers):
    taken = []

    def items():
        for number in range(30):
            taken.append(number)
            yield number

    for count, result in enumerate(in_order(slow_square, items(), num_workers)):
        assert result == count * count
        assert len(taken) <= count + 1 + 2 * num_workers
    assert taken == list(range(30))


def where(number):
    time.sleep(0.1)
    return number, os.getpid()


def test_a_few_items_are_done_before_a_process_is_started():
    done = list(in_order(where, range(3), 2, alone=60))
    assert done == [(number, os.getpid()) for number in range(3)]
    numbers, places = zip(*in_order(where, range(20), 2, alone=0.35), strict=True)
    assert numbers == tuple(range(20))
    assert set(places[:4]) == {os.getpid()}
    assert os.getpid() not in places[-10:]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_is_raised_in_a_worker_is_raised_here(num_workers):
    with pytest.raises(UserError, match="4 is bad"):
        list(in_order(partial(fail_at, 4), range(100), num_workers))


@pytest.mark.parametrize("die", [die, die_while_giving])
def test_a_worker_that_is_killed_is_one_sentence_that_names_the_place(die):
    with pytest.raises(UserError, match=r"died on the text up to line 0; .* give fewer --num_workers"):
        list(in_order(die, range(3), 2, place=lambda item: f"up to line {item}".__str__))
    with pytest.raises(UserError, match="a worker process died; "):
        list(in_order(die, range(3), 2))


def test_long_work_hears_that_nobody_waits_for_it(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError, match="the first is bad"):
        list(in_order(partial(work_until_given_up, tmp_path / "mark"), range(2), 2))
    assert (tmp_path / "mark").exists()
    assert time.monotonic() - start < 500  # of the 600 that it would work


PROGRAM = """
import time
from lmscripts.workers import in_order

if __name__ == "__main__":
    list(in_order(time.sleep, [600, 600], 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(tmp_path, number):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(program)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    workers, deadline = [], time.monotonic() + PATIENCE
    while len(workers) < 2 and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    process.wait()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []


INTERRUPTED = """
import os, signal, sys, time
from lmscripts.errors import user_errors
from lmscripts.workers import in_order


class Slow:
    def __setstate__(self, state):  # in a worker, before it is asked for anything
        print("begins", flush=True)
        time.sleep(3)

    def __getstate__(self):
        return {"a": 1}

    def __call__(self, item):
        return item


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without
    with user_errors():
        list(in_order(Slow(), range(100), 2))
"""


def test_an_interrupt_while_workers_begin_is_said_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED, encoding="utf-8")
    how = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, str(program)], start_new_session=True, text=True, **how)
    assert process.stdout.readline() == "begins\n"
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (2, "error: stopped from the keyboard\n")
