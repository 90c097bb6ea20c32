"""distill_features: its distances are invariant where they should be, and nothing of it stays after a train step."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quadriga.core.errors import BadInput, Diverged, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.core.workload import Workload
from quadriga.methods.structure._taps import pairs, spread, tapped
from quadriga.methods.structure.distill_features import DistillFeatures, gram_distance, relative_error
from quadriga.methods.structure.prune_channels import PruneChannels
from quadriga.methods.structure.shrink import Shrink
from quadriga.methods.training.label_smoothing import LabelSmoothing
from quadriga.testing import fingerprint, tiny_cnn, tiny_lstm, tiny_mlp, tiny_transformer
from quadriga.testing.zoo import ZOO
from quadriga.train.loop import fit

torch.set_num_threads(1)


def hooked(model):
    """How many forward hooks there are."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state_of(workload, student=None):
    """A setup whose teacher is the untouched network."""
    return Setup.of(workload, model=student or workload.build(0), teacher=workload.build(0).eval())


def term_of(method, state, batch):
    """What the method adds to the loss of one forward pass in evaluation mode, [batch]."""
    model, seen = state.model.eval(), []
    after = method(replace(state, training=replace(state.training, loss=lambda o, b: torch.zeros(len(b)))))
    hook = after.training.make_hooks[-1](model)
    with hook.train(model, None):
        seen.append(after.training.loss(model(batch.inputs), batch))
    return seen[0]


def test_gram_distance_is_blind_to_rotation_scale_and_width():
    """F Fᵀ = (F Q)(F Q)ᵀ for orthogonal Q; rows are scaled to length 1; and it is 1/batch of nothing but rows."""
    features, other = torch.randn(2, 7, 5, dtype=torch.double).unbind()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.double))[0]
    wide = torch.cat([features @ rotation, torch.zeros(7, 4)], 1)
    torch.testing.assert_close(gram_distance(3 * wide, features), torch.zeros(7), rtol=0, atol=1e-9)
    torch.testing.assert_close(gram_distance(3 * wide, other), gram_distance(features, other))
    rows = [nn.functional.normalize(f @ f.T, dim=1) for f in (features, other)]
    paper = (rows[0] - rows[1]).square().sum() / 7**2  # Tung & Mori, equation 4
    torch.testing.assert_close(gram_distance(features, other).double().mean() / 7, paper, rtol=1e-5, atol=0)


def test_relative_error_has_no_unit():
    """Scaling both leaves it; a silent student's is 1 on average."""
    student, teacher = torch.randn(2, 6, 3, 4).unbind()
    torch.testing.assert_close(relative_error(5 * student, 5 * teacher), relative_error(student, teacher))
    torch.testing.assert_close(relative_error(0 * student, teacher).mean(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["gram", "mse"])
@pytest.mark.parametrize("build", [tiny_cnn, tiny_lstm, tiny_mlp, tiny_transformer])
def test_an_equal_network_pays_nothing_and_another_does(build, kind):
    """Term and gradient are 0 for the teacher's own weights, but for the kernels of an LSTM that learns, and not for others."""
    workload = build()
    batch = workload.train.batch(torch.arange(8))
    other = workload.build(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    for student, zero in ((workload.build(0), True), (other, False)):
        term = term_of(DistillFeatures(kind=kind, count=2), state_of(workload, student), batch)
        assert term.shape == (8,)
        term.mean().backward()
        gradient = sum(float(p.grad.abs().sum()) for p in student.parameters() if p.grad is not None)
        assert (term.max() < 1e-9 and gradient < 1e-5) if zero else (term.max() > 1e-4 and gradient > 1e-3)


def test_the_term_is_the_mean_over_the_layers():
    """loss + b · mean of distances at the named layers, with the layers' values taken by hand."""
    workload = tiny_mlp()
    student = workload.build(0)
    nn.init.normal_(student[0].weight)
    state, batch = state_of(workload, student), workload.train.batch(torch.arange(6))
    term = term_of(DistillFeatures(beta=3.0, only="0,2"), state, batch)
    teacher = state.context.teacher
    wanted = [gram_distance(student[:n](batch.inputs), teacher[:n](batch.inputs)) for n in (1, 3)]
    torch.testing.assert_close(term, 3 * (wanted[0] + wanted[1]) / 2)


def test_padding_does_not_count():
    """BERT with a mask: what stands at padded positions changes no distance."""
    workload = ZOO["bert"]()
    student = workload.build(0)
    with torch.no_grad():
        student.bert.encoder.layer[0].output.dense.weight.mul_(2)
    batch = workload.train.batch(torch.arange(4))
    batch.inputs["attention_mask"][:, 6:] = 0
    other = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
    other["input_ids"][:, 6:] = 1
    found = []
    for inputs in (batch.inputs, other):
        state = state_of(workload, student)
        after = DistillFeatures(kind="mse", only="bert.encoder.layer.*")(state)
        with after.training.make_hooks[-1](student).train(student.eval(), None):
            output = student(**inputs)
            both = replace(batch, inputs=inputs)
            found.append(after.training.loss(output, both) - state.training.loss(output, both))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("kind", "beta"), [("gram", 30.0), ("mse", 1.0)])
def test_training_brings_the_layers_nearer(kind, beta):
    """Of a pruned network (gram) or one with other weights (mse), with the term and without."""
    workload = tiny_cnn(trained=True)
    found = []
    for method in (DistillFeatures(kind=kind, beta=beta, only="conv2", teacher="present"), None):
        state = Setup.of(workload)
        teacher, batch = deepcopy(state.model).eval(), workload.val.batch(torch.arange(48))
        state = method(state) if method else state
        if kind == "gram":
            state = PruneChannels(ratio=0.5, only="conv2", round_to=1)(state)
        else:
            torch.manual_seed(5)
            state.model.conv2.reset_parameters()
        fit(state, workload.train, epochs=4, seed=0)
        outputs = []
        for model in (state.model.eval(), teacher):
            with tapped(model, ["conv2"]) as seen, torch.no_grad():
                model(batch.inputs)
            outputs.append(seen["conv2"])
        found.append({"gram": gram_distance, "mse": relative_error}[kind](*outputs).mean())
    assert found[0] < 0.8 * found[1]


def test_no_hook_stays():
    """Nor after a divergence in the middle; outside of a train step the loss is what it was."""

    class Break(Hook):
        def after_step(self, model, progress):
            raise Diverged(0, 0.1, float("nan"))

    workload = tiny_cnn()
    state = DistillFeatures()(state_of(workload))
    plain, batch = state_of(workload).training.loss, workload.train.batch(torch.arange(4))
    breaking = replace(state, training=replace(state.training, make_hooks=(*state.training.make_hooks, lambda m: Break())))
    fit(state, workload.train, epochs=1, seed=0)
    with pytest.raises(Diverged):
        fit(breaking, workload.train, epochs=1, seed=0)
    assert hooked(state.model) == hooked(state.context.teacher) == 0
    logits = torch.randn(4, 4)
    assert state.training.loss(logits, batch).equal(plain(logits, batch))
    LabelSmoothing()(state)  # which tries the loss that it finds


class StopAt(Hook):
    """Stops the run at a step, as a kill would; at no step for 0."""

    def __init__(self, step):
        self.left = step

    def after_step(self, model, progress):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_resumed_runs_have_the_bits_of_straight_ones(tmp_path):
    workload = tiny_cnn()
    marks = []
    for stop, folder in ((0, None), (8, tmp_path), (0, tmp_path)):
        changed = workload.build(0)
        torch.manual_seed(1)
        changed.conv2.reset_parameters()
        state = DistillFeatures(beta=5.0)(state_of(workload, changed))
        hooks = (*state.training.make_hooks, lambda model, stop=stop: StopAt(stop))
        state = replace(state, training=replace(state.training, make_hooks=hooks))
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            fit(state, workload.train, epochs=2, seed=0, checkpoint=folder, every=0.0)
        marks.append(fingerprint(state.model))
    assert marks[0] == marks[2] != marks[1]


def test_layers_belong_together_by_name_or_depth():
    """Blocks without the answering layer; of lists of unequal length by relative depth; what was replaced keeps its name."""

    def net(depth):
        blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth)))
        return Net(blocks)

    class Net(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.first, self.blocks, self.last = nn.Linear(6, 4), blocks, nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.blocks(self.first(x)))

    x = torch.randn(2, 6)
    names = [(p.student, p.teacher) for p in pairs(net(2), net(6), x)]
    assert names == [("first", "first"), ("blocks.0", "blocks.2"), ("blocks.1", "blocks.5")]
    low = net(6)
    low.first = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 4))
    assert [p.student for p in pairs(low, net(6), x)] == ["first", *(f"blocks.{i}" for i in range(6))]
    assert spread(list(range(7)), 3) == [2, 4, 6]


def test_what_it_refuses():
    """Unequal shapes for mse, with both names and shapes; nothing to compare; the wrong task; bad fields."""
    workload = tiny_cnn(trained=True)
    pruned = PruneChannels(ratio=0.5, round_to=1)(state_of(workload))
    before = fingerprint(pruned.model)
    with pytest.raises(NotApplicable, match=r"conv2 \[\d, 4, 4\] and the teacher's conv2 \[8, 4, 4\]"):
        DistillFeatures(kind="mse", only="conv2")(pruned)
    with pytest.raises(NotApplicable, match='matches "conv9"'):
        DistillFeatures(only="conv9")(pruned)
    assert fingerprint(pruned.model) == before and hooked(pruned.model) == 0
    x, y = torch.randn(12, 6), torch.arange(12) % 4
    one = Workload(model=nn.Linear(6, 4), train=(x, y), val=(x, y), test=(x, y))
    with pytest.raises(NotApplicable, match="no hidden layer"):
        DistillFeatures()(state_of(one))
    with pytest.raises(NotApplicable, match="TEACHER"):
        DistillFeatures()(Setup.of(one))
    with pytest.raises(NotApplicable, match=r"\(2, 5\).*\(2, 4\)"):
        DistillFeatures()(Setup.of(one, teacher=nn.Linear(6, 5)))
    for fields in ({"beta": 0.0}, {"count": 0}):
        with pytest.raises(BadInput, match=next(iter(fields))):
            DistillFeatures(**fields)


def test_what_a_later_step_makes_impossible_is_refused_before_training():
    """mse with the network as it was, pruned afterwards; gram goes on."""
    workload = tiny_cnn(trained=True)
    state = PruneChannels(ratio=0.5, round_to=1)(
        DistillFeatures(kind="mse", only="conv*", teacher="present")(Setup.of(workload))
    )
    before = fingerprint(state.model)
    with pytest.raises(NotApplicable, match="conv1") as caught:
        fit(state, workload.train, epochs=1, seed=0)
    assert fingerprint(state.model) == before and caught.value.__notes__ == ["distill_features"]
    shrunk = Shrink(filters=0.5, round_to=1)(DistillFeatures(teacher="present")(Setup.of(workload)))
    assert fit(shrunk, workload.train, epochs=1, seed=0).steps == 6


def test_it_wraps_what_it_finds():
    """The inner loss acts once for each batch, and its values are the ones added to."""
    workload, seen = tiny_mlp(), []
    state = state_of(workload)

    def loss(output, batch):
        seen.append(len(batch))
        return 3 * cross_entropy(output, batch.target, reduction="none")

    after = DistillFeatures(beta=1e-9)(replace(state, training=replace(state.training, loss=loss)))
    outcome = fit(after, workload.train, epochs=1, seed=0)
    assert seen == [16] * 6 and outcome.loss > 0
