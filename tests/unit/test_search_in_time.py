"""A search over made-up candidates on a made-up clock: what it does with its budget, and what it leaves for the end."""

from __future__ import annotations

import math

import pytest
from made_up import FLOOR, Engine

from quadriga import methods
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Status, Trial
from quadriga.engine.base import Resources
from quadriga.engine.store import Store
from quadriga.search.space import Space, trained_epochs
from quadriga.stages.explore import Explorer
from quadriga.stages.opening import _for_search
from quadriga.stages.prices import ABLATION, ablation_seconds
from quadriga.stages.state import Budget, Options, Study
from quadriga.testing import tiny_mlp

EPOCH, PROBE, STARTUP = 10.0, 5.0, 4.0  # seconds
INT8, ONE, OV, ORT = (
    step("quantize_int8", activations="static"),
    step("threads", count=1),
    step("openvino"),
    step("onnxruntime"),
)
UNCHANGED = (Recipe((ONE, ORT), "export"), Recipe((INT8, ONE, OV), "int8"))


def pruned(ratio):
    ending = (step("optimizer", kind="adamw", lr=0.003), step("schedule", kind="wsd", decay=0.4), step("train", epochs=5))
    head = (step("distill", teacher="present"), step("prune_channels", ratio=ratio, scope="layer"))
    return Recipe((*head, *ending, ONE, ORT), f"without {ratio}")


class Clocked(Engine):
    """Two workers; quality is a curve of the epochs that were trained, speed goes with the ratio and the ending."""

    def __init__(self, start, rise):
        super().__init__(workers=2)
        self.now, self.start, self.rise, self.ends, self.plain = 0.0, start, rise, [], 2.0

    def resources(self):
        return Resources(self.workers, {}, startup=STARTUP)

    def submit(self, order):
        recipe = Recipe.from_plain(order.args["recipe"])
        free = sorted(self.ends)[-2] if len(self.ends) > 1 else self.now
        seconds = PROBE if order.task == "cost" else 2.0 + EPOCH * 0.6 * trained_epochs(recipe)
        self.ends.append(max(self.now, free) + seconds)
        self.queue.append((self.ends[-1], order, recipe))

    def wait(self, timeout):
        if not self.queue:
            return None
        self.queue.sort(key=lambda row: row[0])
        end, order, recipe = self.queue.pop(0)
        self.now = max(self.now, end)
        self.done.append((order.task, recipe))
        return order.number, {"status": "complete", "values": self.values(order, recipe), "info": {}}

    def values(self, order, recipe):
        ratio = next((s.fields["ratio"] for s in recipe.steps if s.method == "prune_channels"), 0.0)
        runtime = 4.0 if INT8 in recipe.steps else self.plain
        speed = runtime / (1 - ratio) ** 1.5
        found = {"bytes": 100.0 * (1 - ratio), "parameters": 10.0, **{f"speed/{b}": speed for b in order.args["batches"]}}
        if order.task != "train":
            return found
        epochs = trained_epochs(recipe)
        lost = self.start * ratio - self.rise * math.log1p(8 * epochs) if ratio else 0.05 * (INT8 in recipe.steps)
        return {**found, "quality": 90.0 - lost, "difference": -lost, "seconds": EPOCH * 0.6 * epochs, "samples": epochs * 96}


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Makes an explorer of a trained network's portfolio; the clock is that of its engine."""
    stores = []

    def made(budget=600.0, start=12.0, rise=1.6, ratios=(0.5, 0.3, 0.7), propose=False):
        stores.append(store := Store(tmp_path / str(len(stores))))
        cards = {c["name"]: {**_for_search(c, ()), "unsearched": ""} for c in methods.cards()}
        traits = frozenset({"TRAINED", "FLOAT_WEIGHTS", "TRAIN_DATA", "LOGITS", "TEACHER", "CLASSES"})
        families = ("structure", "training", "optimizer", "hardware")
        engine, task = Clocked(start, rise), tiny_mlp(trained=True)
        study = Study(
            task, Options(FLOOR, budget=budget), tmp_path, store, engine,
            Space(cards, traits, Recipe(), frozenset(families)), lambda event: None,
        )  # fmt: skip
        study.budget = Budget(budget, store, lambda: engine.now)
        known = {"quality": 90.0, "bytes": 400.0, "seconds": 0.0, "samples": 0.0, "parameters": 10.0}
        study.add(Trial(0, "baseline", Recipe(), 0, Status.COMPLETE, "", known))
        study.add(Trial(1, "tuned_eager", Recipe(), 0, Status.COMPLETE, "", {f"speed/{b}": 1.0 for b in study.batches}))
        pace = Recipe((step("train", epochs=1),))
        study.add(Trial(2, "pace", pace, 0, Status.COMPLETE, "", {"seconds": EPOCH, "step": 0.1}))
        study.portfolio = [*UNCHANGED, *map(pruned, ratios)]
        monkeypatch.setattr(
            study, "paired", lambda trial: (trial.values["difference"], 3.0 if trial.values["samples"] else 0.5)
        )
        explorer = Explorer(study, reserve=60.0)
        if not propose:
            monkeypatch.setattr(explorer, "_propose", lambda: False)
        return study, explorer

    yield made
    for store in stores:
        store.close()


def trainings(study):
    return [r for task, r in study.engine.done if task == "train" and any(s.is_train for s in r.steps)]


def test_the_fastest_that_can_recover_wins_and_the_ending_is_the_best_of_the_unchanged(search):
    study, explorer = search()
    explorer.run()
    winner = explorer.finalists()[0]
    assert {s.method for s in winner.recipe.steps} >= {"prune_channels", "quantize_int8", "openvino"}
    assert winner.recipe.name in ("without 0.5", "without 0.7") and math.exp(winner.gain) > 8
    heads = {s.method for r in trainings(study) for s in r.steps if s.method in ("openvino", "onnxruntime")}
    assert heads == {"openvino"}, "none was trained with the slower ending"


def test_one_network_is_not_trained_twice_at_once(search, monkeypatch):
    """Two workers trained each network of MobileNetV2 side by side, for two endings, and nothing was left for its recovery."""
    study, explorer = search()
    study.engine.plain = 3.5  # two endings that are nearly as fast
    submit, under_way, twice = study.engine.submit, {}, []

    def watched(order):
        recipe = Recipe.from_plain(order.args["recipe"])
        if order.task == "train" and any(s.method == "prune_channels" for s in recipe.steps):
            front = str([s for s in recipe.steps if s.method not in ("quantize_int8", "threads", "openvino", "onnxruntime")])
            twice.extend(n for n, other in under_way.items() if other == front)
            under_way[order.number] = front
        submit(order)

    wait = study.engine.wait

    def told(timeout):
        found = wait(timeout)
        if found is not None:
            under_way.pop(found[0], None)
        return found

    monkeypatch.setattr(study.engine, "submit", watched)
    monkeypatch.setattr(study.engine, "wait", told)
    monkeypatch.setattr("quadriga.stages.explore.Explorer._keep_the_faster", lambda self, candidate: None)
    explorer.run()
    assert not twice and any(s.method == "prune_channels" for s in explorer.finalists()[0].recipe.steps)


def test_a_rising_candidate_is_carried_on_until_it_holds(search):
    study, explorer = search()
    explorer.run()
    lengths = [trained_epochs(r) for r in trainings(study) if any(s.fields.get("ratio") == 0.5 for s in r.steps)]
    assert len(lengths) > 1 and lengths == sorted(lengths)


def test_what_never_recovers_leaves_the_time_to_others_and_the_notes_say_what_it_lacked(search):
    study, explorer = search(start=60.0, rise=0.1)
    explorer.run()
    assert "prune_channels" not in {s.method for s in explorer.finalists()[0].recipe.steps}
    told = [n for n in study.notes if "short of what proves the floor" in n]
    assert told and all("times as fast as eager PyTorch" in n and "epochs" in n for n in told)


def test_time_is_left_for_the_ablation_of_the_winner_and_the_verification(search):
    for budget in (300.0, 600.0, 1500.0):
        study, explorer = search(budget)
        explorer.run()
        winner = explorer.finalists()[0]
        assert study.budget.left >= 60.0 + 0.9 * explorer.ablating(winner) - 2.0
        assert explorer.ablating(winner) <= ABLATION * budget


def test_no_candidate_waits_while_a_tenth_of_the_budget_is_left(search):
    study, explorer = search(900.0)
    explorer.run()
    unused = study.budget.left - explorer.reserve - explorer.ablating(explorer.finalists()[0])
    waiting = [c for c in explorer.candidates.values() if explorer.allocator.open(c) and c.gain > explorer.finalists()[0].gain]
    assert unused < 90.0 or not waiting


def test_of_one_network_in_two_runtimes_the_slower_is_not_trained(search):
    """Beside int8 the float ending is kept, which is safer; beside another float one it is not."""
    _, explorer = search()
    explorer.run()
    assert explorer.lead.same_network(pruned(0.5), Recipe((*pruned(0.5).steps[:-1], OV)))
    assert not explorer.lead.same_network(pruned(0.5), pruned(0.3))
    pair = [Recipe((*pruned(0.4).steps[:-1], last)) for last in (ORT, OV)]
    costs = [
        Trial(n, "cost", r, 0, Status.COMPLETE, "", {"speed/1": s, "speed/32": s, "bytes": 1.0})
        for n, (r, s) in enumerate(zip(pair, (3.0, 5.0), strict=True))
    ]
    for recipe, cost in zip(pair, costs, strict=True):
        explorer._enter(recipe, cost)
    assert "the same network is faster as openvino" in explorer.candidates[pair[0].hash].dead
    assert not explorer.candidates[pair[1].hash].dead


def test_an_ablation_is_priced_by_the_steps_that_have_to_be_trained_again(search):
    study, _ = search(10_000.0)
    hardware = ablation_seconds(study, Recipe((INT8, ONE, OV)), 0.0)
    short, long = (ablation_seconds(study, pruned(0.5), seconds) for seconds in (10.0, 100.0))
    assert hardware < short < long and long - short == pytest.approx(4 * 90.0 / study.workers)
    assert ablation_seconds(study, pruned(0.5), 1e6) == ABLATION * 10_000.0


def test_edits_of_what_runs_fastest_do_not_keep_the_portfolio_waiting(search):
    """A mobile network of timm was costed in 27 runtimes and precisions, while what would have made it smaller waited."""
    study, explorer = search(propose=True)
    explorer.run()
    costed = [r for task, r in study.engine.done if task == "cost"]
    first = next(n for n, r in enumerate(costed) if any(s.method == "prune_channels" for s in r.steps))
    assert first <= len(UNCHANGED), "they come right behind the unchanged network's own"
    assert "prune_channels" in {s.method for s in explorer.finalists()[0].recipe.steps}
