"""Accumulation, clipping and batch ramps, against big batches, torch's own functions and naive references."""

import math
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
import torch
from pytorch_optimizer.optimizer.agc import agc
from torch import nn

from quadriga.core.batch import Batch, call
from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import cross_entropy
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot, RuntimeSpec
from quadriga.methods.training.accumulate import Accumulate
from quadriga.methods.training.batch_ramp import BatchRamp, plateaus
from quadriga.methods.training.clip_gradients import ClipGradients, clip_adaptively
from quadriga.methods.training.crop import Crop
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.train.loop import fit
from quadriga.train.step import Runner, reduce

torch.set_num_threads(1)


class Stop(Exception):
    """Ends a run in the middle."""


class StopAt(Hook):
    """Raises before the step with this number is taken; a list holds it, so that it is no part of what the run is."""

    def __init__(self, left):
        self.left = left

    def after_backward(self, model, progress):
        self.left[0] -= 1
        if self.left[0] == 0:
            raise Stop


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def in_double(workload):
    """A setup and its data in float64, without dropout and batch norm."""
    setup = replace(Setup.of(workload), optimizer=OptimizerSlot(momentum))
    for module in setup.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.eval().forward = nn.Identity().forward
    setup.model.double()
    inputs, target = workload.train.inputs, workload.train.target
    return setup, TensorData(inputs.double() if inputs.is_floating_point() else inputs, target)


def with_ignored(data):
    """Targets of which each sequence ignores another number, one of them all."""
    target = data.target.clone()
    for row, ignored in zip(target, torch.arange(len(target)) % (target.shape[1] + 1), strict=True):
        row[:ignored] = -100
    return TensorData(data.inputs, target)


def by_tokens(batch, moment):
    """Each sequence weighs as much as it has tokens that count, so that the loss is the mean over tokens."""
    return replace(batch, weight=(batch.target != -100).sum(1).double())


def grown(setup, factor):
    return replace(setup, training=replace(setup.training, batch_size=setup.training.batch_size * factor))


CASES = {  # name → (workload, transforms)
    "mlp": (tiny_mlp, ()),
    "cnn with crop": (tiny_cnn, (Crop(padding=2).transform,)),
    "sequences": (tiny_transformer, ()),
    "sequences by tokens": (tiny_transformer, (by_tokens,)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [Accumulate(steps=3), Accumulate(steps=3, keep_batch=True), Accumulate(steps=5)], ids=repr)
def test_accumulation_equals_the_big_batch(case, method):
    """To 1e-6 in float64 after two epochs of momentum: ragged last parts, weights, ignored targets, transforms of the batch."""
    build, transforms = CASES[case]
    trained = []
    for accumulate in (False, True):
        setup, data = in_double(build())
        data = with_ignored(data) if "sequences" in case else data
        setup = replace(setup, training=replace(setup.training, transforms=transforms, batch_size=16))
        big = 1 if method.keep_batch else method.steps
        setup = method(setup) if accumulate else grown(setup, big)
        assert (setup.training.micro is not None) == accumulate
        outcome = fit(setup, data, epochs=2, seed=3)
        trained.append((outcome.steps, outcome.loss, list(setup.model.parameters())))
    (steps, loss, weights), (steps_too, loss_too, others) = trained
    assert steps == steps_too and loss == pytest.approx(loss_too, rel=1e-6)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_token_weighted_loss_is_the_mean_over_tokens():
    """In parts of 5 of 16 sequences, one part of which has no token that counts: the naive mean over tokens, its gradient."""
    setup, data = in_double(tiny_transformer())
    target = data.target.clone()
    target[:5] = -100
    target[7, 3:], target[12, 1:] = -100, -100
    batch = by_tokens(Batch(data.inputs[:16], target[:16], torch.arange(16)), None)
    loss = Runner(setup.model, cross_entropy, RuntimeSpec(), micro=5).forward_backward(batch)
    found = [p.grad.clone() for p in setup.model.parameters()]
    setup.model.zero_grad()
    naive = nn.functional.cross_entropy(setup.model(batch.inputs).flatten(0, 1), batch.target.flatten())
    naive.backward()
    torch.testing.assert_close(loss, naive.detach(), rtol=1e-9, atol=0, check_dtype=False)
    for one, p in zip(found, setup.model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-6, atol=1e-12)


def test_without_weights_a_mean_of_means_would_be_wrong():
    """The ragged part counts by its examples: the plain mean over parts differs by far more than rounding."""
    setup, data = in_double(tiny_mlp())
    batch = data.batch(torch.arange(16))
    right = reduce(cross_entropy(call(setup.model, batch.inputs), batch), batch)
    means = [cross_entropy(setup.model(batch.inputs[a:b]), replace(batch, target=batch.target[a:b])).mean()
             for a, b in ((0, 15), (15, 16))]  # fmt: skip
    loss = Runner(setup.model, cross_entropy, RuntimeSpec(), micro=15).forward_backward(batch)
    torch.testing.assert_close(loss, right.detach(), rtol=1e-9, atol=0, check_dtype=False)
    assert abs(float((sum(means) / 2 - right).detach())) > 1e-3


def test_twice_multiplies():
    setup = Setup.of(tiny_mlp())
    sizes = [
        (after.training.batch_size, after.training.micro)
        for after in (
            Accumulate(steps=3)(Accumulate(steps=2)(setup)),
            Accumulate(steps=3, keep_batch=True)(Accumulate(steps=2)(setup)),
            Accumulate(steps=3)(Accumulate(steps=2, keep_batch=True)(setup)),
            Accumulate(steps=2, keep_batch=True)(Accumulate(steps=3, keep_batch=True)(setup)),
        )
    ]
    assert sizes == [(96, 16), (32, 6), (48, 8), (16, 3)]


def test_accumulate_refuses():
    """More than there is, what is a single example already, and a loss of one number."""
    setup = Setup.of(tiny_mlp())
    with pytest.raises(NotApplicable, match=r"7 · 16 is larger than the 96 training examples"):
        Accumulate(steps=7)(setup)
    one = replace(setup, training=replace(setup.training, batch_size=1))
    with pytest.raises(NotApplicable, match="cannot be cut"):
        Accumulate(steps=2, keep_batch=True)(one)
    scalar = replace(tiny_mlp(), loss=lambda output, target: nn.functional.cross_entropy(output, target))
    with pytest.raises(NotApplicable, match="PER_EXAMPLE_LOSS"):
        Accumulate()(Setup.of(scalar))
    with pytest.raises(BadInput, match="steps is 1"):
        Accumulate(steps=1)


def gradients(setup, scale=1.0):
    """The model's parameters with the gradients of a batch, times a number."""
    batch = setup.context.calibration[0]
    setup.model.eval()  # no dropout
    (cross_entropy(call(setup.model, batch.inputs), batch).mean() * scale).backward()
    return list(setup.model.parameters())


@pytest.mark.parametrize("kind", ["norm", "value"])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("build", [tiny_cnn, tiny_transformer])
def test_clipping_equals_torch(kind, scale, build):
    """As torch does it tensor by tensor, to rounding; what is small enough stays to the bit."""
    ours, theirs = Setup.of(build(), seed=0), Setup.of(build(), seed=0)
    found, expected = gradients(ours, scale), gradients(theirs, scale)
    before = [p.grad.clone() for p in found]
    ClipGradients(kind=kind, limit=0.5).hook(ours.model).after_backward(ours.model, 0.0)
    if kind == "norm":
        nn.utils.clip_grad_norm_(expected, 0.5, foreach=False)
        total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in found))
        assert total == pytest.approx(0.5, rel=1e-5) if scale > 1 else total < 0.5
    else:
        nn.utils.clip_grad_value_(expected, 0.5, foreach=False)
        assert max(float(p.grad.abs().max()) for p in found) <= 0.5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
    unchanged = all(torch.equal(p.grad, b) for p, b in zip(found, before, strict=True))
    assert unchanged == (scale < 1)


@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (7, 4), (9,), ()])
def test_adaptive_clipping_equals_a_naive_one(shape):
    """Unit by unit in Python, and as in pytorch_optimizer; some gradients small, some large, one unit's weights at zero."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    factor = 10.0 ** -torch.arange(shape[0]).double().view(-1, *(1,) * (len(shape) - 1)) if len(shape) > 1 else 1.0
    grad = torch.randn(shape, generator=generator, dtype=torch.float64) * factor
    if len(shape) > 1:
        with torch.no_grad():
            p[0] = 0.0
        grad[1] = 0.0
    expected = grad.clone()
    for unit, g in zip(p.detach(), expected, strict=True) if len(shape) > 1 else [(p.detach(), expected)]:
        largest = 0.02 * max(float(unit.square().sum().sqrt()), 1e-3)
        if (size := float(g.square().sum().sqrt())) > largest:
            g *= largest / size
    library = agc(p.detach(), grad.clone(), agc_eps=1e-3, agc_clip_val=0.02)
    p.grad = grad
    clip_adaptively([p], 0.02, 1e-3)
    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0)
    if shape:
        torch.testing.assert_close(p.grad, library, rtol=1e-12, atol=0)


def test_clipping_acts_in_the_order_of_the_recipe():
    """A hook before it is clipped, one behind it is not; with plain SGD at rate 1 the step is as long as the gradient."""

    class Enlarge(Hook):
        def after_backward(self, model, progress):
            for p in model.parameters():
                p.grad.mul_(1000.0)

    lengths = []
    for first in (True, False):
        setup = replace(Setup.of(tiny_mlp()), optimizer=OptimizerSlot(lambda m: torch.optim.SGD(m.parameters(), lr=1.0)))
        if first:
            setup = replace(setup, training=replace(setup.training, make_hooks=(lambda m: Enlarge(),)))
        setup = ClipGradients(limit=0.01)(setup)
        if not first:
            hooks = (*setup.training.make_hooks, lambda m: Enlarge())
            setup = replace(setup, training=replace(setup.training, make_hooks=hooks))
        before = [p.detach().clone() for p in setup.model.parameters()]
        fit(setup, tiny_mlp().train, epochs=1 / 6, seed=0)
        moved = [(p.detach() - b).double().square().sum() for p, b in zip(setup.model.parameters(), before, strict=True)]
        lengths.append(float(sum(moved).sqrt()))
    assert lengths == pytest.approx([0.01, 10.0], rel=1e-3)


@pytest.mark.parametrize("fields", [{"limit": 0.0}, {"scale": -1.0}, {"eps": 0.0}, {"kind": "norms"}])
def test_bad_clipping(fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        ClipGradients.parse(fields)


@pytest.mark.parametrize("kind", ["steps", "linear"])
@pytest.mark.parametrize("size", [16, 20, 64, 96, 128, 500])
@pytest.mark.parametrize("start", [0.01, 0.125, 0.25, 0.9])
def test_plateaus_are_few_rising_multiples_of_8(kind, size, start):
    sizes = plateaus(size, kind, start, 4)
    assert sizes == sorted(set(sizes)) and len(sizes) <= 7
    assert all(s % 8 == 0 and 0 < s < size for s in sizes)
    if size >= 64 and start * size >= 8 and kind == "steps" and size % 64 == 0:
        assert all(b == 2 * a for a, b in pairwise(sizes)) or start == 0.9


@pytest.mark.parametrize(("rate", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_the_rate_follows_the_batch(rate, power):
    setup = grown(Setup.of(tiny_mlp()), 4)
    (schedule,) = BatchRamp(start=0.25, until=0.5, rate=rate)(setup).training.schedules
    assert [schedule(p).batch for p in (0, 0.24, 0.25, 0.49, 0.5, 1)] == [0.25, 0.25, 0.5, 0.5, 1, 1]
    for progress in (0.0, 0.3, 0.7):
        assert schedule(progress).lr == pytest.approx(schedule(progress).batch ** power)


class Sizes(Hook):
    """Notes every batch's size and examples."""

    log = None

    def seen(self, batch, losses):
        assert len(batch) == len(losses)
        self.log.append(batch.index.clone())


def ramped(log, method, *hooks):
    setup = replace(grown(Setup.of(tiny_cnn()), 2), optimizer=OptimizerSlot(momentum))
    noting = type("Noting", (Sizes,), {"log": log})
    makers = (lambda m: noting(), *hooks)
    return method(replace(setup, training=replace(setup.training, make_hooks=makers)))


@pytest.mark.parametrize(
    "method", [BatchRamp(rate="sqrt"), BatchRamp(kind="linear", start=0.25, stages=3, until=0.8)], ids=repr
)
def test_a_ramp_sees_as_many_examples_in_more_steps(method):
    """Sizes rise in plateaus, each of about until / n of all examples; the stream is the plain one, cut otherwise."""
    log, plain = [], []
    setup = ramped(log, method)
    outcome = fit(setup, tiny_cnn().train, epochs=10, seed=1)
    fit(ramped(plain, lambda s: s), tiny_cnn().train, epochs=10, seed=1)
    sizes, total = [len(i) for i in log], 960
    assert sizes == sorted(sizes) and sizes[-1] == 32 and all(s % 8 == 0 for s in sizes)
    assert outcome.steps == len(sizes) > len(plain) and total <= outcome.samples == sum(sizes) < total + 32
    assert torch.equal(torch.cat(log)[:total], torch.cat(plain)[:total])
    expected = plateaus(32, method.kind, method.start, method.stages)
    runs = [(size, len(list(group)) * size) for size, group in groupby(sizes)]
    assert [size for size, _ in runs] == [*expected, 32]
    for size, examples in runs[:-1]:
        assert abs(examples - total * method.until / len(expected)) <= 2 * size


@pytest.mark.parametrize("at", [3, 11, 25])
def test_a_ramp_with_accumulation_and_clipping_resumes_bit_exactly(tmp_path, at):
    """Stopped on each of its plateaus and resumed, the weights and the sizes are those of a run that never stopped."""

    def make(log, stop=0):
        left = [stop]
        setup = ramped(log, BatchRamp(start=0.25, rate="sqrt"), lambda m: StopAt(left))
        return ClipGradients(kind="adaptive")(Accumulate(steps=3, keep_batch=True)(Crop()(setup)))

    whole, first, second = [], [], []
    straight = make(whole)
    fit(straight, tiny_cnn().train, epochs=6, seed=2)
    broken = make(first, at)
    with pytest.raises(Stop):
        fit(broken, tiny_cnn().train, epochs=6, seed=2, checkpoint=tmp_path, every=0.0)
    resumed = make(second)
    outcome = fit(resumed, tiny_cnn().train, epochs=6, seed=2, checkpoint=tmp_path, every=0.0)
    assert outcome.exact and fingerprint(resumed.model) == fingerprint(straight.model)
    assert [i.tolist() for i in (*first[: at - 1], *second)] == [i.tolist() for i in whole]


def test_batch_ramp_refuses():
    setup = Setup.of(tiny_mlp())
    with pytest.raises(NotApplicable, match="batch of 8 "):
        BatchRamp()(replace(setup, training=replace(setup.training, batch_size=8)))
    for fields in ({"start": 1.0}, {"until": 0.0}, {"stages": 0}):
        with pytest.raises(BadInput, match=next(iter(fields))):
            BatchRamp.parse(fields)
