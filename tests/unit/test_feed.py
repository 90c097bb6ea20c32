"""How examples reach the loop: the same batches however they are read, each example once, whoever dies on the way."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import feeding
import psutil
import pytest
import torch
from feeding import Broken, Deadly, Hanging, Noisy, trained
from torch.utils.data import DataLoader, TensorDataset

from quadriga.core.data import DatasetData, TensorData, as_data
from quadriga.core.errors import BadInput
from quadriga.core.setup import Setup
from quadriga.testing import tiny_mlp
from quadriga.train.data import Sampler
from quadriga.train.feed import RESTARTS, Feed, read, resident
from quadriga.train.run import Run
from quadriga.train.starting import start_methods
from quadriga.train.step import prepared

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def straight():
    """Trained without workers and without an accident."""
    mark, _, indices = trained(Noisy(), 0)
    return mark, indices


def feed_of(dataset, workers=2, size=8, timeout=60.0):
    """A feed and the order that it follows."""
    order = Sampler(len(dataset), size, seed=3)
    return Feed(DatasetData(dataset, workers=workers, timeout=timeout), 3, lambda p: order.indices(p), CPU), order


BEFORE = set()  # processes that other tests have left: tinygrad's compiler lives as long as this one


@pytest.fixture(autouse=True)
def _before():
    BEFORE.clear()
    BEFORE.update(p.pid for p in multiprocessing.active_children())


def children():
    """Processes that read data, by their id."""
    return {p.pid for p in multiprocessing.active_children()} - BEFORE


def test_tensors_on_the_cpu_are_read_as_a_bare_loop_reads_them():
    """The loop holds the very split, and no feed stands between."""
    workload = tiny_mlp()
    with prepared(Setup.of(workload)) as runner:
        loader = Run(Setup.of(workload), workload.train, runner, 1, 0, time.monotonic).loader
    assert loader.data is workload.train and loader.feed is None
    assert resident(workload.train, CPU) is workload.train


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_tensors_that_fit_stay_on_the_device():
    data, index = TensorData(torch.arange(40.0), torch.arange(40)), torch.tensor([3, 1, 7])
    there = resident(data, torch.device("cuda"))
    batch = there.batch(index.cuda())
    assert batch.inputs.device.type == "cuda" and batch.target.cpu().tolist() == [3, 1, 7]


@pytest.mark.parametrize("fits", [True, False])
def test_half_of_the_free_memory_is_the_limit(monkeypatch, fits):
    data, moved = TensorData(torch.zeros(100), torch.zeros(100)), []
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1600 if fits else 1599, 0))
    monkeypatch.setattr("quadriga.train.feed.to_device", lambda tree, device: moved.append(device) or tree)
    assert (resident(data, torch.device("cuda")) is data) is not fits
    assert len(moved) == (2 if fits else 0)


def test_a_loader_of_the_user_gives_its_workers():
    data = as_data(DataLoader(TensorDataset(torch.zeros(4, 1)), num_workers=1, timeout=7))
    assert (data.workers, data.timeout) == (1, 7)
    assert as_data(TensorDataset(torch.zeros(4, 1))).workers == 0


def test_workers_give_the_batches_that_the_loop_reads_itself():
    """Random examples too, in any order of asking: as expected, of another size, from another place."""
    dataset = Noisy()
    feed, order = feed_of(dataset)
    alone, _ = feed_of(dataset, workers=0)
    try:
        for position, size in ((0, 8), (8, 8), (16, 12), (28, 12), (40, 8), (80, 8), (88, 16), (104, 8)):
            index = order.indices(position, size)
            mine, other = feed.batch(index, position), alone.batch(index, position)
            assert torch.equal(mine.inputs, other.inputs) and torch.equal(mine.target, other.target)
            assert mine.index is index
        assert feed.delivered == 8 and not feed.reason
    finally:
        feed.close()
    assert not children()


def test_reading_leaves_the_loops_generators_alone():
    dataset = Noisy()
    feed, order = feed_of(dataset, workers=0)
    before = torch.get_rng_state()
    feed.batch(order.indices(0), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_equal_for_any_number_of_workers(straight):
    for workers in (1, 2):
        mark, outcome, indices = trained(Noisy(), workers)
        assert mark == straight[0] and torch.equal(indices, straight[1]) and not outcome.note
    assert not children()


def test_a_killed_worker_is_replaced(straight, tmp_path):
    """SIGKILL in the middle of a batch: the weights are those of a straight run, and each epoch has each example once."""
    mark, outcome, indices = trained(Deadly(tmp_path / "marks", 17), 2)
    assert mark == straight[0]
    assert [sorted(epoch.tolist()) for epoch in indices.view(2, 96)] == [list(range(96))] * 2
    assert outcome.exact


def test_a_worker_killed_from_outside_is_replaced():
    """Whenever it is: between batches, while it idles, while it reads."""
    feed, order = feed_of(Noisy())
    alone, _ = feed_of(Noisy(), workers=0)
    try:
        for step in range(24):
            index = order.indices(8 * step)
            assert torch.equal(feed.batch(index, 8 * step).inputs, alone.batch(index, 8 * step).inputs)
            if step in (1, 8, 15):
                alive = [p.pid for p in feed.pool._processes.values() if p.is_alive()]  # one that was hit may not be missed yet
                for pid in alive[:1]:
                    os.kill(pid, signal.SIGKILL)
        assert 1 <= feed.replaced <= 3 and "no example was lost" in feed.note and feed.workers == 2
    finally:
        feed.close()


def test_after_some_deaths_the_loop_reads_by_itself(tmp_path):
    """An example that kills whoever reads it in a worker, as where memory is short, is read by the loop at last."""
    times = RESTARTS + 2  # the first counts for the way to start workers
    feed, order = feed_of(Deadly(tmp_path / "marks", int(Sampler(96, 8, seed=3).indices(0)[0]), times))
    index = order.indices(0)
    batch = feed.batch(index, 0)
    assert torch.equal(batch.inputs, read(DatasetData(Noisy()), 3, 0, index).inputs)
    assert feed.workers == 0 and "read by itself" in feed.note and not children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_cannot_be_read_is_named(workers):
    with pytest.raises(BadInput, match=r"example 17 of the data set cannot be read: IndexError.*feeding\.py") as caught:
        trained(Broken(), workers)
    assert any("Traceback" in note and "return [][i]" in note for note in caught.value.__notes__)
    assert not children()


def test_an_example_that_never_comes_is_named():
    """The workers are replaced once; whoever hangs is not waited for."""
    with pytest.raises(BadInput, match=r"17.* took longer than 1\.5 s to read, twice"):
        trained(Hanging(), 1, timeout=1.5)
    assert not children()


def test_data_that_a_fresh_process_cannot_have_is_forked():
    """A collate function without a name cannot be pickled; the module of a user's file cannot be imported."""
    data = DatasetData(Noisy(), collate=lambda items: (torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])))
    data.workers = 1
    order = Sampler(96, 8, seed=3)
    feed = Feed(data, 3, lambda p: order.indices(p), CPU)
    try:
        assert torch.equal(feed.batch(order.indices(0), 0).inputs, read(data, 3, 0, order.indices(0)).inputs)
        assert "forkserver failed" in feed.reason and feed.methods == ["fork"] and not feed.note
    finally:
        feed.close()
    own = type("Own", (Noisy,), {"__module__": "quadriga_file_of_somebody"})
    assert start_methods(DatasetData(own())) == (
        ["fork"], "a fresh process cannot import quadriga_file_of_somebody, which defines the data"
    )  # fmt: skip
    assert start_methods(DatasetData(Noisy()))[0] == ["forkserver", "fork"]


def run(folder, workers, kill=0):
    words = [sys.executable, feeding.__file__, str(folder), str(workers), str(kill)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_a_killed_run_goes_on_with_each_example_once(straight, tmp_path):
    """Killed at step 8 of 12 while workers read ahead; resumed with another number of them. No worker outlives its parent."""
    before = {p.pid for p in psutil.process_iter()}
    assert run(tmp_path, 2, kill=8).returncode == -signal.SIGKILL
    again = run(tmp_path, 1)
    assert again.returncode == 0, again.stderr
    mark, exact, *indices = again.stdout.split()
    assert (mark, exact) == (straight[0], "True")
    assert [int(i) for i in indices] == straight[1].tolist()
    end = time.monotonic() + 20
    while (left := orphans(before)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def orphans(before):
    """Processes of ours that came after those and have no parent of ours."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "username"]):
        words = process.info["cmdline"] or []
        if process.info["pid"] not in before and any(Path(w).name == "feeding.py" or "forkserver" in w for w in words):
            found.append(words)
    return found
