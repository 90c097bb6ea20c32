"""The loop: against a bare loop, its order of examples, its factors, its faults, and what it leaves behind."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from quadriga.core import rng
from quadriga.core.batch import Batch
from quadriga.core.data import Data, TensorData
from quadriga.core.errors import BadInput, Diverged
from quadriga.core.setup import Setup
from quadriga.core.slots import Factors, Hook, OptimizerSlot, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.testing import TINY, fingerprint, tiny_cnn, tiny_mlp
from quadriga.train.data import Sampler, count_steps
from quadriga.train.gradients import mean_gradients
from quadriga.train.loop import fit
from quadriga.train.outcome import Watch
from quadriga.train.step import reduce, settings

torch.set_num_threads(1)


def sgd(lr, **options):
    return OptimizerSlot(lambda model: torch.optim.SGD(model.parameters(), lr=lr, **options))


def mlp_setup(lr=0.1, **options):
    workload = tiny_mlp()
    return replace(Setup.of(workload), optimizer=sgd(lr, **options)), workload


def test_equals_a_bare_loop():
    """Two epochs of plain SGD give the bits of ten lines of torch that read the same order."""
    setup, workload = mlp_setup(momentum=0.9)
    x, y = workload.train.inputs, workload.train.target
    model = workload.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = Sampler(96, 16, seed=5)
    losses = []
    for k in range(12):
        rows = order.indices(16 * k)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    outcome = fit(setup, workload.train, epochs=2, seed=5)
    assert fingerprint(setup.model) == fingerprint(model)
    assert (outcome.steps, outcome.samples) == (12, 192)
    assert outcome.loss == pytest.approx(sum(losses) / 12, rel=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_learns(name):
    """On every kind of network the loss falls well below where it starts."""
    workload = TINY[name]((192, 48, 48))
    setup = replace(Setup.of(workload), optimizer=OptimizerSlot(lambda m: torch.optim.AdamW(m.parameters(), lr=5e-3)))
    first = fit(setup, workload.train, epochs=1 / 12, seed=0).loss
    assert fit(setup, workload.train, epochs=12, seed=0).loss < 0.8 * first


def test_order_is_a_stream_of_permutations():
    """Every epoch of the stream holds each example once, epochs differ, and batches are always full."""
    order = Sampler(10, 4, seed=1)
    stream = torch.cat([order.indices(p) for p in range(0, 40, 4)]).view(4, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in stream)
    assert len({tuple(epoch.tolist()) for epoch in stream}) == 4
    assert Sampler(10, 4, seed=1).indices(24).tolist() == stream.flatten()[24:28].tolist()
    assert Sampler(10, 4, seed=2).permutation(0).tolist() != stream[0].tolist()
    assert len(Sampler(3, 64, seed=0).indices(0)) == 3


@pytest.mark.parametrize(("length", "batch"), [(96, 16), (97, 16), (10, 4), (5, 64)])
def test_steps_add_up(length, batch):
    """However a training is cut in two, both parts have together as many steps as the whole."""
    for first, second in ((1, 3), (0.5, 0.5), (0.1, 2.35)):
        head = count_steps(length, batch, first)
        tail = count_steps(length, batch, second, first, head * min(batch, length))
        assert head == max(1, math.ceil(first * length / min(batch, length) - 1e-9))
        assert head + tail == max(2, count_steps(length, batch, first + second))


def test_half_an_epoch_sees_half_the_examples():
    setup, workload = mlp_setup()
    assert fit(setup, workload.train, epochs=0.5, seed=0).samples == 48


def test_weights_of_examples():
    """Σwl/Σw: weight 2 is the same as seeing an example twice, weight 0 as not seeing it."""
    losses, index = torch.tensor([1.0, 5.0, 9.0]), torch.arange(3)
    assert reduce(losses, Batch(None, None, index)) == 5
    assert reduce(losses, Batch(None, None, index, torch.tensor([2.0, 1.0, 0.0]))) == torch.tensor([1.0, 1.0, 5.0]).mean()
    assert reduce(torch.tensor(3.0), Batch(None, None, index)) == 3
    with pytest.raises(BadInput, match=r"\(3, 1\)"):
        reduce(losses[:, None], Batch(None, None, index))


def test_a_scalar_loss_gives_the_same_weights():
    per_example, workload = mlp_setup()
    scalar, _ = mlp_setup()
    inner = scalar.training.loss
    scalar = replace(scalar, training=replace(scalar.training, loss=lambda output, batch: inner(output, batch).mean()))
    for setup in (per_example, scalar):
        fit(setup, workload.train, epochs=1, seed=0)
    assert fingerprint(per_example.model) == fingerprint(scalar.model)


def test_factors_multiply_and_reach_their_entries():
    """Rate, momentum, first beta and the three decays are base · product of the schedules at samples seen / samples."""
    rows = []

    class Reading(Hook):
        def after_backward(self, model, progress):
            rows.append((progress, *({k: v for k, v in g.items() if k != "params"} for g in optimizers[-1].param_groups)))

    optimizers = []

    def make(model):
        optimizers.append(torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.99), weight_decay=0.1))
        optimizers[-1].param_groups[0] |= {"l1": 1.0, "momentum": 0.5}
        return optimizers[-1]

    setup, workload = mlp_setup()
    training = replace(
        setup.training, schedules=(lambda p: Factors(lr=1 - p, momentum=0.5),), make_hooks=(lambda m: Reading(),)
    )
    slot = OptimizerSlot(make, (lambda p: Factors(lr=2.0, decay=p),))
    fit(replace(setup, training=training, optimizer=slot), workload.train, epochs=1, seed=0)
    assert [row[0] for row in rows] == [k / 6 for k in range(6)]
    for progress, group in rows:
        assert group["lr"] == 0.01 * ((1 - progress) * 2.0)
        assert group["betas"] == (0.8 * 0.5, 0.99) and group["momentum"] == 0.25
        assert (group["weight_decay"], group["l1"]) == (0.1 * progress, progress)


def test_hooks_are_called_in_order_and_end_sees_all_data():
    log = []

    class Logging(Hook):
        def after_backward(self, model, progress):
            assert all(p.grad is not None for p in model.parameters())
            log.append(("backward", progress))

        def after_step(self, model, progress):
            log.append(("step", progress))

        def end(self, model, data):
            log.append(("end", sum(len(batch) for batch in data)))

    setup, workload = mlp_setup()
    setup = replace(setup, training=replace(setup.training, make_hooks=(lambda m: Logging(),)))
    fit(setup, workload.train, epochs=1 / 3, seed=0)
    assert log == [("backward", 0.0), ("step", 0.5), ("backward", 0.5), ("step", 1.0), ("end", 96)]


def test_evaluating_enters_every_hook():
    """An averaging hook shows its average for an evaluation and gives the weights back."""

    class Zero(Hook):
        def eval(self, model):
            from contextlib import contextmanager

            @contextmanager
            def swapped():
                kept = model[0].bias.detach().clone()
                model[0].bias.data.zero_()
                yield
                model[0].bias.data.copy_(kept)

            return swapped()

    setup, workload = mlp_setup()
    setup = replace(setup, training=replace(setup.training, make_hooks=(lambda m: Zero(),)))
    outcome = fit(setup, workload.train, epochs=1, seed=0)
    before = fingerprint(setup.model)
    with outcome.evaluating(setup.model):
        assert not setup.model[0].bias.any()
    assert fingerprint(setup.model) == before


def test_transforms_depend_on_seed_and_step_alone():
    """The generator that transforms get gives other numbers each step, and the same in a second run."""
    drawn = []

    def transform(batch, moment):
        drawn.append(moment.uniform(1).item())
        return batch

    for seed in (0, 0, 1):
        setup, workload = mlp_setup()
        fit(replace(setup, training=replace(setup.training, transforms=(transform,))), workload.train, epochs=1, seed=seed)
    first, again, other = drawn[:6], drawn[6:12], drawn[12:]
    assert first == again and len(set(first)) == 6 and not set(first) & set(other)


def test_a_loss_that_is_not_finite_stops_with_step_and_rate():
    setup, workload = mlp_setup(lr=1e20)
    with pytest.raises(Diverged, match=r"at step \d, learning rate 1e\+19") as caught:  # after it went back once
        fit(setup, workload.train, epochs=3, seed=0)
    assert caught.value.step < 6 and not math.isfinite(caught.value.loss)


def test_weights_spoilt_by_the_last_step_are_noticed():
    setup, workload = mlp_setup(lr=float("inf"))
    with pytest.raises(Diverged, match="step 0"):
        fit(setup, workload.train, epochs=1 / 6, seed=0)


def test_a_loss_that_is_not_finite_sends_back_once(tmp_path):
    """To the last checkpoint, else to the start, and on at a tenth of the rate: the bits of a run that was slower."""
    setup, workload = mlp_setup(lr=1.0)
    bad = [3]

    def breaking(output, batch):
        losses = setup.training.loss(output, batch)
        bad[0] -= 1
        return losses * float("nan") if bad[0] == 0 else losses

    outcome = fit(replace(setup, training=replace(setup.training, loss=breaking)), workload.train, epochs=2, seed=0)
    slow, _ = mlp_setup(lr=0.1)
    fit(slow, workload.train, epochs=2, seed=0)
    assert "went back to step 0 and on at 0.1 of the rate" in outcome.note
    assert fingerprint(setup.model) == fingerprint(slow.model)
    bad[0], (again, _) = 3, mlp_setup(lr=1.0)
    saved = replace(again, training=replace(again.training, loss=breaking))
    clock = iter(range(1000))
    outcome = fit(saved, workload.train, epochs=2, seed=0, checkpoint=tmp_path, every=0.0, clock=lambda: float(next(clock)))
    assert "went back to step 2" in outcome.note and outcome.steps == 12


def test_the_watch_remembers_the_first_bad_step():
    """With a window of 32 the step that is reported is the one that went wrong, not the one at which it was read."""
    watch = Watch(32)
    with pytest.raises(Diverged) as caught:
        for step in range(64):
            watch.see(step, 0.5 / (step + 1), torch.tensor(float("nan") if step >= 40 else 1.0))
    assert (caught.value.step, caught.value.rate) == (40, 0.5 / 41)


def test_global_state_is_left_alone():
    """Generators, thread count, matmul precision, grads and modes are after a fit what they were before."""
    workload = tiny_cnn()
    setup = replace(Setup.of(workload), runtime=RuntimeSpec(threads=2, matmul="medium", channels_last=True))
    setup.model.eval()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    seen = []
    inner = setup.training.loss

    def loss(output, batch):
        seen.append((torch.get_num_threads(), torch.get_float32_matmul_precision(), setup.model.training))
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        return inner(output, batch)

    fit(replace(setup, training=replace(setup.training, loss=loss)), workload.train, epochs=1 / 6, seed=0)
    assert seen == [(2, "medium", True)]
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (1, "highest")
    assert not setup.model.training and all(p.grad is None for p in setup.model.parameters())
    assert setup.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_settings_are_restored_after_an_error():
    with pytest.raises(RuntimeError), settings(RuntimeSpec(threads=2, matmul="medium")):
        raise RuntimeError
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (1, "highest")


def test_channels_last_trains_to_the_same_weights():
    """A memory format changes no value beyond rounding."""
    results = []
    for flag in (False, True):
        workload = tiny_cnn()
        setup = replace(Setup.of(workload), runtime=RuntimeSpec(channels_last=flag), optimizer=sgd(0.05))
        fit(setup, workload.train, epochs=1, seed=0)
        results.append(setup.model.fc1.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


class Scattered(Data):
    """A split that has to be read example by example, with dict inputs."""

    resident = False

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def batch(self, index):
        parts = [self.data.batch(i[None]) for i in index]
        return Batch({"input": torch.cat([p.inputs for p in parts])}, torch.cat([p.target for p in parts]), index)


def test_data_that_is_not_resident_and_dict_inputs():
    """The way that examples arrive does not matter: same order, same weights."""
    (plain, workload), (other, _) = mlp_setup(), mlp_setup()
    fit(plain, workload.train, epochs=1, seed=0)
    fit(other, Scattered(workload.train), epochs=1, seed=0)
    assert fingerprint(plain.model) == fingerprint(other.model)


@pytest.mark.parametrize("epochs", [0, -1, math.nan, math.inf])
def test_bad_epochs(epochs):
    setup, workload = mlp_setup()
    with pytest.raises(BadInput, match="epochs"):
        fit(setup, workload.train, epochs=epochs, seed=0)


def test_progress_is_called_by_the_clock():
    """With a clock that ticks a second a step, every step is shown; fractions rise to 1. The end is told by any clock."""
    ticks = iter(range(1000))
    shown = []
    setup, workload = mlp_setup()
    fit(setup, workload.train, epochs=1, seed=0, clock=lambda: float(next(ticks)), progress=shown.append)
    assert shown == [*((k + 1) / 6 for k in range(6)), 1.0]
    shown.clear()
    fit(setup, workload.train, epochs=1, seed=0, clock=lambda: 0.0, progress=shown.append)
    assert shown == [1.0]


def test_mean_gradients_equal_those_of_one_large_batch():
    """Batches of unequal size, weighted by example, give the gradient of the whole; nothing of the model changes."""
    workload = tiny_cnn()
    model = workload.build().train()
    before = fingerprint(model)
    batches = [workload.train.batch(torch.arange(a, b)) for a, b in ((0, 10), (10, 40), (40, 96))]
    found = mean_gradients(model, workload.loss, batches)
    assert fingerprint(model) == before and all(p.grad is None for p in model.parameters())
    model.eval()
    nn.functional.cross_entropy(model(workload.train.inputs), workload.train.target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_generators_round_trip():
    """`capture` and `restore` hold all three generators, in the middle of their streams too."""
    random.gauss(0, 1), np.random.randn(), torch.rand(3)
    state = rng.capture()
    drawn = (random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(2).tolist())
    rng.restore(state)
    assert drawn == (random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(2).tolist())


def test_regression_through_a_user_loss():
    """A user's scalar loss on a regression workload: least squares is reached."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    workload = Workload(
        model=nn.Linear(3, 1),
        train=(x, y),
        val=(x + 0, y),
        test=(x - 0, y),
        loss=nn.functional.mse_loss,
        metric="mean_squared_error",
    )
    setup = replace(Setup.of(workload), optimizer=sgd(0.1))
    fit(setup, TensorData(x, y), epochs=40, seed=0)
    torch.testing.assert_close(setup.model.weight[0], torch.tensor([1.0, -2.0, 0.5]), rtol=1e-3, atol=1e-3)
