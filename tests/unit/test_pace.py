"""Timing of training steps by an injected clock, and mixed precision: kept where faster, scaled, resumed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot, RuntimeSpec
from quadriga.engine.pace import Paces, paced
from quadriga.methods.hardware import _measured
from quadriga.methods.hardware.channels_last import ChannelsLast
from quadriga.methods.hardware.mixed_precision import MixedPrecision
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp
from quadriga.train.loop import fit
from quadriga.train.step import Runner

torch.set_num_threads(1)
spent = [0.0]


class Costly(nn.Sequential):
    """A model of which each forward pass takes so many seconds of a clock that only it moves."""

    def __init__(self, seconds):
        super().__init__(nn.Linear(10, 2))
        self.seconds = seconds

    def forward(self, x):
        spent[0] += self.seconds
        return super().forward(x)


def costing(seconds, workload):
    return replace(Setup.of(workload), model=Costly(seconds))


def test_paces_are_seconds_per_example_and_leave_the_models():
    workload = tiny_mlp()
    setups = [costing(2.0, workload), costing(6.0, workload)]
    kept = [fingerprint(s.model) for s in setups]
    found = paced(setups, workload.train, steps=4, clock=lambda: spent[0])
    assert found == [2.0 / workload.batch_size, 6.0 / workload.batch_size]
    assert [fingerprint(s.model) for s in setups] == kept


def test_what_changes_in_the_course_of_training_counts_with_its_share():
    """A transform that costs 4 seconds in the second half, beside 1 for the model: steps 5 to 8 of 8, of which 7 count."""
    workload = tiny_mlp()
    setup = costing(1.0, workload)

    def late(batch, moment):
        spent[0] += 4.0 * (moment.progress >= 0.5)
        return batch

    training = replace(setup.training, transforms=(late,))
    found = paced([replace(setup, training=training)], workload.train, steps=8, clock=lambda: spent[0])
    assert found == [pytest.approx((7 + 4 * 4) / 7 / workload.batch_size)]


def test_looks_do_not_crowd_into_a_few_steps():
    workload = tiny_mlp()

    class Looking(Hook):
        interval = 0.01

        def look(self, model, look):
            spent[0] += 1000.0

    setup = costing(1.0, workload)
    setup = replace(setup, training=replace(setup.training, make_hooks=(lambda model: Looking(),)))
    assert paced([setup], workload.train, steps=4, clock=lambda: spent[0]) == [1.0 / workload.batch_size]


def test_train_steps_count_by_their_epochs(monkeypatch):
    """The baseline's own training costs 1; three epochs at twice its cost make (1 · 1 + 3 · 2) / 4."""
    monkeypatch.setattr("quadriga.engine.pace.time.process_time", lambda: spent[0])
    workload = tiny_mlp()
    first = step("train", epochs=1)
    paces = Paces(Recipe((first, step("train", epochs=3))), Recipe((first,)), costing(1.0, workload), workload.train, 0)
    assert paces.ratio(60.0) == 1.0
    paces.note(costing(9.0, workload), 0)
    assert paces.ratio(60.0) == 1.0
    paces.note(costing(2.0, workload), 1)
    assert paces.ratio(60.0) == pytest.approx(7 / 4)
    blocks = paces.blocks(2)
    assert [m / b for b, m in zip(blocks["baseline"], blocks["recipe"], strict=True)] == [pytest.approx(7 / 4)] * 2


def test_blocks_share_the_time_that_they_are_given(monkeypatch):
    workload, asked = tiny_mlp(), []

    def watched(setups, data, **options):
        asked.append(options["seconds"])
        return [1.0] * len(setups)

    monkeypatch.setattr("quadriga.engine.pace.paced", watched)
    paces = Paces(Recipe((step("train", epochs=1),)), Recipe(), costing(1.0, workload), workload.train, 0)
    paces.note(costing(1.0, workload), 0)
    assert len(paces.blocks(2, seconds=12.0)["recipe"]) == 2 and asked == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("method", [MixedPrecision(), ChannelsLast(keep="faster")], ids=lambda m: m.name)
def test_settings_are_kept_only_where_they_are_faster(method, monkeypatch):
    monkeypatch.setattr(_measured, "speed_here", lambda dtype: 1.8)
    setup = Setup.of(tiny_cnn())
    asked = []

    def at(*seconds):
        def pace(arms):
            asked.append([(s.runtime.autocast, s.runtime.channels_last) for s in arms])
            return list(seconds)

        return replace(setup, context=replace(setup.context, pace=pace, runtime=RuntimeSpec(matmul="medium")))

    assert method(at(2.0, 1.0)).runtime != setup.runtime
    with pytest.raises(NotApplicable, match=r"takes 1\.25 of its time"):
        method(at(1.0, 1.25))
    assert asked[0][0] == ("none", False) and asked[0][1] != ("none", False)
    assert replace(method, keep="always")(at(1.0, 9.0)).runtime != setup.runtime


def test_mixed_precision_computes_in_half_and_keeps_float_weights():
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    setup = MixedPrecision()(replace(Setup.of(tiny_mlp()), model=nn.Sequential(Watching(10, 2))))
    inner = setup.training.loss

    def loss(output, batch):
        seen.append(output.dtype)
        return inner(output, batch)

    fit(replace(setup, training=replace(setup.training, loss=loss)), tiny_mlp().train, epochs=1 / 6, seed=0)
    assert seen == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32}
    with pytest.raises(NotApplicable, match="bf16 already"):
        MixedPrecision()(setup)
    with pytest.raises(NotApplicable, match="not float32"):
        MixedPrecision()(replace(Setup.of(tiny_mlp()), model=nn.Linear(10, 2).double()))


def test_scaled_gradients_are_unscaled_and_an_overflow_is_passed_over():
    """In fp16 the hooks see gradients in their own scale; a step whose scaled gradients are infinite changes nothing."""
    model, workload = nn.Linear(10, 2), tiny_mlp()
    runner = Runner(model.train(), Setup.of(workload).training.loss, RuntimeSpec(autocast="fp16"))
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), workload.train.batch(torch.arange(16))
    kept = model.weight.detach().clone()
    runner.forward_backward(batch)
    runner.unscale(optimizer)
    found = model.weight.grad.clone()
    model.weight.grad.fill_(float("inf"))
    runner.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {torch.device("cpu"): torch.ones(1)}
    runner.update(optimizer)
    assert torch.equal(model.weight, kept) and model.weight.grad is None
    plain = Runner(model, Setup.of(workload).training.loss, RuntimeSpec())
    plain.forward_backward(batch)
    torch.testing.assert_close(found, model.weight.grad, rtol=2e-2, atol=2e-3)
    assert runner.state()["scale"] < 65536


def test_fp16_resumes_bit_for_bit(tmp_path):
    def setup():
        made = MixedPrecision(kind="fp16")(Setup.of(tiny_mlp()))
        return replace(made, optimizer=OptimizerSlot(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)))

    straight, broken, data = setup(), setup(), tiny_mlp().train
    fit(straight, data, epochs=2, seed=0)
    ticks = iter(range(10_000))

    class Killed(BaseException):
        pass

    def kill(progress):
        if progress > 0.4:
            raise Killed

    with pytest.raises(Killed):
        fit(broken, data, epochs=2, seed=0, checkpoint=tmp_path, every=0.0, clock=lambda: next(ticks), progress=kill)
    again = setup()
    fit(again, data, epochs=2, seed=0, checkpoint=tmp_path)
    assert fingerprint(again.model) == fingerprint(straight.model)


def test_bad_values():
    with pytest.raises(BadInput, match="fp8"):
        MixedPrecision.parse({"kind": "fp8"})


def test_a_run_that_begins_again_is_timed_from_its_second_beginning():
    """A loss that is not finite sends the loop back; the steps before that are not counted twice."""
    workload, left = tiny_mlp(), [2]
    setup = costing(1.0, workload)

    def breaking(output, batch):
        left[0] -= 1
        return setup.training.loss(output, batch) * (float("nan") if left[0] == 0 else 1.0)

    broken = replace(setup, training=replace(setup.training, loss=breaking))
    assert paced([broken], workload.train, steps=4, rounds=2, clock=lambda: spent[0]) == [1.0 / workload.batch_size]
