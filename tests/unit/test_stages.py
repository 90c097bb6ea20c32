"""The stations' own decisions, on made-up trials: budget, limits, gains, finalists, what pays."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from quadriga.core.errors import BadInput
from quadriga.core.metric import Floor, accuracy
from quadriga.core.recipe import Recipe, step
from quadriga.core.trial import Trial
from quadriga.engine.store import Store
from quadriga.measure.timings import Timings
from quadriga.search.allocate import Bar
from quadriga.stages.ablate import Ablation, Ablator, Row, _ratios
from quadriga.stages.baseline import _probes, gain_of
from quadriga.stages.explore import over_limit, scaled
from quadriga.stages.state import Budget, Options, Study
from quadriga.stages.training_cost import time_training
from quadriga.testing import tiny_mlp

FLOOR = Floor.parse("-0.5pt")


def made(minimize="latency", limits=None):
    """A study with a baseline and nothing else."""
    base = Trial(
        0,
        "baseline",
        Recipe(),
        values={"bytes": 1000.0, "seconds": 10.0, "parameters": 250.0, "train_flops": 3e6, "samples": 1000.0},
    )
    options = Options(FLOOR, minimize, limits or {})
    workload = SimpleNamespace(metric=accuracy, train=range(100), val=range(2000), test=range(10_000))
    study = SimpleNamespace(baseline=base, options=options, batches=(1, 64), workload=workload, eager=None)
    study.speed_ups = lambda values: Study.speed_ups(study, values)
    return study


def test_probes_of_a_slow_model_have_longer():
    pace = [Trial(0, "pace", Recipe(), values={"seconds": 344.0, "step": 2.5})]
    slow, plain = ({"pace": pace}, {})

    def study(stages, budget=600.0):
        return SimpleNamespace(stage=lambda n: stages.get(n, []), options=Options(FLOOR, budget=budget))

    assert Study.patience(study(slow), 90) == 200
    assert Study.patience(study(slow), 600) == 600
    assert Study.patience(study(plain), 60) == 60
    assert Study.patience(study(plain, 3600.0), 60) == 360, "a large budget can wait longer"


def test_probes_beside_the_baseline_are_of_what_is_searched():
    """Not of families that are left out, nothing twice, nothing that needs trained weights; none without a second worker."""
    mine, other, trained = (Recipe((step(name),)) for name in ("onnxruntime", "shrink", "prune_channels"))
    space = SimpleNamespace(
        illegal=lambda r: "not searched" if r == other else None, cost_part=lambda r: r, fixed=lambda r: int(r == trained)
    )
    study = SimpleNamespace(stage=lambda name: [], under_way=lambda name: [], space=space, workers=2)
    study.portfolio = [mine, other, trained, mine]
    assert _probes(study) == [mine]
    study.under_way = lambda name: [mine]
    assert _probes(study) == []
    study.under_way, study.workers = (lambda name: []), 1
    assert _probes(study) == []


def test_time_between_sessions_does_not_count(tmp_path):
    now = [100.0]
    with Store(tmp_path) as store:
        budget = Budget(60.0, store, lambda: now[0])
        with budget.phase("search"):
            now[0] += 20
        budget.keep()
    now[0] += 1000  # killed; the night passes
    with Store(tmp_path) as store:
        budget = Budget(60.0, store, lambda: now[0])
        assert budget.left == 40 and budget.phases == {"search": 20}
        now[0] += 50
        assert budget.left == -10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"minimize": "latencey"}, "latency"),
        ({"limits": {"byte": 0.2}}, "bytes"),
        ({"limits": {"bytes": -1.0}}, "positive"),
        ({"families": ("structur",)}, "structure"),
        ({"budget": 0.0}, "budget"),
    ],
)
def test_options_say_what_is_wrong(changes, words):
    with pytest.raises(BadInput, match=words):
        Options(FLOOR, **changes)


def test_gains_are_logarithms_of_improvements():
    assert gain_of(made(), {"speed/1": 4.0, "speed/64": 1.0}) == pytest.approx(math.log(2))
    assert gain_of(made("bytes"), {"bytes": 250.0}) == pytest.approx(math.log(4))
    cheap = made("train_cost")
    assert gain_of(cheap, {"pace": 0.5}, epochs=2.0) == pytest.approx(math.log(1000 / (2 * 100 * 0.5)))
    assert gain_of(cheap, {"pace": 0.5, "samples": 50.0}, epochs=2.0) == pytest.approx(math.log(1000 / (50 * 0.5)))


def test_speeds_are_against_eager_whatever_the_workers_reference_was():
    study = made()
    study.eager = Trial(1, "tuned_eager", Recipe(), values={"speed/1": 0.1, "speed/64": 0.25})
    assert study.speed_ups({"speed/1": 1.0, "speed/64": 1.0}) == [10.0, 4.0]


def test_limits_are_ratios_to_the_baseline():
    study = made(limits={"bytes": 0.2, "latency": 0.5})
    fast = {"speed/1": 4.0, "speed/64": 4.0}
    assert over_limit(study, {"bytes": 199.0, **fast}) == ""
    assert "0.201" in over_limit(study, {"bytes": 201.0, **fast})
    assert "latency" in over_limit(study, {"bytes": 100.0, "speed/1": 1.5, "speed/64": 1.5})


def test_scaling_keeps_the_shares_of_train_steps():
    recipe = scaled(Recipe((step("train", epochs=2), step("shrink"), step("train", epochs=6))), 4)
    assert [s.fields.get("epochs") for s in recipe.steps] == [1.0, None, 3.0]


def verdict(row, difference, values=None, **options):
    """What the ablation says of a step whose absence changes quality by `difference` points."""
    study = made(**options)
    study.paired = lambda trial: (difference, 30.0)
    ablator = Ablator.__new__(Ablator)
    ablator.study, ablator.bar = study, Bar(0.5, 2.24, 2000, 10_000)
    ablator.candidate = SimpleNamespace(recipe=Recipe((step("m"),)))
    ablator._changes_cost = lambda recipe, index: row.latency_ratio is not None
    return ablator._verdict(row, Trial(1, "ablation", Recipe(), values=values or {"bytes": 100.0}))


def row(**values):
    return Row(0, "m()", "m", "training", **values)


def test_a_step_pays_if_without_it_the_floor_is_in_danger():
    assert verdict(row(), difference=-1.0)[0] is True
    assert verdict(row(), difference=+3.0)[0] is False


def test_a_step_pays_if_without_it_the_objective_is_worse_beyond_chance():
    slower = {"value": 1.2, "low": 1.1, "high": 1.3, "verdict": "faster"}
    same = {"value": 1.0, "low": 0.98, "high": 1.02, "verdict": "equivalent"}
    unclear = {"value": 1.2, "low": 0.9, "high": 1.6, "verdict": "undecided"}
    assert verdict(row(latency_ratio=slower), 3.0)[0] is True
    assert verdict(row(latency_ratio=same), 3.0)[0] is False
    assert verdict(row(latency_ratio=unclear), 3.0)[0] is None  # it stays: nobody knows what it is worth
    assert verdict(row(latency_ratio=slower), 3.0, minimize="bytes")[0] is False
    assert verdict(row(bytes_ratio=2.0), 3.0, minimize="bytes")[0] is True


def test_a_step_pays_if_without_it_a_limit_breaks_or_training_costs_more():
    assert "limit" in verdict(row(), 3.0, {"bytes": 300.0}, limits={"bytes": 0.2})[1]
    assert verdict(row(train_cost_ratio=1.5), 3.0)[0] is True
    assert verdict(row(train_cost_ratio=0.7), 3.0)[0] is False


def test_an_ablation_comes_back_from_its_plain_form():
    one = Ablation([row(pays=True, why="x")], Recipe((step("a"),), "n"), Recipe((step("b"),), "n"), ["c"])
    again = Ablation.from_plain(one.plain())
    assert again == one and again.recipe.name == "n"


def test_two_rounds_of_timing_count_together():
    def timed(slow):
        found = Timings.empty([1, 64], ["whole", "0"], 6)
        for number in range(6):
            noise = 1 + 0.002 * (number % 3)
            for arm, seconds in (("whole", 1.0), ("0", slow)):
                found.add(arm, {b: [(seconds * noise, seconds)] * 4 for b in (1, 64)}, {})
        return found

    one = _ratios([timed(1.2)], ["whole", "0"], (1, 64))["0"]
    both = _ratios([timed(1.2), timed(1.25)], ["whole", "0"], (1, 64))["0"]
    assert one["value"] == pytest.approx(1.2) and one["verdict"] == "faster"
    assert both["value"] == pytest.approx(math.sqrt(1.2 * 1.25))


def test_training_is_timed_in_fresh_processes_and_weighed_by_its_examples(monkeypatch):
    """Half the time per example on a quarter of the examples: 8 times cheaper; a restart that fails counts for nothing."""
    opened, answers = (
        [],
        [{"baseline": [2.0, 2.2], "recipe": [1.0, 1.1]}] * 2 + [None] + [{"baseline": [4.0, 4.0], "recipe": [2.0, 2.0]}] * 2,
    )
    study = made("train_cost")
    study.budget, study.folder = SimpleNamespace(left=100.0), None
    study.engine = SimpleNamespace(renew=lambda: opened.append("renewed"))
    study.submit = lambda *a, **k: None
    study.forget = lambda: None

    def collect(deadline):
        found = answers.pop(0)
        return [SimpleNamespace(ok=found is not None, info={"blocks": found})]

    study.collect_all = collect
    found = time_training(study, Recipe(), samples=250.0)
    assert found["value"] == pytest.approx(8.0) and found["restarts"] == 4 and found["verdict"] == "faster"
    assert opened == ["renewed"] * 5
    assert time_training(study, Recipe(), samples=0.0) is None
    study.budget.left = 1.0
    assert time_training(study, Recipe(), samples=250.0) is None


def test_a_long_wait_says_what_is_under_way(tmp_path):
    """No phase of more than five seconds is silent; what is finished is not told of."""
    said, now = [], [0.0]
    target = SimpleNamespace(target={}, workers=2)
    engine = SimpleNamespace(submit=lambda order: None, resources=lambda: target, cancel=lambda: None)
    engine.wait = lambda timeout: now.__setitem__(0, now[0] + timeout)
    with Store(tmp_path) as store:
        study = Study(tiny_mlp(), Options(FLOOR), tmp_path, store, engine, None, lambda event: said.append(event["text"]))
        study.budget = Budget(600.0, store, lambda: now[0])
        study.say("search", "3 costed")
        study.submit("search", "train", Recipe((), "half as wide"))
        for _ in range(11):
            study.collect(1.0)
        assert said == ["3 costed", *["3 costed · training and scoring half as wide"] * 2]
        study.forget()
        for _ in range(11):
            study.collect(1.0)
    assert len(said) == 3
