"""EMA, SWA and lookahead: closed forms, torch's own, naive loops, batch statistics, resumption, and the order of hooks."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from interrupted import resumed, run
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot
from quadriga.methods.structure.prune_weights import PruneWeights
from quadriga.methods.training._average import END, spread
from quadriga.methods.training.crop import Crop
from quadriga.methods.training.ema import Ema, decay_at
from quadriga.methods.training.lookahead import Lookahead
from quadriga.methods.training.swa import Swa
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp
from quadriga.train.data import Sampler
from quadriga.train.loop import fit

torch.set_num_threads(1)
SGD = OptimizerSlot(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
ADAMW = OptimizerSlot(lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3))
ALL = [Ema(decay=0.9), Ema(decay=0.9, every=2), Swa(start=0.5), Lookahead(every=3), Lookahead(every=3, power=1.0)]


class Recording(Hook):
    """Notes the parameters after each step."""

    def __init__(self, model):
        self.rows = [[p.detach().clone() for p in model.parameters()]]

    def after_step(self, model, progress):
        self.rows.append([p.detach().clone() for p in model.parameters()])


def setup_of(*methods, build=tiny_mlp, optimizer=SGD, hooks=()):
    setup = replace(Setup.of(build()), optimizer=optimizer)
    for method in methods:
        setup = method(setup)
    return replace(setup, training=replace(setup.training, make_hooks=(*hooks, *setup.training.make_hooks)))


def trained(setup, data, epochs=4):
    """The outcome, the recorded parameters and the final ones."""
    outcome = fit(setup, data, epochs=epochs, seed=0)
    rows = next((h.rows for h in outcome.hooks if isinstance(h, Recording)), None)
    return outcome, rows, [p.detach() for p in setup.model.parameters()]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.5, 1), (0.9, 4)])
def test_ema_is_its_closed_form(decay, every):
    """Σ_s (1 - d_s) · Π_{r > s} d_r · w_s, with w_0 in the place of what was before, in float64."""
    setup = setup_of(Ema(decay=decay, every=every), hooks=(Recording,))
    _, rows, final = trained(setup, tiny_mlp().train)
    steps = range(every, len(rows), every)
    expected, left = [torch.zeros_like(p, dtype=torch.float64) for p in final], 1.0
    for s in reversed(steps):
        d = min(decay, s / (9 + s)) ** every
        expected = [e + left * (1 - d) * w.double() for e, w in zip(expected, rows[s], strict=True)]
        left *= d
    assert len(rows) == 25 and left < 0.2
    assert_close(final, [e + left * w.double() for e, w in zip(expected, rows[0], strict=True)])


def test_ema_without_warmup_is_that_of_torch():
    """Where the warm-up is over, the same weights give what torch.optim.swa_utils gives."""
    model = nn.Linear(3, 2)
    hook = setup_of(Ema(decay=0.3)).training.make_hooks[0](model)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.3))
    reference.update_parameters(model)
    hook.count = 10
    assert decay_at(11, 0.3) == 0.3
    for _ in range(6):
        nn.init.normal_(model.weight)
        hook.after_step(model, 0.5)
        reference.update_parameters(model)
    assert_close(hook.weights, list(reference.module.parameters()))


@pytest.mark.parametrize("every", [1, 3])
def test_swa_is_that_of_torch(every):
    """Of 24 steps, the weights after the twelfth and those that follow, in an AveragedModel."""
    setup = setup_of(Swa(start=0.5, every=every), build=tiny_cnn, hooks=(Recording,))
    _, rows, final = trained(setup, tiny_cnn().train)
    model = tiny_cnn().build()
    reference = AveragedModel(model)
    for row in rows[12::every]:
        for p, value in zip(model.parameters(), row, strict=True):
            p.data.copy_(value)
        reference.update_parameters(model)
    assert int(reference.n_averaged) == (13 if every == 1 else 5)
    assert_close(final, list(reference.module.parameters()))


def mean_of(rows):
    return [torch.stack(column).double().mean(0).float() for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_batch_statistics_are_those_of_update_bn(method):
    """The finished model's, over the same batches; other buffers and weights are left alone by it."""
    setup, data = setup_of(method, build=tiny_cnn), tiny_cnn().train
    fit(setup, data, epochs=2, seed=0)
    reference = deepcopy(setup.model)
    update_bn([batch.inputs for batch in spread(data, 16, END)], reference)
    norms = [(n, b) for n, b in setup.model.named_buffers() if "running" in n]
    assert norms
    for name, buffer in norms:
        torch.testing.assert_close(buffer, reference.get_buffer(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_a_look_shows_the_average_and_leaves_no_trace(method):
    """Inside, weights are the second set's and statistics anew; afterwards every bit is as before, so looks change nothing."""
    inside = []

    class Looking(Hook):
        interval = 0.25

        def look(self, model, look):
            before = fingerprint(model)
            look.quality()
            assert fingerprint(model) == before

    def evaluate(model):
        inside.append(fingerprint(model))
        return 0.0

    marks, data = [], tiny_cnn().train
    for hooks in ((), (lambda m: Looking(),)):
        setup = setup_of(method, build=tiny_cnn, hooks=hooks)
        setup = replace(setup, context=replace(setup.context, evaluate=evaluate))
        outcome = fit(setup, data, epochs=2, seed=0)
        with outcome.evaluating(setup.model):
            marks.append(fingerprint(setup.model))
        assert marks[-1] == fingerprint(setup.model)
    assert marks[0] == marks[1] and len(set(inside)) == 4


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_lookahead_is_a_naive_loop(power):
    """SGD by hand on the same order of examples; the model ends with the slow weights, two steps after the last move."""
    method = Lookahead(alpha=0.4, every=4, power=power)
    setup, data = setup_of(method, hooks=(Recording,)), tiny_mlp().train
    data = data.part(torch.arange(88))  # 22 steps of 16 in 4 epochs
    _, rows, final = trained(setup, data)
    model = tiny_mlp().build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    slow = [p.detach().clone() for p in model.parameters()]
    order = Sampler(88, 16, seed=0)
    for step in range(1, 23):
        batch = data.batch(order.indices(16 * (step - 1)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.target).backward()
        optimizer.step()
        if step % 4 == 0:
            share = 1 - 0.6 * (step / 22) ** power
            slow = [s + share * (p.detach() - s) for s, p in zip(slow, model.parameters(), strict=True)]
            for s, p in zip(slow, model.parameters(), strict=True):
                p.data.copy_(s)
    assert len(rows) == 23
    assert_close(final, slow)
    assert_close(rows[22], [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_killed_and_resumed_is_bit_identical(tmp_path, method):
    """With batch norm, a transform and AdamW; twelve steps, broken off three times, also right after a move."""
    data = tiny_cnn().train
    make = lambda: setup_of(Crop(), method, build=tiny_cnn, optimizer=ADAMW)  # noqa: E731
    straight, _ = run(make, data, 2, tmp_path / "straight")
    mark, outcome = resumed(make, data, 2, tmp_path / "cut", (2, 5, 4))
    assert mark == straight and outcome.exact and outcome.steps == 12


def test_a_finished_step_is_only_loaded(tmp_path):
    """The average, not the trained weights that its state holds."""
    data, make = tiny_cnn().train, lambda: setup_of(Ema(decay=0.9), build=tiny_cnn)
    first, _ = run(make, data, 1, tmp_path)
    second, outcome = run(make, data, 1, tmp_path, cut=1)
    assert first == second and outcome.steps == 6


@pytest.mark.parametrize(
    "methods",
    [(Ema(decay=0.9),), (Ema(decay=0.9, every=4),), (Lookahead(every=4),), (Ema(decay=0.9), Lookahead(every=4))],
    ids=repr,
)
@pytest.mark.parametrize("parts", [(1, 2), (0.5, 2.5)])
def test_continued_equals_longer(tmp_path, methods, parts):
    """At a constant rate, three epochs are bit for bit what one and two more are, or one that is broken off and resumed."""
    data = tiny_cnn((90, 8, 8)).train
    make = lambda: setup_of(*methods, build=tiny_cnn, optimizer=ADAMW)  # noqa: E731
    longer, outcome = run(make, data, 3, tmp_path / "longer")
    _, first = run(make, data, parts[0], tmp_path / "first")
    again, second = run(make, data, parts[1], tmp_path / "second", start=tmp_path / "first")
    assert outcome.steps == first.steps + second.steps
    assert again == longer


def test_swa_of_a_continued_step_is_of_its_own_last_part(tmp_path):
    """The second step averages its last half alone, from the trained weights of the first."""
    data, make = tiny_mlp().train, lambda: setup_of(Swa(start=0.5), hooks=(Recording,))
    run(make, data, 2, tmp_path / "first")
    _, outcome = run(make, data, 2, tmp_path / "second", start=tmp_path / "first")
    _, longer = run(lambda: setup_of(hooks=(Recording,)), data, 4, tmp_path / "plain")
    rows = longer.hooks[0].rows
    assert_close(outcome.hooks[1].weights, mean_of(rows[18:]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("method", [Ema(decay=0.9), Swa(start=0.25), Lookahead(every=5)], ids=repr)
@pytest.mark.parametrize("gradual", [0.0, 0.5])
def test_pruned_weights_stay_zero(method, gradual, order):
    """Weights that are gone are zero in every look from then on and at the end, in either order of the steps."""
    pruning = PruneWeights(ratio=0.75, gradual=gradual)
    setup = setup_of(*[(pruning, method)[i] for i in order])
    zeros = []

    def evaluate(model):
        zeros.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
        return 0.0

    class Looking(Hook):
        interval = 0.125

        def look(self, model, look):
            look.quality()

    hooks = (*setup.training.make_hooks, lambda m: Looking())
    setup = replace(setup, training=replace(setup.training, make_hooks=hooks))
    setup = replace(setup, context=replace(setup.context, evaluate=evaluate))
    fit(setup, tiny_mlp().train, epochs=4, seed=0)
    evaluate(setup.model)
    size = sum(p.numel() for p in setup.model.parameters() if p.dim() > 1)
    assert all(found >= round(0.75 * size) for found in zeros[4:])


def test_lookahead_acts_before_what_stands_there():
    """A hook that was there first sees the weights after the move, wherever lookahead stands; an average comes later."""
    setup = setup_of(Ema(), hooks=(Recording,))
    hooks = [type(make(setup.model)).__name__ for make in Lookahead()(setup).training.make_hooks]
    assert hooks == ["SlowWeights", "Recording", "ExponentialAverage"]


def test_half_precision_is_averaged_in_float32():
    """2⁻¹² of a step of 1 is below bfloat16's resolution at 1, and is not lost."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    hook = setup_of(Ema(decay=0.999)).training.make_hooks[0](model)
    hook.begin(model, tiny_mlp().train)
    hook.count = 10**6
    nn.init.constant_(model.weight, 2.0)
    hook.after_step(model, 0.5)
    assert hook.weights[0].item() == pytest.approx(1.001, abs=1e-6)
    with hook.eval(model):
        assert model.weight.dtype == torch.bfloat16


def test_refusals():
    """A second average, an optimizer that averages, nothing to train, and values that cannot be."""
    with pytest.raises(NotApplicable, match="another average"):
        setup_of(Ema(), Swa())
    with pytest.raises(NotApplicable, match="lookahead stands already"):
        setup_of(Lookahead(), Lookahead(every=3))
    averaging = replace(SGD, make_hooks=(lambda model, optimizer: Hook(),))
    frozen = setup_of()
    frozen.model.requires_grad_(False)
    for method in (Ema(), Swa(), Lookahead()):
        with pytest.raises(NotApplicable, match="averages its weights already"):
            setup_of(method, optimizer=averaging)
        with pytest.raises(NotApplicable, match="no floating parameter"):
            method(frozen)
    bad = [
        (Ema, {"decay": 1.0}), (Ema, {"every": 0}), (Swa, {"start": 1.0}), (Swa, {"every": 0}),
        (Lookahead, {"alpha": 1.0}), (Lookahead, {"every": 1}), (Lookahead, {"power": -1.0}),
    ]  # fmt: skip
    for kind, fields in bad:
        with pytest.raises(BadInput, match=f"{kind.name}.{next(iter(fields))}"):
            kind(**fields)


def test_swa_that_never_began_changes_nothing():
    """Stopped before its start, the model keeps its trained weights."""

    class Stop(Hook):
        def after_step(self, model, progress):
            self.stopped = progress >= 0.5

    marks = []
    for methods in ((), (Swa(start=0.75),)):
        setup = setup_of(*methods, build=tiny_cnn, hooks=(lambda m: Stop(),))
        outcome = fit(setup, tiny_cnn().train, epochs=2, seed=0)
        assert outcome.steps == 6
        with outcome.evaluating(setup.model) if methods else nullcontext():
            marks.append(fingerprint(setup.model))
    assert marks[0] == marks[1]
