"""A heat on made-up speeds: what was fast beside other work is timed again alone; the best that holds the floor leads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from made_up import FLOOR, Engine, hardware_study

from quadriga.core.recipe import Recipe, step
from quadriga.engine.store import Store
from quadriga.stages import endings, heat
from quadriga.stages.explore import Explorer
from quadriga.stages.state import Budget, Options

ONE, ORT, OV, JOINT = step("threads", count=1), step("onnxruntime"), step("openvino"), step("batch_of_one")
BF16, INT8 = step("half_weights", kind="bf16"), step("quantize_int8")
RECIPES = {
    "ort": Recipe((ONE, ORT)),
    "ort, all threads": Recipe((ORT,)),
    "ort, either": Recipe((ONE, ORT, JOINT, ORT)),
    "ort, then bf16": Recipe((ONE, ORT, JOINT, BF16, OV)),
    "ort, then eager": Recipe((ONE, ORT, JOINT, step("eager"))),
    "eager": Recipe((step("eager"),)),
    "eager, 1 thread": Recipe((ONE, step("eager"))),
    "ov": Recipe((ONE, OV)),
    "bf16": Recipe((BF16, ONE, OV)),
    "bf16, all threads": Recipe((BF16, OV)),
    "int8": Recipe((INT8, ONE, OV)),
    "int8, all threads": Recipe((INT8, OV)),
}
NAMES = {recipe.hash: name for name, recipe in RECIPES.items()}
BUSY = {
    "ort": 4.0,
    "ort, all threads": 3.0,
    "ov": 1.5,
    "bf16": 3.0,
    "bf16, all threads": 2.0,
    "int8": 3.5,
    "int8, all threads": 3.6,
}
QUIET = {
    "ort": 4.0,
    "ort, all threads": 4.4,
    "ov": 1.5,
    "bf16": 4.1,
    "bf16, all threads": 5.0,
    "int8": 4.0,
    "int8, all threads": 4.9,
}
SINGLE = {}  # where it is another for one example


class Machine(Engine):
    """An engine that knows how fast and how good everything is."""

    def __init__(self, folder, bad=()):
        super().__init__(workers=2)
        self.folder, self.bad = folder, bad

    def wait(self, timeout):
        order = self.queue.pop(0)
        name = NAMES[Recipe.from_plain(order.args["recipe"]).hash]
        self.done.append((order.task, name))
        if "name" in order.args:
            (place := self.folder / "work/built" / order.args["name"]).mkdir(parents=True)
            (place / "load.py").touch()
        values = {"bytes": 100.0, "parameters": 10.0, "flops": 1.0}
        if order.task == "cost":
            values |= {f"speed/{b}": BUSY[name] for b in order.args["batches"]}
        return order.number, {"status": "complete", "values": values, "info": {"bad": name in self.bad}}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Makes a study whose search is over; the same folder gives the same study again."""
    open_stores = []

    def made(bad=(), **options):
        while open_stores:
            open_stores.pop().close()
        open_stores.append(store := Store(tmp_path))
        study = hardware_study(tmp_path, store, Machine(tmp_path, bad), **options)
        study.portfolio = []
        study.paired = lambda trial: (-5.0 if trial.info.get("bad") else 0.0, 1.0)
        explorer = Explorer(study, 0.0)
        for name in ("ort", "ort, all threads", "ov", "bf16", "int8") if len(study.trials) == 2 else ():
            explorer.queue = [RECIPES[name]]
            assert explorer._probe_one()
            explorer.remember(study.collect(1.0))
        if "ort" not in [n for task, n in study.engine.done if task == "train"] and len(study.trials) == 7:
            explorer.train(explorer.candidates[RECIPES["ort"].hash], explorer.allocator.top, 0.0, 0.0)
            explorer.remember(study.collect(1.0))
        study.engine.done.clear()
        return study, explorer

    def alone(study, arms, **how):
        study.engine.done.append(("timed", sorted(arms.values(), key=str)))
        of = lambda name, batch: QUIET[NAMES[name]] if batch > 1 else SINGLE.get(NAMES[name], QUIET[NAMES[name]])  # noqa: E731
        ratio = lambda rival, name, batch: SimpleNamespace(value=of(name, batch) / of(rival, batch))  # noqa: E731
        return SimpleNamespace(errors={}, ratio=ratio)

    monkeypatch.setattr(heat, "timed", alone)
    yield made
    while open_stores:
        open_stores.pop().close()


@pytest.fixture
def quiet(monkeypatch):
    """Sets the speeds of endings for one example and for a batch, alone; those that are not named are slow."""

    def say(**speeds):
        for name in {**QUIET, **speeds}:
            single, more = speeds.get(name, (1.5, 1.5))
            monkeypatch.setitem(SINGLE, name, single)
            monkeypatch.setitem(QUIET, name, more)

    return say


def names(explorer):
    return [NAMES[c.recipe.hash] for c in explorer.finalists()]


def test_what_is_fastest_alone_leads(opened):
    """Its ending was 25 % slower beside other work, and nobody had tried it with all threads."""
    study, explorer = opened()
    assert names(explorer) == ["ort"]
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "bf16, all threads"
    tasks = [task for task, _ in study.engine.done]
    assert tasks.count("timed") == 1 and tasks.count("train") == 1, "quality is measured of the fastest alone"
    assert len(next(arms for task, arms in study.engine.done if task == "timed")) == 6, "three endings, each twice; not ov"
    costs = {NAMES[t.recipe.hash]: t for t in study.stage("cost") if t.info.get("heat")}
    assert costs["bf16, all threads"].values["speed/1"] == pytest.approx(5.0) and "ort" not in costs


def test_a_large_budget_leaves_time_for_the_clock(opened, monkeypatch):
    """Of 90 s in a study of 25 minutes 60 were kept for scoring; what was built in the others was not timed."""
    study, explorer = opened(budget=1500.0)
    now = [0.0]
    study.budget = Budget(1500.0, study.store, lambda: now[0])
    monkeypatch.setattr(heat, "share", lambda study: 90.0)
    real = study.engine.wait

    def wait(timeout):
        now[0] += 6.0
        return real(timeout)

    monkeypatch.setattr(study.engine, "wait", wait)
    heat.heat(study, explorer, 1500.0 - 90.0 - explorer.ablating(next(iter(explorer.finalists()))))
    assert [task for task, _ in study.engine.done].count("timed") == 1 and names(explorer)[0] == "bf16, all threads"


def test_what_was_not_timed_is_noted(opened):
    study, explorer = opened()
    heat.heat(study, explorer, 1e6)
    assert any("were not timed alone" in note for note in study.notes)


def test_what_is_not_built_in_half_of_the_time_is_not_timed(opened, monkeypatch):
    """Else builds of 10 s, as of a quantized ResNet-20, would leave no time, and the leader of a busy machine would stay."""
    study, explorer = opened()
    now = [0.0]
    study.budget = Budget(600.0, study.store, lambda: now[0])
    real = study.engine.wait

    def slow(timeout):
        now[0] += 90.0
        return real(timeout)

    monkeypatch.setattr(study.engine, "wait", slow)
    monkeypatch.setattr(explorer, "ablating", lambda candidate: 0.0)
    heat.heat(study, explorer, 0.0)
    assert [len(arms) for task, arms in study.engine.done if task == "timed"] == [4]
    assert names(explorer)[0] != "ort"


def test_the_fastest_that_holds_the_floor_leads(opened):
    study, explorer = opened(bad=("bf16, all threads", "int8, all threads"))
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "ort, all threads"
    scored = [name for task, name in study.engine.done if task == "train"]
    assert scored == ["bf16, all threads", "int8, all threads"], "what differs in threads alone is not scored anew"
    taken = study.stage("search")[-1]
    assert NAMES[taken.recipe.hash] == "ort, all threads" and NAMES[study.trials[taken.info["as"]].recipe.hash] == "ort"


def test_little_more_is_not_worth_a_change(opened, monkeypatch):
    """All threads give one batch size what they take from the other; what is 4 % faster in the mean is not clearly better."""
    for name in ("bf16", "bf16, all threads", "int8", "int8, all threads", "ort, all threads"):
        monkeypatch.setitem(QUIET, name, 4.15)
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "ort" and "train" not in [task for task, _ in study.engine.done]


def test_one_ending_for_one_example_and_another_for_a_batch(opened, quiet):
    """Its quality is the worse of the two, its size that of both, and it is not timed again."""
    quiet(**{"ort": (4.0, 4.0), "bf16, all threads": (3.0, 7.0), "bf16": (2.0, 5.0)})
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "ort, then bf16"
    found = next(t for t in study.stage("cost") if NAMES.get(t.recipe.hash) == "ort, then bf16")
    assert [found.values[f"speed/{b}"] for b in study.batches] == pytest.approx([4.0, 7.0]) and found.values["bytes"] == 200.0
    assert [name for task, name in study.engine.done if task == "train"] == ["ort, then bf16"], "bf16 was not known"


@pytest.mark.parametrize(("limit", "expected"), [(0.6, "ort, then bf16"), (0.4, "ort, either")])
def test_two_endings_that_are_too_large_together_leave_the_place_to_others(opened, quiet, limit, expected):
    """Each has 100 bytes, a quarter of the baseline's; two that differ in threads alone have 100 together, others 200."""
    study, explorer = opened(limits={"bytes": limit})
    quiet(**{"ort": (4.0, 4.0), "ort, all threads": (3.0, 6.0), "bf16, all threads": (2.0, 9.0)})
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == expected


def test_the_quality_of_two_endings_is_that_of_the_worse(opened):
    study, explorer = opened(bad=("bf16",))
    explorer.train(explorer.candidates[RECIPES["bf16"].hash], explorer.allocator.top, 0.0, 0.0)
    explorer.remember(study.collect(1.0))
    recipe = RECIPES["ort, then bf16"]
    heat._acknowledge(study, explorer, recipe, {"speed/1": 9.0, "speed/64": 9.0, "bytes": 200.0, "parameters": 10.0})
    candidate = explorer.retimed(recipe)
    heat._take_over(study, explorer, candidate, explorer.allocator.top)
    assert study.trials[-1].values["bytes"] == 200.0 and not heat._qualifies(explorer, explorer.candidates[recipe.hash])
    assert NAMES[study.trials[study.trials[-1].info["as"]].recipe.hash] == "bf16"


def test_eager_is_in_the_heat_where_it_is_the_fastest_at_one_batch_size(opened, quiet, monkeypatch):
    """Or nearly so: beside other work it is timed worst. Of the unchanged network, which a search would not propose."""
    study, explorer = opened()
    leader = explorer.finalists()[0]
    assert "eager" not in {NAMES[r.hash] for r in heat.field_of(study.space, explorer, leader)}
    plain = study.stage("tuned_eager")[0]
    monkeypatch.setitem(plain.values, f"speed/{study.batches[-1]}", 2.4)
    explorer = Explorer(study, 0.0)  # all gains are over eager
    found = {NAMES[r.hash] for r in heat.field_of(study.space, explorer, leader)}
    assert {"eager", "eager, 1 thread"} <= found
    for name in ("eager", "eager, 1 thread"):
        monkeypatch.setitem(BUSY, name, 1.0)
    quiet(**{"ort": (4.0, 4.0), "eager": (1.0, 9.0), "eager, 1 thread": (1.0, 8.0)})
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "ort, then eager"


def test_where_either_number_of_threads_is_better_for_one_batch_size_both_are_taken(opened, quiet):
    """It is not timed again: its numbers are those of the two that it is made of."""
    quiet(**{"ort": (4.0, 4.0), "ort, all threads": (3.0, 9.0)})
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "ort, either"
    found = next(t for t in study.stage("cost") if NAMES[t.recipe.hash] == "ort, either")
    assert [found.values[f"speed/{b}"] for b in study.batches] == pytest.approx([4.0, 9.0])
    done = study.engine.done
    assert len(next(arms for task, arms in done if task == "timed")) == 6 and "train" not in [task for task, _ in done]
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "ort, either" and study.engine.done == [], "and a resumed study knows it"


@pytest.mark.parametrize(("single", "more"), [(4.1, 9.0), (3.0, 4.1), (5.0, 9.0)], ids=["as fast", "no gain", "better"])
def test_one_number_of_threads_is_enough_where_it_is_as_good_for_both(opened, quiet, single, more):
    quiet(**{"ort": (4.0, 4.0), "ort, all threads": (single, more)})
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    assert not [t for t in study.trials if NAMES.get(t.recipe.hash) == "ort, either"]


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({1: (4, 2), 0: (3, 5)}, (1, 0)),
        ({1: (4, 2), 0: (3, 5), 2: (2, 6)}, (1, 2)),
        ({1: (3, 2), 2: (4, 3), 0: (2, 6)}, (2, 0)),
        ({1: (4, 2), 2: (3.9, 5)}, None),  # for one example two are as good
        ({1: (3, 2), 0: (4, 5)}, None),
        ({1: (4, 5), 0: (3, 4)}, None),
        ({1: (4, 2)}, None),
    ],
)
def test_endings_are_joined_where_each_is_clearly_better(opened, speeds, expected):
    space = opened()[0].space
    ending = {n: (*([step("threads", count=n)] if n else []), OV) for n in range(3)}
    timed = [(Recipe((BF16, *ending[n])), {"speed/1": a, "speed/64": b, "bytes": 9.0}) for n, (a, b) in speeds.items()]
    found = endings.joined(space, timed)
    assert len(found) <= endings.PAIRS and bool(found) == bool(expected)
    if expected:
        one, more = expected
        assert found[0] == (
            Recipe((BF16, *ending[one], JOINT, BF16, *ending[more])),
            {"speed/1": speeds[one][0], "speed/64": speeds[more][1], "bytes": 9.0},
        )


def timed_as(*pairs):
    """Recipes, the first fastest for one example and the second for a batch."""
    return [(Recipe(r), {"speed/1": a, "speed/64": 10 - a, "bytes": 9.0}) for r, a in zip(pairs, (6, 3), strict=True)]


@pytest.mark.parametrize(
    ("one", "more", "expected"),
    [
        ((ONE, ORT), (BF16, OV), (ONE, ORT, JOINT, BF16, OV)),
        ((INT8, ONE, ORT), (BF16, OV), (INT8, ONE, ORT, JOINT, BF16, OV)),
        ((ONE, ORT), (step("eager"),), (ONE, ORT, JOINT, step("eager"))),
        ((ONE, step("inductor")), (step("eager"),), None),  # one number of threads for PyTorch
        ((ONE, step("inductor")), (ONE, step("eager")), (ONE, step("inductor"), JOINT, ONE, step("eager"))),
        ((step("matmul_backend"), ORT), (step("eager"),), None),  # it would be with other products than were timed
        ((step("matmul_backend"), ORT), (BF16, OV), (step("matmul_backend"), ORT, JOINT, BF16, OV)),
        (
            (step("entropy_storage"), ONE, ORT),
            (BF16, step("entropy_storage"), OV),
            (step("entropy_storage"), ONE, ORT, JOINT, BF16, OV),
        ),
        ((), (OV,), None),
    ],
)
def test_what_is_joined_is_what_was_timed(opened, one, more, expected):
    space = opened()[0].space
    found = endings.joined(space, timed_as(one, more))
    assert [r for r, _ in found] == ([Recipe(expected)] if expected else [])
    assert [values["bytes"] for _, values in found] == [18.0] * len(found), "other files"
    for recipe, _ in found:
        assert endings.halves(space, recipe)[0] == Recipe(one)


def test_a_single_batch_size_has_no_pairs(opened):
    space = opened()[0].space
    for size in ("speed/1", "speed/64"):
        assert endings.joined(space, [(r, {size: v[size], "bytes": 9.0}) for r, v in timed_as((ORT,), (OV,))]) == []
    assert endings.joined(space, []) == []


def test_a_resumed_study_times_nothing_again(opened):
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    study, explorer = opened()
    heat.heat(study, explorer, 0.0)
    assert names(explorer)[0] == "bf16, all threads" and study.engine.done == []


def test_what_is_known_to_miss_the_floor_is_not_in_the_heat(opened):
    study, explorer = opened(bad=("int8",))
    explorer.train(explorer.candidates[RECIPES["int8"].hash], explorer.allocator.top, 0.0, 0.0)
    explorer.remember(study.collect(1.0))
    leader = explorer.finalists()[0]
    found = heat.field_of(study.space, explorer, leader)
    assert {NAMES[r.hash] for r in found} == {"ort", "ort, all threads", "bf16", "bf16, all threads"}


@pytest.mark.parametrize("options", [{"minimize": "bytes"}, {"minimize": "train_cost"}])
def test_nothing_is_timed_where_latency_is_not_asked_for(opened, options):
    study, _ = opened()
    study.options = Options(FLOOR, budget=600.0, families=("hardware",), **options)
    assert heat.share(study) == 0.0
    study.options = Options(FLOOR, budget=60.0, families=("hardware",))
    assert heat.share(study) == 0.0, "and not in a short study"
    study.options = Options(FLOOR, budget=600.0, families=("hardware",))
    assert heat.share(study) == pytest.approx(108.0)
    study.options = Options(FLOOR, budget=600.0)
    assert heat.share(study) == 48.0, "less where networks are searched as well"
