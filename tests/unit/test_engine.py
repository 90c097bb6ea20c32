"""The store survives a kill; the local engine turns crashes, exhausted memory and time limits into results."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from quadriga.core.errors import BadInput
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Status, Trial
from quadriga.engine.store import Store

WRITER = """
import sys
from pathlib import Path
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Trial
from quadriga.engine.store import Store
store = Store(Path(sys.argv[1]))
for number in range(len(store.trials()), 100_000):
    store.add(Trial(number, "search", Recipe((step("train", epochs=1),)), values={"quality": number / 7}))
    print(number, flush=True)
"""


def test_an_acknowledged_trial_survives_sigkill(tmp_path):
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            last = [int(process.stdout.readline()) for _ in range(20)][-1]
            os.kill(process.pid, signal.SIGKILL)
        with Store(tmp_path) as store:
            trials = store.trials()
            assert len(trials) > last and [t.number for t in trials] == list(range(len(trials)))
            assert trials[last].values["quality"] == last / 7


def test_two_runs_cannot_share_a_folder(tmp_path):
    with Store(tmp_path), pytest.raises(BadInput, match="another run"):
        Store(tmp_path)
    Store(tmp_path).close()  # the lock goes with its holder


def test_a_damaged_or_newer_store_is_named(tmp_path):
    (tmp_path / "study.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(BadInput, match="damaged"):
        Store(tmp_path)


def test_trials_come_back_equal(tmp_path):
    trial = Trial(0, "search", Recipe((step("shrink", kernel=3),), "x"), 1, Status.DIVERGED, "nan", {"a": 0.1}, {"rung": 2})
    with Store(tmp_path) as store:
        store.add(trial)
    with Store(tmp_path) as store:
        assert store.trials() == [trial] and store.trials()[0].recipe.name == "x"


HOSTILE = """
import os, time, torch
from torch import nn
from quadriga.core.workload import Workload

class Odd(nn.Linear):
    def forward(self, x):
        if os.environ.get("MOOD") == "crash" and self.training:
            os._exit(3)
        if os.environ.get("MOOD") == "sleep" and self.training:
            time.sleep(60)
        return super().forward(x)

def workload():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=g), torch.randint(2, (64,), generator=g)
    return Workload(model=lambda: Odd(4, 2), train=(x, y), val=(x + 1, y), test=(x + 2, y), batch_size=16)
"""


@pytest.mark.parametrize(("mood", "status"), [("crash", Status.FAILED), ("sleep", Status.TIMED_OUT), ("", Status.COMPLETE)])
def test_the_engine_outlives_its_workers(tmp_path, monkeypatch, mood, status):
    from quadriga.engine.base import Order
    from quadriga.engine.local import Local

    file = tmp_path / "odd.py"
    file.write_text(HOSTILE)
    monkeypatch.setenv("MOOD", mood)
    engine = Local(f"{file}:workload", tmp_path, 0, 1)
    try:
        recipe = [{"method": "train", "epochs": 1}]
        args = {"recipe": recipe, "hash": "x", "batches": [1]}
        engine.submit(Order(1, "train", args, limit=8.0 if mood == "sleep" else 120.0))
        found = wait(engine)
        assert found[0] == 1 and found[1]["status"] == status, found
        if mood:
            engine.submit(Order(2, "hello", {"recipe": [], "hash": "y"}, limit=120.0))
            assert wait(engine)[1]["status"] == Status.COMPLETE
    finally:
        engine.stop()


def test_orders_are_given_up_and_processes_renewed(tmp_path, monkeypatch):
    """A cancelled order's result never comes, begun or not; others stay; a renewed engine knows nothing of them."""
    from quadriga.engine.base import Order
    from quadriga.engine.local import Local

    file = tmp_path / "odd.py"
    file.write_text(HOSTILE)
    monkeypatch.setenv("MOOD", "sleep")
    engine = Local(f"{file}:workload", tmp_path, 0, 1)
    try:
        assert engine.resources().workers == 1 and engine.resources().here
        hello, slow = {"recipe": [], "hash": "y"}, {"recipe": [{"method": "train", "epochs": 1}], "hash": "x", "batches": [1]}
        engine.submit(Order(1, "train", slow, limit=120.0))
        for number in (2, 3):
            engine.submit(Order(number, "hello", hello, limit=120.0))
        engine.cancel(2)
        while engine._workers[0].number != 1:
            time.sleep(0.01)
        engine.cancel(1)
        assert wait(engine)[0] == 3, "the sleeper was ended, the second order never begun"
        engine.submit(Order(4, "train", slow, limit=120.0))
        engine.renew()
        engine.submit(Order(5, "hello", hello, limit=120.0))
        assert wait(engine)[0] == 5
        engine.submit(Order(6, "train", slow, limit=120.0))
        engine.submit(Order(7, "hello", hello, limit=120.0))
        while engine._workers[0].number != 6:
            time.sleep(0.01)
        engine.cancel()
        assert not engine._waiting and engine._workers[0].number == 6, "what has begun goes on"
    finally:
        engine.stop()


def wait(engine):
    end = time.monotonic() + 150
    while time.monotonic() < end:
        if (found := engine.wait(1.0)) is not None:
            return found
    raise AssertionError("nothing came back")
