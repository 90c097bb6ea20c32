"""Early stopping and plateau: what they decide on a given series, which weights stay, resumption, and torch's own."""

import math
import random
from dataclasses import replace

import pytest
import torch
from interrupted import resumed, run
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import bits_per_byte
from quadriga.core.setup import Setup
from quadriga.core.slots import Look, OptimizerSlot
from quadriga.measure.quality import score
from quadriga.methods.training.early_stopping import EarlyStopping
from quadriga.methods.training.ema import Ema
from quadriga.methods.training.lookahead import Lookahead
from quadriga.methods.training.plateau import Plateau
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp
from quadriga.train.loop import fit

torch.set_num_threads(1)
SGD = OptimizerSlot(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))


class Series:
    """A quality service that gives the numbers of a list in turn, and notes the model that it is shown."""

    def __init__(self, values):
        self.values, self.shown = iter(values), []

    def __call__(self, model):
        self.shown.append(fingerprint(model.eval()))
        return next(self.values)


def setup_of(*methods, build=tiny_mlp, evaluate=None, higher=True):
    workload = build()
    metric = workload.metric if higher else replace(bits_per_byte, name="error")
    setup = replace(Setup.of(workload, evaluate=evaluate or Series([])), optimizer=SGD)
    setup = replace(setup, context=replace(setup.context, metric=metric))
    for method in methods:
        setup = method(setup)
    return setup


def stop_after(values, method, higher=True):
    """(looks, which of them is left) of a run in which quality takes these values; 24 steps, 12 looks."""
    series = Series([*values, *[0.0] * 12])
    setup = setup_of(method, evaluate=series, higher=higher)
    fit(setup, tiny_mlp().train, epochs=4, seed=0)
    return len(series.shown), series.shown.index(fingerprint(setup.model.eval()))


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        ([5, 6, 7, 6, 6, 6], {}, (6, 2)),  # three looks after the best
        ([5, 6, 7, 6, 6, 8, 1, 2, 3], {}, (9, 5)),  # an improvement within the patience
        ([5, 5, 5, 5], {}, (4, 0)),  # as good is no improvement, and the first of equals stays
        ([math.nan, 5, math.nan, 1, math.nan], {}, (5, 1)),  # what is no number is none either
        ([5, 5.5, 6.5, 6.9, 6.8, 6.7], {"least": 1.0}, (6, 3)),  # 6.5 counts from 5, 6.9 does not, but is best
        ([5, 6.0, 6.0, 6.0, 6.0], {"least": 1.0}, (5, 1)),  # a gain of exactly `least` counts
        ([*range(12)], {}, (12, 11)),
        ([9, 8, 5, 4, 3, 2], {"start": 0.24, "interval": 0.125}, (4, 0)),  # the first look is not measured
    ],
)
def test_stops_and_keeps(values, fields, expected):
    method = EarlyStopping(**{"interval": 1 / 12, "patience": 3, **fields})
    assert stop_after(values, method) == expected


def test_a_metric_that_falls_is_read_the_other_way():
    method = EarlyStopping(interval=1 / 12, patience=3)
    assert stop_after([5, 4, 3, 4, 4, 4], method, higher=False) == (6, 2)
    assert stop_after([1, 2, 3, 4], method, higher=False) == (4, 0)


@pytest.mark.parametrize(
    "methods", [(), (Ema(decay=0.8),), (Lookahead(every=3),), (Lookahead(every=3), Ema(decay=0.8))], ids=repr
)
@pytest.mark.parametrize("first", [True, False])
def test_the_weights_that_stay_are_those_that_were_measured(methods, first):
    """Averages with their batch statistics, whether it stands before the average or behind it: quality is that of the best."""
    data, found = tiny_cnn(), []

    def evaluate(model):
        found.append(score(model, data.val, data.metric).value + len(found) % 3)  # the best is not the last
        return found[-1] - 1000 * (len(found) > 5)

    stopping = EarlyStopping(interval=1 / 12, patience=12)
    setup = setup_of(*((stopping, *methods) if first else (*methods, stopping)), build=tiny_cnn, evaluate=evaluate)
    marks = []
    setup = replace(
        setup, context=replace(setup.context, evaluate=lambda m: (marks.append(fingerprint(m.eval())), evaluate(m))[1])
    )
    fit(setup, data.train, epochs=4, seed=0)
    assert marks.index(fingerprint(setup.model.eval())) == max(range(5), key=lambda i: (found[i], -i))
    assert len(marks) == 12


def test_looks_change_nothing():
    """With all the patience there is and quality that rises, the weights are those of a run without it."""
    marks = []
    for methods in ((), (EarlyStopping(interval=0.25),)):
        setup = setup_of(*methods, build=tiny_cnn, evaluate=Series(range(9)))
        fit(setup, tiny_cnn().train, epochs=2, seed=0)
        marks.append(fingerprint(setup.model))
    assert marks[0] == marks[1]


@pytest.mark.parametrize("methods", [(), (Ema(decay=0.8),)], ids=repr)
def test_stopping_is_resumed_bit_for_bit(tmp_path, methods):
    """Broken off before and after the best look; stopped at the same step with the same weights."""
    data = tiny_cnn()

    def evaluate(model):  # a function of the model, so that a resumed run measures the same
        return float(next(model.parameters()).detach().flatten()[0] * 1e4 % 7)

    make = lambda: setup_of(*methods, EarlyStopping(interval=1 / 12, patience=3), build=tiny_cnn, evaluate=evaluate)  # noqa: E731
    straight, first = run(make, data.train, 6, tmp_path / "straight")
    mark, second = resumed(make, data.train, 6, tmp_path / "cut", (4, 5, 2))
    assert mark == straight and first.steps == second.steps < 36
    hooks = [next(h for h in o.hooks if hasattr(h, "mark")) for o in (first, second)]
    assert hooks[0].best == hooks[1].best and hooks[1].stopped


def test_a_continued_step_goes_on_from_the_trained_weights(tmp_path):
    """After a stop, with patience anew; and where nothing better is found, the best of before is left."""
    data, stop = tiny_mlp().train, EarlyStopping(interval=1 / 12, patience=3)
    first = lambda: setup_of(stop, evaluate=Series([9, 8, 7, 6, 5]))  # noqa: E731
    best, one = run(first, data, 4, tmp_path / "first")
    assert one.steps == 8
    later = Series([1] * 12)
    again, two = run(lambda: setup_of(stop, evaluate=later), data, 8 / 3, tmp_path / "second", start=tmp_path / "first")
    assert again == best and two.hooks[0].stopped and len(later.shown) == 3
    plain, _ = run(lambda: setup_of(), data, 4 / 3, tmp_path / "plain")
    trained = one.hooks[0].raw
    setup = setup_of()
    fit(setup, data, epochs=4 / 3, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(trained.values(), setup.model.parameters(), strict=True))
    assert fingerprint(setup.model) == plain != best


def look_of(value, of, gain):
    return Look(0.5, value if of == "loss" else math.nan, (lambda: value) if of == "quality" else None, gain)


@pytest.mark.parametrize("of", ["loss", "quality"])
@pytest.mark.parametrize("seed", range(20))
def test_plateau_is_that_of_torch(of, seed):
    """On a random series, the rate after each look is ReduceLROnPlateau's, with every field drawn."""
    draw = random.Random(seed)
    fields = {
        "factor": draw.choice([0.1, 0.5, 0.9]),
        "patience": draw.randint(0, 4),
        "threshold": draw.choice([0.0, 2**-13, 2**-4]),
    }
    smallest = draw.choice([0.0, 0.01, 0.3])
    hook = setup_of(Plateau(of=of, smallest=smallest, **fields)).training.make_hooks[0](nn.Linear(1, 1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    mode = {"mode": "min", "threshold_mode": "rel"} if of == "loss" else {"mode": "max", "threshold_mode": "abs"}
    reference = ReduceLROnPlateau(optimizer, min_lr=smallest, eps=0.0, **mode, **fields)
    rates = set()
    for step in range(60):
        value = draw.uniform(0.5, 1.0) / (1 + step / 30) if of == "loss" else draw.uniform(0, 1) + step / 100
        value = round(64 * value) / 64  # sums are exact, and ties occur
        hook.look(None, look_of(value, of, lambda a, b: a - b))
        reference.step(value)
        rates.add(hook.factors.lr)
        assert hook.factors.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert len(rates) > 1 or fields["patience"] == 4


def test_plateau_waits_for_a_loss():
    """Where no loss was read yet, nothing is known and nothing changes."""
    hook = setup_of(Plateau(patience=0)).training.make_hooks[0](nn.Linear(1, 1))
    for _ in range(5):
        hook.look(None, look_of(math.nan, "loss", None))
    assert hook.factors.lr == 1.0 and hook.best is None


@pytest.mark.parametrize("of", ["loss", "quality"])
def test_plateau_acts_on_the_steps_and_is_resumed(tmp_path, of):
    """The optimizer's rate is lowered by its factor, and a run that is broken off ends with the same bits and rate."""
    data = tiny_mlp().train

    def evaluate(model):
        return float(next(model.parameters()).detach().flatten()[0] * 1e4 % 7)

    method = Plateau(of=of, factor=0.5, patience=1, interval=1 / 12, threshold=0.5)
    make = lambda: setup_of(method, evaluate=evaluate)  # noqa: E731
    straight, first = run(make, data, 4, tmp_path / "straight")
    mark, second = resumed(make, data, 4, tmp_path / "cut", (5, 4, 9))
    assert mark == straight and first.hooks[0].factors == second.hooks[0].factors
    assert first.hooks[0].factors.lr < 0.5
    plain, _ = run(lambda: setup_of(), data, 4, tmp_path / "plain")
    assert plain != straight


def test_one_measurement_serves_all():
    """Looks of two hooks at the same moment evaluate once."""
    series = Series(range(20))
    fit(
        setup_of(EarlyStopping(interval=0.25), Plateau(of="quality", interval=0.25), evaluate=series),
        tiny_mlp().train,
        epochs=1,
        seed=0,
    )
    assert len(series.shown) == 4


def test_refusals():
    alone = Setup.of(tiny_mlp())
    with pytest.raises(NotApplicable, match="nobody measures quality") as caught:
        EarlyStopping()(alone)
    assert "evaluate" in caught.value.remedy
    with pytest.raises(NotApplicable, match="nobody measures quality"):
        Plateau(of="quality")(alone)
    Plateau()(alone)
    for kind, fields in (
        (EarlyStopping, {"interval": 0.0}), (EarlyStopping, {"patience": 0}), (EarlyStopping, {"least": -1.0}),
        (EarlyStopping, {"start": 1.0}), (Plateau, {"factor": 1.0}), (Plateau, {"patience": -1}),
        (Plateau, {"interval": 2.0}), (Plateau, {"threshold": -0.1}), (Plateau, {"smallest": 1.0}),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"{kind.name}.{next(iter(fields))}"):
            kind(**fields)
