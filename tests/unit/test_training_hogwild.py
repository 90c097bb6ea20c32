"""Workers that share weights: equal to the serial loop where nothing races, counted where it does, never left over."""

import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import herd
import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, Diverged, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import OptimizerSlot
from quadriga.engine.walk import walk
from quadriga.methods import build
from quadriga.methods.training.hogwild import Hogwild
from quadriga.parallel.block import Block
from quadriga.parallel.board import BINS, Board, Staleness
from quadriga.parallel.crew import Crew, WorkerFailed
from quadriga.testing import fingerprint, tiny_mlp
from quadriga.train import hogwild
from quadriga.train.checkpoint import read_state
from quadriga.train.loop import fit
from quadriga.train.seat import Measured, scaled
from quadriga.workloads import load

torch.set_num_threads(1)


def board(workers=2, **start):
    return Board(workers, multiprocessing.get_context("spawn").Lock(), start)


class Nobody:
    """A crew of no processes: worker 0 finds everybody assembled, and does all the work."""

    def __init__(self, workers, work, job):
        job.board.see["parked"][1:] = 2**62

    check = finish = kill = lambda self, *args: None


@pytest.fixture(autouse=True)
def _no_worker_is_left():
    """After each test, however it ends; other libraries' tests may have left pools of their own in this process."""
    before = {p.pid for p in multiprocessing.active_children()}
    yield
    assert {p.pid for p in multiprocessing.active_children()} <= before


def test_one_worker_is_serial_training():
    """One asked for is the plain loop, to the bit; one left of two, through all of the shared machinery, too."""
    found = []
    for workers, crew in ((0, Crew), (1, Crew), (2, Nobody)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hogwild, "Crew", crew)
            setup, data = herd.make(workers, seconds=0.0)
            outcome = fit(setup, data, epochs=2, seed=1)
        found.append((fingerprint(setup.model), outcome.steps, outcome.samples, outcome.loss))
        assert (outcome.staleness or {"histogram": {"0": outcome.steps}})["histogram"] == {"0": outcome.steps}
    assert found[0] == found[1] == found[2]
    assert not any(t.is_shared() for t in setup.model.state_dict().values())


def test_two_workers_share_the_stream_the_weights_and_the_state(tmp_path):
    """Both act; each epoch's examples are seen once; updates are stale and counted; the loss falls; and the end is kept."""
    setup, data = herd.make(2, herd.Noting(tmp_path))
    first = fit(herd.make(0)[0], data, epochs=1 / 6, seed=herd.SEED).loss
    outcome = fit(setup, data, epochs=12, seed=herd.SEED, checkpoint=tmp_path / "kept", every=0.0)
    rows = herd.seen(tmp_path)
    by = Counter(who for who, _ in rows)
    assert set(by) == {os.getpid(), next(p for p in by if p != os.getpid())} and min(by.values()) >= len(rows) / 6
    assert Counter(i for _, row in rows for i in row) == dict.fromkeys(range(len(data)), 12)
    found = outcome.staleness
    assert found["updates"] == outcome.steps == len(rows) == 72 and outcome.samples == 12 * len(data)
    assert 0.3 < found["mean"] <= found["max"] and sum(found["histogram"].values()) == 72
    assert found["mean"] == pytest.approx(sum(int(k) * n for k, n in found["histogram"].items()) / 72)
    assert outcome.loss < first and not outcome.exact and "2 workers" in outcome.note
    state = read_state(tmp_path / "kept")
    assert state.extra["done"] == 72 and len(state.extra["recent"]) == 72
    assert all("momentum_buffer" in entry for entry in state.optimizer["state"].values())
    assert not any(t.is_shared() for t in setup.model.state_dict().values())
    again, _ = herd.make(2, herd.Noting(tmp_path))
    loaded = fit(again, data, epochs=12, seed=herd.SEED, checkpoint=tmp_path / "kept")
    assert fingerprint(again.model) == fingerprint(setup.model) and loaded.staleness == found and len(herd.seen(tmp_path)) == 72


def test_the_first_part_is_made_alone(tmp_path, monkeypatch):
    """Half of the steps by this process, as the serial loop makes them; then another joins, and the stream goes on."""
    setup, data = herd.make(2, herd.Noting(tmp_path), seconds=0.03, alone=0.5)
    outcome = fit(setup, data, epochs=herd.EPOCHS, seed=herd.SEED)
    rows = herd.seen(tmp_path)
    assert {who for who, _ in rows[:12]} == {os.getpid()} and len({who for who, _ in rows[12:]}) == 2
    assert Counter(i for _, row in rows for i in row) == dict.fromkeys(range(len(data)), herd.EPOCHS)
    assert outcome.staleness["updates"] == outcome.steps == len(rows) == 24
    marks = []
    monkeypatch.setattr(hogwild, "Crew", None)  # nobody is called for a training that is made alone
    for workers, fields in ((0, {}), (2, {"alone": 1.0})):
        setup, data = herd.make(workers, seconds=0.0, **fields)
        fit(setup, data, epochs=1, seed=1)
        marks.append(fingerprint(setup.model))
    assert marks[0] == marks[1]


@pytest.mark.parametrize(("how", "words"), [("kill", "worker 1 of 2 was killed by SIGKILL"), ("raise", "an odd batch")])
def test_a_worker_that_fails_ends_the_run(tmp_path, how, words):
    """With its reason, with nobody left over, and with weights that are the process's own."""
    (tmp_path / "how").write_text(how)
    setup, data = herd.make(2, herd.Failing(tmp_path))
    with pytest.raises(WorkerFailed, match=words) as caught:
        fit(setup, data, epochs=50, seed=1)
    assert not any(t.is_shared() for t in setup.model.state_dict().values())
    assert how == "kill" or any("in worker 1 of 2" in note and "KeyError" in note for note in caught.value.__notes__)


def test_killed_parent_leaves_no_orphan_and_the_run_goes_on(tmp_path):
    """Workers hold the parent's standard output: its end is read when the last is gone. Then the same run is finished."""
    places = os.pathsep.join([str(Path(herd.__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, herd.__file__, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": places}
    )
    try:
        while not (tmp_path / "kept/state.json").exists() or len({who for who, _ in herd.seen(tmp_path)}) < 2:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.communicate(timeout=60)[0] == b"" and process.returncode == -signal.SIGKILL
    kept = read_state(tmp_path / "kept", fall_back=True).extra
    assert 1 < kept["done"] < 24 and not kept["finished"]
    before = len(herd.seen(tmp_path))
    setup, data = herd.make(2, herd.Noting(tmp_path), seconds=0.05)
    outcome = fit(setup, data, epochs=herd.EPOCHS, seed=herd.SEED, checkpoint=tmp_path / "kept", every=60)
    again = herd.seen(tmp_path)[before:]
    order = Counter(i for _, row in again for i in row)
    assert outcome.steps == 24 and len(again) == 24 - kept["done"] and outcome.staleness["updates"] == 24
    assert sum(order.values()) == herd.EPOCHS * len(data) - kept["position"] and max(order.values()) <= herd.EPOCHS


def test_a_recipe_is_made_anew_in_the_workers(tmp_path):
    """Through the workload's reference: its loss is a closure, which no process can be sent; two train steps, one continued."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from quadriga.testing import tiny_mlp\n\n\ndef workload():\n    return tiny_mlp((96, 32, 32), trained=True)\n"
    )
    smoothed = step("label_smoothing", amount=0.1)
    steps = (smoothed, step("optimizer", kind="adamw", lr=0.003), step("hogwild", scale=True), step("train", epochs=3))
    recipe = Recipe((*steps, step("train", epochs=2, **{"continue": True})))
    walked = walk(load(f"{file}:workload"), recipe, seed=0, store=tmp_path / "store", decisions=tmp_path / "decided")
    assert "NONDETERMINISTIC" in walked.setup.traits
    updates = [row["updates"] for row in walked.staleness]
    assert len(updates) == 2 and updates[0] * 2 == updates[1] * 3 and len(walked.notes) == 2


def test_staleness_is_counted_between_read_and_write_and_scales_the_rate():
    """Two updates by others between: the rate is a third for this step, and whole again after it."""
    meet, rates = board(3), []
    meet.updated(1, 0, 0, 1.0)  # before the read

    class Runner:
        def forward_backward(self, batch):
            meet.updated(1, 0, 1, 1.0)
            meet.updated(2, 0, 2, 1.0)
            return torch.tensor(0.5)

        def update(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    class Seat:
        board, rank, number = meet, 0, 3

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.6)
    for scale in (True, False):
        measured = Measured(Runner(), Seat, scale)
        measured.forward_backward(None)
        measured.update(optimizer)
    assert rates == pytest.approx([0.2, 0.6]) and optimizer.param_groups[0]["lr"] == 0.6
    assert meet.see["histogram"][0].tolist()[:4] == [0, 0, 2, 0] and meet.staleness.largest == 2
    with scaled(optimizer, 1.0):
        assert optimizer.param_groups[0]["lr"] == 0.6


def test_staleness_adds_up():
    one, two = Staleness.of([0, 3, 3]), Staleness.of([BINS + 5, 1])
    both = one + two
    assert both.counts[0] == 1 and both.counts[3] == 2 and both.counts[-1] == 1 and both.largest == BINS + 5
    assert both.mean == pytest.approx((6 + BINS + 6) / 5) and both.plain()["histogram"][f"{BINS - 1}+"] == 1
    assert Staleness.of_state(both.state()) == both and both.among(7).updates == 7 and both.among(7).total == both.total
    assert Staleness.of_state(None).mean == 0


def test_nobody_moves_while_they_are_asked_to_stand_still():
    """Over and over: what a worker does between two looks at the board is never under way inside."""
    meet, over, state = board(2), threading.Event(), {"busy": False, "turns": 0}

    def worker():
        while not over.is_set():
            meet.park(1)
            state["busy"] = True
            time.sleep(0)
            state["turns"], state["busy"] = state["turns"] + 1, False
        meet.leave(1)

    thread = threading.Thread(target=worker)
    thread.start()
    try:
        for number in range(40):
            time.sleep(0.002 * (number % 2))  # asked again at once, they may not even have woken up
            with meet.still(lambda: None):
                before = dict(state)
                time.sleep(0.001)
                assert not before["busy"] and state == before
    finally:
        over.set()
        thread.join()
    assert state["turns"] > 20
    with meet.still(lambda: None):  # of those who are gone nobody waits
        pass


def test_a_lock_whose_holder_died_is_watched():
    meet, calls = board(2), itertools.count()
    meet.lock.acquire()

    def watch():
        if next(calls):
            raise WorkerFailed("gone")

    with pytest.raises(WorkerFailed), meet.locked(watch):
        pass


def test_one_who_hangs_is_not_waited_for_for_ever(monkeypatch):
    """Neither where all are to stand still nor at the end; the others are left until then."""
    table, watched, clock = board(3, asked=1), [], itertools.count(step=1000)
    table.leave(2)
    with pytest.raises(WorkerFailed, match="worker 1 of 3: no end of a step for 30 minutes"):
        table.assemble(lambda: watched.append(1), clock=lambda: next(clock))
    assert len(watched) == 2, "1000 s are nothing out of the way"
    crew = Crew(1, print, None)
    crew.workers, crew.processes = 2, {"pipe": (1, None)}
    monkeypatch.setattr(crew, "check", lambda timeout: watched.append(timeout))
    with pytest.raises(WorkerFailed, match="worker 1 of 2: no end of a step"):
        crew.finish(clock=lambda: next(clock))
    assert watched == [1, 1, 1.0, 1.0]


def test_a_block_keeps_values_types_and_formats():
    given = {
        "images": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(7), "empty": torch.empty(0), "half": torch.randn(3).bfloat16(), "mask": torch.ones(2) > 0,
    }  # fmt: skip
    block = Block(given)
    for name, t in given.items():
        view = block.view(name)
        assert torch.equal(view, t) and view.dtype == t.dtype and view.stride() == t.stride() and block.holds(view)
    block.view("count").add_(1)
    assert int(block.view("count")) == 8 and int(given["count"]) == 7 and not block.holds(given["count"])


def closure(output, batch, *, bound=None):
    return nn.functional.cross_entropy(output, batch.target, reduction="none")


class Replacing(nn.BatchNorm1d):
    """Puts a new tensor in the place of a buffer."""

    def forward(self, x):
        self.running_mean = self.running_mean * 0.9 + 0.1 * x.mean(0).detach()
        return x


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass


def ready(method=None, workload=tiny_mlp, **fields):
    setup = Setup.of(workload(), seed=0, evaluate=lambda model: 0.0)
    setup = build(step(method, **fields))(setup) if method else setup
    return Hogwild()(setup)


def refusal(setup, workload=tiny_mlp):
    with pytest.raises(NotApplicable) as caught:
        fit(setup, workload().train, epochs=2, seed=0)
    assert caught.value.remedy and caught.value.__notes__ == ["hogwild"]
    return caught.value.reason


def test_what_keeps_a_state_beside_tensors_is_refused():
    """Hooks, optimizers, layers and runtimes, each with the reason, before any process is started."""
    for method, words in (
        ("ema", "Average"),
        ("lookahead", "SlowWeights"),
        ("prune_data", "Pruning"),
        ("early_stopping", "state"),
    ):
        assert words in refusal(ready(method))
    assert "ScheduleFree" in refusal(ready("optimizer", kind="schedule_free"))
    setup = ready()
    setup.model[0] = Extra(*setup.model[0].weight.shape[::-1])
    assert "layer 0" in refusal(setup)
    for fields, words in (({"compile": True}, "compile"), ({"device": "cuda"}, "cuda"), ({"autocast": "fp16"}, "fp16")):
        spec = replace(setup.runtime, **fields)
        if "device" in fields or "compile" in fields:
            with pytest.raises(NotApplicable, match=words):
                Hogwild()(replace(Setup.of(tiny_mlp()), runtime=spec))
        with pytest.raises(NotApplicable, match=words):
            hogwild.check_run(type("R", (), {"setup": replace(setup, runtime=spec)}))
    with pytest.raises(NotApplicable, match="already"):
        Hogwild()(ready())
    assert fit(Hogwild(workers=1)(build(step("ema"))(Setup.of(tiny_mlp(), seed=0))), tiny_mlp().train, epochs=1, seed=0).exact
    with pytest.raises(BadInput, match=r"hogwild\.workers is 0"):
        Hogwild(workers=0)
    with pytest.raises(BadInput, match=r"hogwild\.alone is 2"):
        Hogwild(alone=2.0)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "adafactor", "muon"])
def test_optimizers_whose_state_can_be_shared(kind, monkeypatch):
    """They change tensors in place: after steps on shared memory all of it is still there, and the result is the serial one."""
    monkeypatch.setattr(hogwild, "Crew", Nobody)
    marks = []
    for setup in (ready("optimizer", kind=kind), replace(Setup.of(tiny_mlp(), seed=0))):
        if setup.training.asynchronous is None:
            setup = build(step("optimizer", kind=kind))(setup)
        assert math.isfinite(fit(setup, tiny_mlp().train, epochs=1, seed=0).loss)
        marks.append(fingerprint(setup.model))
    assert marks[0] == marks[1]


def test_optimizers_whose_state_cannot():
    pytest.importorskip("pytorch_optimizer")
    for kind in ("lion", "soap", "adan", "prodigy"):
        assert refusal(ready("optimizer", kind=kind))


def test_a_tensor_that_is_replaced_is_noticed(monkeypatch):
    monkeypatch.setattr(hogwild, "Crew", Nobody)
    setup = ready()
    setup.model.insert(1, Replacing(setup.model[0].out_features))
    assert "replaces model/1.running_mean" in refusal(setup)
    assert not setup.model[0].weight.is_shared()


def test_what_cannot_be_sent_is_refused():
    setup = ready()
    odd = lambda output, batch: closure(output, batch)  # noqa: E731
    assert "cannot be given" in refusal(replace(setup, training=replace(setup.training, loss=odd)))


def test_a_loss_that_is_not_finite_goes_back_once(monkeypatch):
    """As in the plain loop: at a tenth of the rate, and then it is an error; nothing stays shared."""
    monkeypatch.setattr(hogwild, "Crew", Nobody)
    setup = ready()
    spoilt = replace(setup.training, loss=lambda o, b: closure(o, b) * (math.nan if o.abs().max() > 1.5 else 30.0))
    setup = replace(setup, training=spoilt, optimizer=OptimizerSlot(lambda m: torch.optim.SGD(m.parameters(), lr=3.0)))
    with pytest.raises(Diverged):
        fit(setup, tiny_mlp().train, epochs=3, seed=0)
    assert not any(t.is_shared() for t in setup.model.state_dict().values())
