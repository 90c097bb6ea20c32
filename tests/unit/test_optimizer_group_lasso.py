"""Group lasso: block soft-thresholding against its theorem, and widths whose zero units can be cut without changing outputs."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quadriga.core.axes import AxisGraph
from quadriga.core.batch import call
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.optimizer.group_lasso import GroupLasso, group_shrink
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.structure.prune_channels import PruneChannels
from quadriga.testing import fingerprint, tiny_attention, tiny_cnn, tiny_lstm, tiny_mlp, tiny_transformer
from quadriga.train.loop import fit

torch.set_num_threads(1)


def stepped(model, optimizer):
    """One step with random gradients that are equal for equal models."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def test_group_shrink_is_the_proximal_operator():
    """w = factor · v minimizes ½ |w - v|² + threshold |w|: the slope is 0 where w is not, and |v| ≤ threshold where it is."""
    v = torch.randn(200, 5, dtype=torch.float64)
    threshold = torch.full((200,), 2.0, dtype=torch.float64)
    w = group_shrink(v.norm(dim=1), threshold)[:, None] * v
    zero = (w == 0).all(1)
    slope = w - v + 2.0 * w / w.norm(dim=1, keepdim=True)
    torch.testing.assert_close(slope[~zero], torch.zeros_like(slope[~zero]))
    assert torch.equal(zero, v.norm(dim=1) <= 2.0) and 0 < int(zero.sum()) < 200


def test_a_step_of_one_hidden_width_in_closed_form():
    """The unit is a row, its bias and a column; what no unit holds is the optimizer's alone."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    setup = replace(Setup.of(tiny_mlp()), model=models[0])
    stepped(models[0], GroupLasso(amount=0.9)(Optimizer(lr=0.2)(setup)).optimizer.make(models[0]))
    stepped(models[1], Optimizer(lr=0.2).make(models[1]))
    first, last = models[1][0], models[1][2]
    norms = (first.weight.square().sum(1) + first.bias.square() + last.weight.square().sum(0)).sqrt()
    factor = (1 - 0.2 * 0.9 * 13**0.5 / norms).clamp_min(0).detach()
    assert 0 < int((factor == 0).sum()) < 8
    torch.testing.assert_close(models[0][0].weight, factor[:, None] * first.weight)
    torch.testing.assert_close(models[0][0].bias, factor * first.bias)
    torch.testing.assert_close(models[0][2].weight, factor * last.weight)
    torch.testing.assert_close(models[0][2].bias, last.bias)


@pytest.mark.parametrize("build", [tiny_mlp, tiny_cnn, tiny_lstm, tiny_transformer, tiny_attention])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
def test_every_weight_is_scaled_by_its_units(build, kind):
    """In float64, against a plain loop over the axis graph: flattened maps, gates of an LSTM, residual sums and norms too."""
    first, second = (build().build().double() for _ in range(2))
    example = build().example
    example = example.double() if example.is_floating_point() else example
    setup = Setup.of(build())
    setup = replace(setup, model=first, context=replace(setup.context, example=example))
    try:
        optimizer = GroupLasso(amount=1.0)(Optimizer(kind=kind, lr=0.05)(setup)).optimizer.make(first)
    except NotApplicable:
        assert build is tiny_attention  # has heads alone
        return
    stepped(first, optimizer)
    stepped(second, Optimizer(kind=kind, lr=0.05).make(second))
    expected = {id(p): p.detach().clone() for p in second.parameters()}
    for group in AxisGraph.trace(second, example).groups():
        if group.kind not in ("conv", "linear", "recurrent") or group.fixed or group.split:
            continue
        members = [m for m in group.members if isinstance(m.tensor, nn.Parameter)]
        for unit in range(group.size):
            slices = [m.tensor.detach().index_select(m.dim, (m.units == unit).nonzero().flatten()).flatten() for m in members]
            values = torch.cat(slices)
            factor = max(0.0, 1 - 0.05 * 1.0 * len(values) ** 0.5 / float(values.norm()))
            for m in members:
                expected[id(m.tensor)].movedim(m.dim, 0)[m.units == unit] *= factor
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), expected[id(q)], rtol=1e-5, atol=1e-8)


def outputs(setup):
    setup.model.eval()
    with torch.no_grad():
        return call(setup.model, tiny(setup).val.batch(torch.arange(48)).inputs)


def tiny(setup):
    return {4: tiny_cnn, 2: tiny_mlp, 3: tiny_lstm}[setup.context.classes]()


@pytest.mark.parametrize(
    ("build", "optimizer", "amount", "epochs"),
    [
        (tiny_mlp, Optimizer(kind="adamw", lr=0.01), 0.2, 20),
        (tiny_cnn, Optimizer(kind="adamw", lr=0.01), 0.2, 10),
        (tiny_lstm, Optimizer(lr=0.3, momentum=0.9), 0.002, 60),
        (tiny_mlp, Optimizer(kind="muon", lr=0.01), 0.2, 20),
        (tiny_mlp, Optimizer(lr=0.1, momentum=0.9), 0.01, 20),
    ],
    ids=["mlp", "cnn", "lstm", "muon", "sgd"],
)
def test_zero_units_are_cut_and_outputs_stay(build, optimizer, amount, epochs):
    """Training makes some units exactly zero; pruning takes those and no others, and the outputs stay to 1e-6."""
    workload = build()
    setup = GroupLasso(amount=amount)(optimizer(Setup.of(workload)))
    fit(setup, workload.train, epochs=epochs, seed=0)
    model = setup.model
    norms = [(g.size, zeros(g)) for g in AxisGraph.trace(model, workload.example).groups() if not g.fixed and not g.split]
    gone = sum(z for _, z in norms)
    assert 0 < gone < sum(size for size, _ in norms)
    before, count = outputs(setup), sum(p.numel() for p in model.parameters())
    after = PruneChannels(zeros=True, round_to=1)(setup.reset_training(workload))
    torch.testing.assert_close(outputs(after), before, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in after.model.parameters()) < count
    groups = [g for g in AxisGraph.trace(after.model, workload.example).groups() if not g.split]
    assert sum(zeros(g) for g in groups if not g.fixed) == 0


def zeros(group):
    """How many of a group's units are zero in all their weights."""
    total = torch.zeros(group.size)
    for m in group.members:
        if isinstance(m.tensor, nn.Parameter):
            each = (
                m.tensor.detach().abs().movedim(m.dim, 0).flatten(1).sum(1) if m.tensor.dim() > 1 else m.tensor.detach().abs()
            )
            total.index_add_(0, m.units.clamp_min(0), each.float() * (m.units >= 0))
    return int((total == 0).sum())


def test_without_zero_units_there_is_nothing_to_cut():
    setup = Setup.of(tiny_cnn())
    with pytest.raises(NotApplicable, match="no channel is zero") as caught:
        PruneChannels(zeros=True)(setup)
    assert "group_lasso" in caught.value.remedy
    for fields in ({"importance": "taylor"}, {"gradual": 0.5}):
        with pytest.raises(BadInput, match="zeros"):
            PruneChannels(zeros=True, **fields)


def test_it_follows_a_network_that_a_later_step_changed():
    """Cut after it, the network has other widths: the units are read anew, and those shrink."""
    setup = PruneChannels(ratio=0.5)(GroupLasso(amount=100.0)(Optimizer(lr=0.1)(Setup.of(tiny_mlp()))))
    model = setup.model
    optimizer = setup.optimizer.make(model)
    stepped(model, optimizer)
    assert not model[0].weight.any() and not model[2].weight.any() and not model[4].weight.any() and model[4].bias.any()


def test_a_rate_of_zero_and_gradients_that_are_absent():
    """At rate 0 nothing shrinks, units that are zero included; the penalty acts on units that a loss does not reach too."""
    setup = GroupLasso(amount=100.0)(Optimizer()(Setup.of(tiny_mlp())))
    model = setup.model
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[2].weight[:, 0] = 0, 0, 0
    optimizer, before = setup.optimizer.make(model), fingerprint(model)
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(model, optimizer)
    assert fingerprint(model) == before


def test_frozen_widths_are_left():
    """A unit of which a part does not train cannot go to zero as a whole."""
    workload = tiny_mlp()
    model = workload.build()
    model[0].weight.requires_grad_(False)
    setup = Setup.of(workload, model=model)
    optimizer = GroupLasso(amount=100.0)(setup).optimizer.make(model)
    before = model[0].bias.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].bias, before) and not model[4].weight.any()
    model.requires_grad_(False)
    with pytest.raises(NotApplicable, match="trained"):
        GroupLasso()(setup)


@pytest.mark.parametrize("amount", [0.0, -1.0])
def test_bad_values(amount):
    with pytest.raises(BadInput, match="amount"):
        GroupLasso(amount=amount)
