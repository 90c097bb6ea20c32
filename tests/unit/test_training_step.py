"""Accumulation, clipping and batch ramps, against big batches, torch's own functions and naive references."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.batch import Batch, call
from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import cross_entropy
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot, RuntimeSpec
from quadriga.methods.training.accumulate import Accumulate
from quadriga.methods.training.crop import Crop
from quadriga.testing import tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.train.loop import fit
from quadriga.train.step import Runner, reduce

torch.set_num_threads(1)


class Stop(Exception):
    """Ends a run in the middle."""


class StopAt(Hook):
    """Raises before the step with this number is taken."""

    def __init__(self, step):
        self.left = step

    def after_backward(self, model, progress):
        self.left -= 1
        if self.left == 0:
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
