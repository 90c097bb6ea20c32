"""The search on an engine that is too slow for one probe: it is tried again, once, before anything is guessed."""

from __future__ import annotations

import pytest
from made_up import Engine, hardware_study

from quadriga.core.recipe import Recipe, step
from quadriga.engine.store import Store
from quadriga.stages.explore import Explorer

ORT, BF16 = (Recipe((*first, step("threads", count=1), step(last))) for first, last in
             (((), "onnxruntime"), ((step("half_weights", kind="bf16"),), "openvino")))  # fmt: skip


class Slow(Engine):
    """An engine on which a probe of bfloat16 takes so many seconds; the other takes none."""

    def __init__(self, seconds):
        super().__init__(workers=1)
        self.seconds = seconds

    def wait(self, timeout):
        if not self.queue:
            return None
        order = self.queue.pop(0)
        recipe = Recipe.from_plain(order.args["recipe"])
        self.done.append((order.task, recipe, order.limit))
        if recipe == BF16 and order.limit < self.seconds:
            return order.number, {"status": "timed out", "reason": "it ran longer than its limit"}
        speed = {f"speed/{b}": 3.0 if recipe == BF16 else 2.0 for b in order.args["batches"]}
        return order.number, {"status": "complete", "values": {"bytes": 100.0, "parameters": 10.0, **speed}, "info": {}}


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Makes an explorer of a portfolio of two, whose proposals are none; the folder is always the same."""
    stores = []

    def made(seconds, budget=600.0):
        while stores:
            stores.pop().close()
        stores.append(store := Store(tmp_path))
        study = hardware_study(tmp_path, store, Slow(seconds), budget)
        study.portfolio = [BF16, ORT]
        monkeypatch.setattr(study, "paired", lambda trial: (0.0, 1.0))
        explorer = Explorer(study, 0.0)
        monkeypatch.setattr(explorer, "_propose", lambda: False)
        return study, explorer

    yield made
    while stores:
        stores.pop().close()


def probes(study):
    return [limit for task, recipe, limit in study.engine.done if task == "cost" and recipe == BF16]


def test_a_probe_that_ran_into_its_limit_is_tried_once_more(search):
    study, explorer = search(200)
    explorer.run()
    first, second = probes(study)
    assert first == 90 and second == pytest.approx(270, abs=1)
    assert explorer.finalists()[0].recipe == BF16, "it was the fastest"


def test_what_is_too_slow_twice_stays_out(search):
    study, explorer = search(1000)
    explorer.run()
    assert len(probes(study)) == 2 and explorer.finalists()[0].recipe == ORT


def test_a_resumed_search_counts_what_was_tried_before(search):
    study, explorer = search(200)
    explorer._probe_one()
    explorer.remember(study.collect(1.0))
    study, explorer = search(200)
    explorer.run()
    assert len(probes(study)) == 1, "the second try"
    study, explorer = search(1000)
    explorer.run()
    assert not probes(study)


def test_there_is_no_second_try_without_time(search):
    study, explorer = search(50, budget=60.0)
    study.engine.seconds = 1000
    explorer.run()
    assert len(probes(study)) == 1 and explorer.finalists()[0].recipe == ORT
