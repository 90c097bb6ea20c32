"""Data pruning: unbiased, as random as its control, exactly resumable, and as many steps fewer as it says."""

import math
from dataclasses import replace

import pytest
import torch
from interrupted import resumed, run
from torch import nn

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, Moment, OptimizerSlot
from quadriga.methods.training.crop import Crop
from quadriga.methods.training.prune_data import PruneData, Pruning, draw
from quadriga.testing import tiny_cnn, tiny_mlp
from quadriga.train.loop import fit

torch.set_num_threads(1)
ADAMW = OptimizerSlot(lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3))
SIZES = (480, 8, 8)


def setup_of(*methods, build=tiny_mlp, hooks=()):
    setup = replace(Setup.of(build(SIZES)), optimizer=ADAMW)
    for method in methods:
        setup = method(setup)
    return replace(setup, training=replace(setup.training, make_hooks=(*setup.training.make_hooks, *hooks)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def skewed(count=200):
    """Losses of which clearly more than half are below their mean, and three that are not known."""
    losses = torch.randn(count, generator=generator(7)).exp()
    losses[[3, 50, 120]] = torch.nan
    return losses


@pytest.mark.parametrize("by", ["loss", "random"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_expected_gradient_is_that_of_all_data(by, ratio):
    """Over 4000 draws, each example's weight is 1 and the mean of weighted gradients the full one, within 5 standard errors."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(200, 6), torch.randint(3, (200,))
    grads = torch.stack([torch.autograd.grad(nn.functional.cross_entropy(model(a[None]), b[None]), model.weight)[0].flatten()
                         for a, b in zip(x, y, strict=True)])  # fmt: skip
    losses, source = skewed(), generator(1)
    weights = torch.stack([draw(losses, ratio, by, source) for _ in range(4000)])
    error = weights.std(0) / math.sqrt(4000) + 1e-12
    assert bool(((weights.mean(0) - 1).abs() < 5 * error + 1e-6).all())
    found = weights @ grads / 200
    assert bool(((found.mean(0) - grads.mean(0)).abs() < 5 * found.std(0) / math.sqrt(4000)).all())


def test_only_those_below_the_mean_are_passed_over():
    """By loss; the mean is that of the known ones, and what is not known is seen with weight 1."""
    losses = skewed()
    easy = losses < losses[losses.isfinite()].mean()
    assert int(easy.sum()) > 110
    weights = torch.stack([draw(losses, 0.25, "loss", generator(s)) for s in range(50)])
    assert bool((weights[:, ~easy] == 1).all())
    assert weights[:, easy].unique().tolist() == [0.0, pytest.approx(4 / 3)]


def test_the_control_passes_over_as_many_at_random():
    """Each draw has a group of the same size in both; by chance, every example is in it with the same probability."""
    losses, count = skewed(), 3000
    group = int((losses < losses.nanmean()).sum())
    by_loss, random = (torch.stack([draw(losses, 0.5, by, generator(s)) for s in range(count)]) for by in ("loss", "random"))
    for weights in (by_loss, random):
        assert bool(((weights != 1).sum(1) == group).all())
        assert float((weights == 0).float().sum(1).mean()) == pytest.approx(group / 2, abs=5 * math.sqrt(group / 4 / count))
    rates = (random == 0).float().mean(0)
    p = group / 2 / len(losses)
    assert bool(((rates - p).abs() < 5 * math.sqrt(p * (1 - p) / count)).all())


def test_nothing_is_known_at_first():
    assert draw(torch.full((9,), torch.nan), 0.5, "loss", generator()).tolist() == [1.0] * 9
    assert draw(torch.ones(9), 0.5, "random", generator()).tolist() == [1.0] * 9


class Watching(Hook):
    """Notes what was seen, and the progress after each step."""

    def __init__(self):
        self.index, self.weights, self.losses, self.progress = [], [], [], []

    def seen(self, batch, losses):
        self.index.append(batch.index)
        self.weights.append(batch.weight)
        self.losses.append(losses)

    def after_step(self, model, progress):
        self.progress.append(progress)


@pytest.mark.parametrize("by", ["loss", "random"])
def test_epochs_of_a_run(by):
    """The first epoch and the last eighth see everything once; between, what each epoch passes over is of the share that its
    losses say, and batches are full."""
    method, shares = PruneData(by=by), []

    class Spy(Pruning):
        def select(self, index, moment):
            known, before = self.losses.clone(), self.epoch
            weights = super().select(index, moment)
            if self.epoch != before:
                shares.append((int((known < known.nanmean()).sum()), int((self.weights == 0).sum())))
            return weights

    setup = setup_of(hooks=(lambda m: Spy(method, m), lambda m: Watching()))
    outcome = fit(setup, tiny_mlp(SIZES).train, epochs=8, seed=0)
    watch = outcome.hooks[1]
    assert {len(i) for i in watch.index} == {16} and watch.progress[-1] == 1.0
    assert sorted(torch.cat(watch.index[:30]).tolist()) == list(range(480))
    assert outcome.samples == 16 * outcome.steps == 16 * len(watch.index)
    tail = [w for w, p in zip(watch.weights, [0.0, *watch.progress], strict=False) if p >= 0.875]
    assert len(tail) in (29, 30) and all(bool((w == 1).all()) for w in tail)
    assert len(shares) in (7, 8) and shares[0] == (0, 0)
    for group, gone in shares[1:]:
        assert group > 100 and abs(gone - group / 2) < 5 * math.sqrt(group) / 2
    passed = sum(gone for _, gone in shares[:7])
    assert abs(8 * 480 - outcome.samples - passed) <= 16
    assert outcome.samples < 0.82 * 8 * 480


def test_the_control_saves_as_much():
    """Runs by loss and at random make about the same number of steps: within a tenth of what is saved."""
    steps = {}
    for by in ("loss", "random"):
        setup = setup_of(PruneData(by=by))
        steps[by] = fit(setup, tiny_mlp(SIZES).train, epochs=8, seed=0).steps
    saved = 240 - steps["loss"]
    assert saved > 40 and abs(steps["loss"] - steps["random"]) <= 0.15 * saved


def test_the_last_loss_is_kept():
    """Of every example, that of the last batch it was in; of one that a batch has twice, the greater."""
    watch = Watching()
    setup = setup_of(PruneData(), hooks=(lambda m: watch,))
    outcome = fit(setup, tiny_mlp(SIZES).train, epochs=3, seed=0)
    expected = torch.full((480,), torch.nan)
    for index, losses in zip(watch.index, watch.losses, strict=True):
        for i in index.unique():
            expected[i] = losses[index == i].max()
    assert torch.equal(outcome.hooks[0].losses, expected)
    hook = outcome.hooks[0]
    hook.seen(Batch(None, None, torch.tensor([5, 7, 5])), torch.tensor([0.5, 0.25, 0.75]))
    assert hook.losses[[5, 7]].tolist() == [0.75, 0.25]


def test_a_border_of_epochs_is_drawn_from_both_decisions():
    """Entries of the old epoch keep what was decided for it, those of the new one get what is known now."""
    hook = Pruning(PruneData(ratio=0.999), None)
    hook.losses, hook.weights, hook.epoch = torch.tensor([0.1, 0.2, 9.0, 8.0]), torch.tensor([1.0, 2.0, 0.0, 1.0]), 0
    index, epochs = torch.tensor([1, 2, 0, 2]), torch.tensor([0, 0, 1, 1])
    weights = hook.select(index, Moment(generator(), 0.5, epochs))
    assert weights[:2].tolist() == [2.0, 0.0] and hook.epoch == 1
    assert weights[2:].tolist() == [0.0, 1.0]
    assert hook.select(index, Moment(generator(), 0.875, epochs)) is None


@pytest.mark.parametrize("by", ["loss", "random"])
def test_killed_and_resumed_is_bit_identical(tmp_path, by):
    """Broken off in the first epoch, in two pruned ones and in the last full part, with a transform and batch norm."""
    data = tiny_cnn((96, 8, 8)).train
    make = lambda: setup_of(PruneData(by=by), Crop(), build=tiny_cnn)  # noqa: E731
    straight, first = run(make, data, 6, tmp_path / "straight")
    mark, second = resumed(make, data, 6, tmp_path / "cut", (4, 6, 7, 9))
    assert mark == straight and first.steps == second.steps < 34 and second.exact


def test_continued_goes_on_with_what_is_known(tmp_path):
    """A train step that continues another passes over examples from its start; with other data it begins anew."""
    data = tiny_mlp(SIZES).train
    make = lambda: setup_of(PruneData(full_from=1.0))  # noqa: E731
    run(make, data, 2, tmp_path / "first")
    _, more = run(make, data, 1, tmp_path / "second", start=tmp_path / "first")
    assert more.steps < 28
    _, other = run(make, data.part(torch.arange(320)), 1, tmp_path / "third", start=tmp_path / "first")
    assert other.steps == 20


def test_refusals():
    """A loss that is one number, declared or found out, and values that cannot be."""
    setup = Setup.of(tiny_mlp())
    with pytest.raises(NotApplicable, match="PER_EXAMPLE_LOSS"):
        PruneData()(replace(setup, traits=setup.traits - {"PER_EXAMPLE_LOSS"}))
    scalar = setup_of(PruneData())
    inner = scalar.training.loss
    scalar = replace(scalar, training=replace(scalar.training, loss=lambda o, b: inner(o, b).mean()))
    with pytest.raises(BadInput, match="one number"):
        fit(scalar, tiny_mlp(SIZES).train, epochs=1, seed=0)
    for fields in ({"ratio": 0.0}, {"ratio": 1.0}, {"full_from": 0.0}):
        with pytest.raises(BadInput, match=f"prune_data.{next(iter(fields))}"):
            PruneData(**fields)
    assert PruneData.parse({**PruneData.control}).by == "random"
