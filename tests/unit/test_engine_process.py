"""What user code may do in a worker: end it, be ended in it, start children, print without end; and what is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest

from quadriga.core.trial import Status
from quadriga.engine.base import RETRIES, Order
from quadriga.engine.local import Local
from quadriga.engine.process import SAID, Process

HELLO, TRAIN = {"recipe": [], "hash": "h"}, {"recipe": [{"method": "train", "epochs": 1}], "hash": "t", "batches": [1]}
FILE = """
import os, sys, time, torch
from pathlib import Path
from torch import nn
from quadriga.core.workload import Workload
MOOD, MARK = os.environ["MOOD"], Path(os.environ["MARK"])

def fork(escape):
    if (child := os.fork()) == 0:
        if escape:
            os.setsid()
        time.sleep(600)
    MARK.write_text(f"{MARK.read_text() if MARK.exists() else ''} {child}")

class Odd(nn.Linear):
    def forward(self, x):
        if self.training:
            act()
        return super().forward(x)

def act():
    if MOOD == "exit":
        sys.exit(0)
    if MOOD == "_exit":
        os._exit(0)
    if MOOD == "segfault":
        os.kill(os.getpid(), 11)
    if MOOD == "killed":
        MARK.write_text("x" * (len(MARK.read_text() if MARK.exists() else "") + 1))
        if len(MARK.read_text()) <= int(os.environ["TIMES"]):
            os.kill(os.getpid(), 9)
    if MOOD.startswith("forks") and not MARK.exists():
        fork(MOOD == "forks away")
        time.sleep(600)
    if MOOD == "prints":
        print("y" * 3_000_000)

def workload():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=g), torch.randint(2, (64,), generator=g)
    return Workload(model=lambda: Odd(4, 2), train=(x, y), val=(x + 1, y), test=(x + 2, y), batch_size=16)
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Makes a local engine of one worker whose user's code is in a mood."""
    made = []

    def start(mood, times=0):
        (tmp_path / "odd.py").write_text(FILE)
        for name, value in {"MOOD": mood, "MARK": str(tmp_path / "mark"), "TIMES": str(times)}.items():
            monkeypatch.setenv(name, value)
        made.append(Local(f"{tmp_path / 'odd.py'}:workload", tmp_path, 0, 1))
        return made[-1]

    yield start
    for each in made:
        each.stop()


def answer(engine, order):
    engine.submit(order)
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (found := engine.wait(1.0)) is not None:
            return found[1]
    raise AssertionError("nothing came back")


@pytest.mark.parametrize(("mood", "words"), [("exit", "sys.exit(0)"), ("_exit", "status 0"), ("segfault", "SIGSEGV")])
def test_code_that_ends_the_process_has_failed_and_the_next_order_goes_on(engine, mood, words):
    here = engine(mood)
    found = answer(here, Order(1, "train", TRAIN, limit=120))
    assert found["status"] == Status.FAILED and words in found["reason"], found
    assert answer(here, Order(2, "hello", HELLO, limit=120))["status"] == Status.COMPLETE


def test_a_worker_that_was_killed_is_tried_again(engine):
    assert answer(engine("killed", times=1), Order(1, "train", TRAIN, limit=120))["status"] == Status.COMPLETE


def test_a_worker_that_is_killed_each_time_is_lost_and_says_how_often(engine, tmp_path):
    found = answer(engine("killed", times=99), Order(1, "train", TRAIN, limit=120))
    assert found["status"] == Status.LOST and f"the last of {RETRIES + 1} tries" in found["reason"], found
    assert "SIGKILL" in found["reason"] and "GiB" in found["reason"]
    assert len((tmp_path / "mark").read_text()) == RETRIES + 1


@pytest.mark.parametrize("mood", ["forks", "forks away"])
def test_a_forked_child_neither_outlives_the_time_limit_nor_holds_up_the_answer(engine, mood, tmp_path):
    here = engine(mood)
    found = answer(here, Order(1, "train", TRAIN, limit=10.0))
    assert found["status"] == Status.TIMED_OUT, found
    child = int((tmp_path / "mark").read_text())
    end = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.1)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert answer(here, Order(2, "hello", HELLO, limit=120))["status"] == Status.COMPLETE


def test_of_what_is_printed_the_end_is_kept(engine):
    here = engine("prints")
    assert answer(here, Order(1, "train", TRAIN, limit=120))["status"] == Status.COMPLETE
    said = here._workers[0]._process._said
    assert 0 < sum(map(len, said)) <= SAID


def test_a_process_that_the_kernel_killed_for_memory_is_told_from_one_that_somebody_killed(monkeypatch, tmp_path):
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 1\noom_kill 4\n")
    monkeypatch.setattr("quadriga.engine.process.KILLS", (counter, "oom_kill"))
    process = Process(json.dumps({"parent": os.getpid(), "workload": "-", "folder": "-", "seed": 0, "key": "", "threads": 1}))
    assert not process.starved
    counter.write_text("nr_free_pages 1\noom_kill 5\n")
    assert process.starved
    os.kill(process._process.pid, signal.SIGKILL)
    assert process.ended() == -signal.SIGKILL
    process.close()
