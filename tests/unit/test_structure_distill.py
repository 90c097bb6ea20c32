"""distill: its limits are theorems; a kept answer is the teacher's answer, whoever asks, and a resumed run has its bits."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from quadriga.core.batch import Batch, call, device_of, primary, resize, tree_map
from quadriga.core.data import DatasetData, TensorData
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook
from quadriga.core.workload import Workload
from quadriga.engine.walk import walk
from quadriga.methods.structure import _cache
from quadriga.methods.structure._cache import Cache, fingerprints
from quadriga.methods.structure._teacher import Teacher, content
from quadriga.methods.structure.distill import Distill, soft_divergence
from quadriga.methods.structure.prune_channels import PruneChannels
from quadriga.methods.training.flip import Flip
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.testing.zoo import ZOO
from quadriga.train.loop import fit

torch.set_num_threads(1)
X, Y = torch.randn(12, 6), torch.arange(12) % 4
BATCH = Batch(X, Y, torch.arange(12))


def setup(teacher):
    return Setup.of(Workload(model=nn.Linear(6, 4), train=(X, Y), val=(X, Y), test=(X, Y)), teacher=teacher)


def teacher():
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))


def test_alpha_0_is_the_inner_loss_and_equal_logits_cost_nothing():
    state = setup(teacher())
    logits = torch.randn(12, 4)
    assert Distill(alpha=0.0)(state).training.loss(logits, BATCH).equal(state.training.loss(logits, BATCH))
    answers = state.context.teacher.eval()(X)
    torch.testing.assert_close(Distill(alpha=1.0)(state).training.loss(answers, BATCH), torch.zeros(12), rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(0.5, 8), st.integers(0, 1000))
def test_gradient_equals_the_reference(temperature, seed):
    """d/dz of T² KL(p_T ‖ q_T) is T (q_T − p_T)."""
    generator = torch.Generator().manual_seed(seed)
    student, target = (torch.randn(5, 7, generator=generator, dtype=torch.double) for _ in range(2))
    student.requires_grad_()
    soft_divergence(student, target, temperature).sum().backward()
    wanted = temperature * ((student / temperature).softmax(-1) - (target / temperature).softmax(-1))
    torch.testing.assert_close(student.grad, wanted.detach())


def test_hot_limit_is_the_squared_distance_of_centred_logits():
    student, target = torch.randn(5, 7, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    centred = (student - student.mean(-1, keepdim=True)) - (target - target.mean(-1, keepdim=True))
    limit = centred.square().sum(-1) / (2 * 7)
    torch.testing.assert_close(soft_divergence(student, target, 1e4), limit, rtol=1e-3, atol=1e-6)


def test_it_wraps_what_it_finds_and_leaves_the_teacher_alone():
    """(1 − a) inner + a soft, per example; the teacher answers in evaluation mode, without gradients, and keeps its mode."""
    state = setup(teacher().train())
    inner = replace(state, training=replace(state.training, loss=lambda o, b: 3 * cross_entropy(o, b.target, reduction="none")))
    logits = torch.randn(12, 4, requires_grad=True)
    loss = Distill(alpha=0.25, temperature=3.0)(inner).training.loss(logits, BATCH)
    with torch.no_grad():
        answers = state.context.teacher[0](X)
    wanted = 0.75 * 3 * cross_entropy(logits, Y, reduction="none") + 0.25 * soft_divergence(logits, answers, 3.0)
    torch.testing.assert_close(loss, wanted)
    loss.sum().backward()
    assert state.context.teacher.training and all(p.grad is None for p in state.context.teacher.parameters())


def test_it_needs_a_teacher_of_the_same_task_and_logits():
    with pytest.raises(NotApplicable, match="TEACHER"):
        Distill()(setup(None))
    state = setup(teacher())
    with pytest.raises(NotApplicable, match="LOGITS"):
        Distill()(replace(state, traits=state.traits - {"LOGITS"}))
    with pytest.raises(NotApplicable, match=r"\(2, 5\).*\(2, 4\)"):
        Distill()(setup(nn.Linear(6, 5)))
    for fields in ({"temperature": 0.0}, {"alpha": 1.5}):
        with pytest.raises(BadInput, match=next(iter(fields))):
            Distill(**fields)


def test_sequences_are_averaged_over_the_positions_that_count():
    """[batch, positions, classes]: each example's mean over the positions whose target is not −100."""
    workload = tiny_transformer()
    state = Setup.of(workload, teacher=workload.build(0).eval())
    batch = workload.train.batch(torch.arange(3))
    batch.target[1, 5:] = -100
    logits = torch.randn(3, 12, 20)
    loss = Distill(alpha=1.0)(state).training.loss(logits, batch)
    parts = soft_divergence(logits, state.context.teacher(batch.inputs).detach(), 2.0)
    torch.testing.assert_close(loss, torch.stack([parts[0].mean(), parts[1, :5].mean(), parts[2].mean()]))


def test_model_outputs_and_keywords():
    """A BERT of transformers: equal student and teacher differ by nothing; training moves it."""
    workload = ZOO["bert"]()
    model = workload.build(0).eval()
    state = Distill(alpha=1.0)(Setup.of(workload, model=model, teacher=deepcopy(model)))
    batch = workload.train.batch(torch.arange(4))
    assert state.training.loss(call(model, batch.inputs), batch).abs().max() < 1e-6
    before = fingerprint(model)
    fit(state, workload.train, epochs=1, seed=0)
    assert fingerprint(model) != before


def test_the_present_network_teaches_and_stays_as_it_was():
    """Neither pruning nor training reaches the copy; no baseline is asked for, but training is."""
    workload = tiny_cnn(trained=True)
    state = Setup.of(workload)
    wide = deepcopy(state.model).eval()
    state = PruneChannels(ratio=0.5)(Distill(alpha=1.0, teacher="present")(state))
    batch = workload.train.batch(torch.arange(8))
    student = torch.randn(8, 4)
    wanted = soft_divergence(student, wide(batch.inputs).detach(), 2.0)
    assert state.training.loss(student, batch).equal(wanted)
    fit(state, workload.train, epochs=1, seed=0)
    assert state.training.loss(student, batch).equal(wanted)
    with pytest.raises(NotApplicable, match="requires TRAINED"):
        Distill(teacher="present")(Setup.of(tiny_cnn()))


def test_a_recipe_with_a_teacher_that_it_trains(tmp_path):
    """The narrow network ends nearer to the wide one's answers than without it."""
    workload = tiny_mlp()
    wide = walk(workload, Recipe((step("train", epochs=4),)), seed=0, store=tmp_path).setup.model
    found = []
    for alpha in (1.0, 0.0):
        middle = (step("distill", teacher="present", alpha=alpha), step("prune_channels", ratio=0.5))
        recipe = Recipe((step("train", epochs=4), *middle, step("train", epochs=4)))
        narrow = walk(workload, recipe, seed=0, store=tmp_path).setup.model
        inputs = workload.inputs(48)
        found.append(soft_divergence(narrow(inputs), wide(inputs), 2.0).mean().item())
    assert found[0] < found[1]


def test_the_teacher_moves_to_the_batch():
    """Once, to the device of the inputs (meta stands for a GPU)."""
    one = Teacher(nn.Linear(6, 4))
    assert one(torch.empty(3, 6, device="meta")).device.type == device_of(one.model).type == "meta"


def cached(workload, **fields):
    """A setup with kept answers, and how many examples its teacher is asked."""
    asked = []
    teacher = workload.build(7).eval().requires_grad_(False)
    for p in teacher.parameters():
        p.mul_(1.5)
    state = Setup.of(workload, teacher=teacher)
    state = Distill(**{"alpha": 0.7, "cache": True, **fields})(state)
    teacher.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
    return state, asked


@pytest.mark.parametrize("build", [tiny_cnn, tiny_mlp, tiny_transformer])
def test_kept_answers_train_the_same_network(build):
    """Bit for bit, over three epochs; and the teacher is asked once for each example (96 in groups of 16)."""
    marks = []
    for cache in (True, False):
        workload = build()
        state, asked = cached(workload, cache=cache)
        fit(state, workload.train, epochs=3, seed=0)
        marks.append(fingerprint(state.model))
        assert sum(asked) == (96 if cache else 3 * 96)
    assert marks[0] == marks[1]


def test_an_answer_does_not_depend_on_who_asked_first():
    """Of a Llama in batches of 23, the last bits depend on an example's place in the batch; what is kept does not."""
    workload = ZOO["llama"]()
    model, inputs = workload.build(0).eval(), workload.inputs(23)
    data = TensorData(resize(inputs, 60), torch.zeros(60))
    orders = [torch.randperm(60, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    kept = []
    for order in orders:
        cache, rows = Cache(Teacher(model), "distill"), torch.empty(60, 10, 50)
        with cache.over(data):
            for index in (order[:23], order[23:46], order[37:]):
                rows[index] = cache(data.batch(index))
        kept.append(rows)
    assert all(rows.equal(kept[0]) for rows in kept)
    answers = primary(call(model, tree_map(lambda t: t[:23], data.inputs))).detach()
    torch.testing.assert_close(kept[0][:23], answers)


class Counting(Hook):
    """Counts optimizer steps; at one of them it stops the run, as a kill would."""

    def __init__(self, stop=0):
        self.steps, self.stop = 0, stop

    def after_step(self, model, progress):
        self.steps += 1
        if self.steps == self.stop:
            raise KeyboardInterrupt


def counting(state, stop=0):
    hook = Counting(stop)
    make_hooks = (*state.training.make_hooks, lambda model: hook)
    return replace(state, training=replace(state.training, make_hooks=make_hooks)), hook


def test_resumed_runs_have_the_bits_of_straight_ones(tmp_path):
    """Stopped in the second epoch, with answers that were kept from the first."""
    workload = tiny_transformer()
    straight, _ = cached(workload)
    fit(straight, workload.train, epochs=3, seed=0, checkpoint=tmp_path / "straight")
    first, _ = counting(cached(workload)[0], stop=9)
    with pytest.raises(KeyboardInterrupt):
        fit(first, workload.train, epochs=3, seed=0, checkpoint=tmp_path / "stopped", every=0.0)
    again, hook = counting(cached(workload)[0])
    fit(again, workload.train, epochs=3, seed=0, checkpoint=tmp_path / "stopped")
    assert hook.steps == 10 and fingerprint(again.model) == fingerprint(straight.model)


def test_no_run_goes_on_with_another_teacher(tmp_path):
    workload = tiny_mlp()
    for seed, same in ((0, True), (0, True), (1, False)):
        teacher = workload.build(0).eval()
        with torch.no_grad():
            teacher[0].bias.add_(seed)
        state = Distill()(Setup.of(workload, teacher=teacher))
        if same:
            fit(state, workload.train, epochs=1, seed=0, checkpoint=tmp_path)
            continue
        with pytest.raises(BadInput, match="another run: loss"):
            fit(state, workload.train, epochs=1, seed=0, checkpoint=tmp_path)


def test_kept_answers_are_refused_where_inputs_are_augmented():
    """By a transform before it at once, by one after it before a step; without the cache both train."""
    workload = tiny_cnn()
    with pytest.raises(NotApplicable, match="leave out cache or the transforms"):
        Distill(cache=True)(Flip()(Setup.of(workload, teacher=workload.build(0))))
    for cache in (True, False):
        state, hook = counting(Flip()(cached(workload, cache=cache)[0]))
        if not cache:
            fit(state, workload.train, epochs=1, seed=0)
            continue
        with pytest.raises(NotApplicable, match="augmented") as caught:
            fit(state, workload.train, epochs=1, seed=0)
        assert hook.steps == 0 and caught.value.__notes__ == ["distill"]


class Noisy(torch.utils.data.Dataset):
    """Augments by itself, as torchvision's data sets do."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.randn(10), i % 2


def test_kept_answers_are_refused_where_an_index_does_not_tell_the_inputs(monkeypatch):
    """Data that augments by itself, indices from elsewhere, and answers that would not fit; never after a step."""

    class Foreign(TensorData):
        def batch(self, index):
            return replace(super().batch(index), index=self.other(index))

    x, y = torch.randn(32, 10), torch.arange(32) % 2
    state, hook = counting(cached(tiny_mlp())[0])
    with pytest.raises(NotApplicable, match="change from one reading to the next"):
        fit(state, DatasetData(Noisy()), epochs=1, seed=0)
    others = {
        "change": lambda i: (i + 1) % 32,
        "names the examples 4": lambda i: i + 40,
        "names the examples -": lambda i: i - 40,
    }
    for words, other in others.items():
        data = Foreign(x, y)
        data.other = other
        with pytest.raises(NotApplicable, match=words):
            fit(state, data, epochs=1, seed=0)
    monkeypatch.setattr(_cache, "LIMIT", 32 * 2 * 4 - 1)
    with pytest.raises(NotApplicable, match="32 examples take"):
        fit(state, TensorData(x, y), epochs=1, seed=0)
    monkeypatch.setattr(_cache, "LIMIT", 32 * 2 * 4)
    assert hook.steps == 0
    fit(state, TensorData(x, y), epochs=1, seed=0)


def test_fingerprints_tell_inputs_apart():
    """Equal in every memory format; another bit, order, key or type gives another number."""
    images = torch.randn(4, 3, 5, 5)
    marks = fingerprints(images)
    assert fingerprints(images.to(memory_format=torch.channels_last)).equal(marks) and len(set(marks.tolist())) == 4
    changed = images.clone()
    changed.view(torch.int32)[:, 1, 2, 3] ^= 1
    others = [changed, images.flip(-1), images.half(), {"a": images, "b": images}]
    assert not any((fingerprints(o) == marks).any() for o in others)
    tokens = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    padded = {**tokens, "attention_mask": torch.tensor([[True, True, False]] * 2)}
    assert not (fingerprints(tokens) == fingerprints(padded)).any()


def test_a_teachers_mark_is_its_content():
    """Another value, buffer or kind gives another; a copy the same."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    buffer = deepcopy(net)
    buffer[1].running_mean[0] = 1
    marks = {content(n) for n in (net, deepcopy(net), buffer, nn.Sequential(nn.Linear(3, 3)), nn.ModuleList(net))}
    assert len(marks) == 4
