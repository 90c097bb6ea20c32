"""distill_attention: what it reads is what attention computes, and its distances are divergences."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from quadriga.core.batch import call, evaluating
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.methods.structure._attend import attention_distance, attention_of, overheard
from quadriga.methods.structure._taps import tapped
from quadriga.methods.structure.distill_attention import DistillAttention, map_distance, matched
from quadriga.methods.structure.prune_channels import PruneChannels
from quadriga.methods.structure.shrink import Shrink
from quadriga.testing import fingerprint, tiny_cnn, tiny_lstm, tiny_mlp, tiny_transformer
from quadriga.testing.workloads import TinyBlock, TinyTransformer
from quadriga.testing.zoo import ZOO
from quadriga.train.loop import fit

torch.set_num_threads(1)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


def noisy(model, amount=0.3):
    """The model with other weights."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def state_of(workload, student=None):
    """A setup whose teacher is the untouched network."""
    return Setup.of(workload, model=student or workload.build(0), teacher=workload.build(0).eval())


def term_of(method, state, batch):
    """What the method adds to the loss of one forward pass in evaluation mode, [batch]."""
    state = method(replace(state, training=replace(state.training, loss=lambda o, b: torch.zeros(len(b)))))
    with state.training.make_hooks[-1](state.model).train(state.model.eval(), None):
        return state.training.loss(call(state.model, batch.inputs), batch)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": CAUSAL},
        {"attn_mask": torch.randn(2, 4, 5, 5)},
        {"attn_mask": torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 2, torch.finfo(torch.float32).min)},
        {"enable_gqa": True},
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_the_weights_are_those_of_the_attention(options):
    """softmax weights times values is what scaled_dot_product_attention gives."""
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    if options.get("enable_gqa"):
        key, value = key[:, :2], value[:, :2]
    weights = attention_of(query, key, value, **options).log_weights().exp()
    wanted = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(weights @ value.repeat_interleave(4 // value.shape[1], 1), wanted)


def test_the_distance_is_the_divergence_of_weights_and_of_value_relations():
    """Against torch.distributions, head by head; both parts in nats per query; causal relations see no later key."""
    one, two = (attention_of(*torch.randn(3, 2, 4, 5, 8).unbind(), is_causal=True) for _ in range(2))

    def softmax(scores):
        return torch.distributions.Categorical(logits=scores.masked_fill(~CAUSAL, -1e30))

    parts = []
    for pair in ([a.query @ a.key.mT / 8**0.5 for a in (two, one)], [a.value @ a.value.mT / 8**0.5 for a in (two, one)]):
        parts.append(torch.distributions.kl_divergence(*map(softmax, pair)).mean(1))
    torch.testing.assert_close(attention_distance(one, two), parts[0] + parts[1])


def test_the_distance_is_blind_to_what_attention_is_blind_to():
    """A rotation of queries and keys, of values within a head, and, of another number of heads, their order and copies."""
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    one = attention_of(query, key, value)
    turned = attention_of(query @ turn, key @ turn, value @ turn)
    torch.testing.assert_close(attention_distance(turned, one), torch.zeros(2, 5), rtol=0, atol=1e-5)
    twice = attention_of(*(t.repeat_interleave(2, 1) for t in (query, key, value)))
    few = attention_distance(one, replace(twice, value=value))
    torch.testing.assert_close(few, torch.zeros(2, 5), rtol=0, atol=1e-5)
    other = attention_of(*torch.randn(3, 2, 2, 5, 16).unbind())
    assert (attention_distance(other, one) > 0).all()


def test_rows_without_any_key_give_no_nan():
    """A query that may attend to nothing (padding on the left) is compared as uniform, with a finite gradient."""
    query, key, value = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    for mask in (torch.zeros(2, 1, 5, 5, dtype=torch.bool), torch.full((2, 1, 5, 5), -torch.inf)):
        mask[:, :, 2:] = CAUSAL[2:] if mask.dtype == torch.bool else 0.0
        student = attention_of(query, key, value, mask)
        distance = attention_distance(student, attention_of(*torch.randn(3, 2, 4, 5, 8).unbind(), mask))
        assert distance.isfinite().all() and (distance[:, :2] == 0).all() and (distance[:, 2:] > 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(distance.sum(), (query, key, value)))


def test_layers_belong_together_by_lengths_and_depth():
    """Of a Whisper-like order of calls; the last with the last, and a network of half the depth with every second."""

    def calls(depth):
        kinds = [(6, 6)] * depth + [(4, 4), (4, 6)] * depth
        return [attention_of(torch.randn(1, 1, q, 2), torch.randn(1, 1, k, 2), torch.randn(1, 1, k, 2)) for q, k in kinds]

    student, teacher = calls(2), calls(4)
    places = [
        [next(i for i, a in enumerate(teacher) if a is t) for _, t in matched(student, teacher, x)] for x in ("all", "last")
    ]
    assert places == [[1, 3, 6, 7, 10, 11], [11]]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "whisper", "tiny", "cnn"])
def test_an_equal_network_pays_nothing_and_another_does(name):
    """Term and gradient are 0 for the teacher's own weights, and neither is for others; per example in all cases."""
    workload = {"tiny": tiny_transformer, "cnn": tiny_cnn, **ZOO}[name]()
    batch = workload.train.batch(torch.arange(4))
    for student, zero in ((workload.build(0), True), (noisy(workload.build(0)), False)):
        term = term_of(DistillAttention(layers="all"), state_of(workload, student), batch)
        assert term.shape == (4,)
        term.mean().backward()
        gradient = sum(float(p.grad.abs().sum()) for p in student.parameters() if p.grad is not None)
        assert (term.abs().max() < 1e-6 and gradient < 1e-4) if zero else (term.max() > 1e-3 and gradient > 1e-3)


def test_networks_of_other_heads_and_depth():
    """Two heads and two blocks teach four heads in one block: nearer after training than without the term."""
    workload, found = tiny_transformer(), []
    for beta in (10.0, None):
        torch.manual_seed(2)
        student = TinyTransformer()
        student.blocks = nn.ModuleList([TinyBlock(16, 4)])
        state = state_of(workload, student)
        noisy(state.context.teacher, 1.0)
        state = DistillAttention(beta=beta)(state) if beta else state
        batch = workload.val.batch(torch.arange(16))
        fit(state, workload.train, epochs=8, seed=0)
        with torch.no_grad():
            made = []
            for model in (state.model, state.context.teacher):
                with overheard(model) as calls, evaluating(model):
                    model(batch.inputs)
                made.append(calls[-1])
            found.append(attention_distance(*made).mean())
    assert found[0] < 0.8 * found[1]


def test_modules_of_torch_are_seen_and_not_disturbed():
    """The calls inside nn.TransformerEncoderLayer, in training and in evaluation, whose outputs keep their bits."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), torch.randn(2, 5, 8)
    for train in (True, False):
        wanted = layer.train(train)(x)
        with overheard(layer) as made:
            found = layer(x)
        assert found.equal(wanted) and [a.lengths for a in made] == [(5, 5)]
        functional.linear(made[0].log_weights(), torch.eye(5)).sum().backward()
        assert layer.self_attn.in_proj_weight.grad is not None


def test_padding_does_not_count():
    """BERT with a mask: what stands at padded positions changes no distance."""
    workload = ZOO["bert"]()
    student = noisy(workload.build(0))
    batch = workload.train.batch(torch.arange(4))
    batch.inputs["attention_mask"][:, 6:] = 0
    other = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
    other["input_ids"][:, 6:] = 1
    terms = [
        term_of(DistillAttention(layers="all"), state_of(workload, student), replace(batch, inputs=inputs))
        for inputs in (batch.inputs, other)
    ]
    torch.testing.assert_close(*terms)


def test_maps_are_blind_to_channels():
    """Σ_c a_c² is the same for rotated channels and more of them, its direction for any scale; disjoint maps are 2 apart."""
    maps = torch.randn(2, 6, 3, 3)
    turn = torch.linalg.qr(torch.randn(6, 6))[0]
    wide = torch.cat([torch.einsum("bchw,cd->bdhw", maps, turn), torch.zeros(2, 2, 3, 3)], 1)
    torch.testing.assert_close(map_distance(4 * wide, maps), torch.zeros(2), rtol=0, atol=1e-9)
    left, right = torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    left[..., 0], right[..., 2] = 1.0, 1.0
    torch.testing.assert_close(map_distance(left, right), torch.full((2,), 2.0))


def test_maps_of_a_pruned_network():
    """The last map of each size, with the layers' values taken by hand."""
    workload = tiny_cnn(trained=True)
    state = PruneChannels(ratio=0.5)(state_of(workload))
    batch = workload.train.batch(torch.arange(5))
    term = term_of(DistillAttention(layers="all", beta=2.0), state, batch)
    seen = []
    for model in (state.model.eval(), state.context.teacher):
        with tapped(model, ["conv1", "conv2"]) as maps:
            model(batch.inputs)
        seen.append(dict(maps))
    torch.testing.assert_close(term, sum(map_distance(seen[0][n], seen[1][n]) for n in ("conv1", "conv2")))
    last = term_of(DistillAttention(), state, batch)
    torch.testing.assert_close(last, map_distance(seen[0]["conv2"], seen[1]["conv2"]))


class StopAt(Hook):
    """Stops the run at a step, as a kill would; at no step for 0."""

    def __init__(self, step):
        self.left = step

    def after_step(self, model, progress):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def hooked(model):
    """How many forward hooks there are."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_resumed_runs_have_the_bits_of_straight_ones_and_nothing_stays(tmp_path):
    workload = tiny_transformer()
    marks = []
    for stop, folder in ((0, None), (8, tmp_path), (0, tmp_path)):
        state = DistillAttention()(state_of(workload, noisy(workload.build(0))))
        hooks = (*state.training.make_hooks, lambda model, stop=stop: StopAt(stop))
        state = replace(state, training=replace(state.training, make_hooks=hooks))
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            fit(state, workload.train, epochs=2, seed=0, checkpoint=folder, every=0.0)
        marks.append(fingerprint(state.model))
        assert hooked(state.model) == hooked(state.context.teacher) == len(_get_current_function_mode_stack()) == 0
    assert marks[0] == marks[2] != marks[1]


def test_a_forward_pass_that_fails_leaves_no_mode():
    model = TinyTransformer()
    with overheard(model) as made, pytest.raises(IndexError):
        model(torch.full((2, 12), 99))
    assert not _get_current_function_mode_stack() and hooked(model) == 0 and not made


class ByHand(nn.Module):
    """Attention as a product and a softmax, which no call shows."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head((x @ x.mT).softmax(-1) @ x)


def test_what_it_refuses():
    """Networks without attention or maps, maps of other sizes, a compiled pass, the wrong task; the reason says what lacks."""
    for build in (tiny_mlp, tiny_lstm):
        workload = build()
        with pytest.raises(NotApplicable, match="no call of scaled_dot_product_attention, and no feature map"):
            DistillAttention()(state_of(workload))
    tokens = torch.randint(20, (12, 5))
    hand = Workload(model=ByHand(), train=(tokens, tokens), val=(tokens, tokens), test=(tokens, tokens), metric="bits_per_byte")
    with pytest.raises(NotApplicable, match="no attention in ByHand"):
        DistillAttention()(state_of(hand))
    workload = tiny_cnn(trained=True)
    small = Shrink(kernel=3)(state_of(workload))
    before = fingerprint(small.model)
    with pytest.raises(NotApplicable, match=r"conv2 \[8, \d, \d\] and the teacher's conv2 \[8, 4, 4\]"):
        DistillAttention()(small)
    assert fingerprint(small.model) == before
    compiled = replace(state_of(workload), runtime=RuntimeSpec(compile=True))
    with pytest.raises(NotApplicable, match="compile"):
        DistillAttention()(compiled)
    with pytest.raises(NotApplicable, match="TEACHER"):
        DistillAttention()(Setup.of(workload))
    with pytest.raises(BadInput, match="beta"):
        DistillAttention(beta=0.0)


def test_the_present_network_teaches():
    """A copy from before pruning and training; no baseline is asked for."""
    workload = tiny_cnn(trained=True)
    state = Setup.of(workload)
    wide, batch = deepcopy(state.model).eval(), workload.train.batch(torch.arange(5))
    after = PruneChannels(ratio=0.5)(DistillAttention(teacher="present")(state))
    fit(after, workload.train, epochs=1, seed=0)
    model = after.model.eval()
    with after.training.make_hooks[-1](model).train(model, None):
        output = model(batch.inputs)
        term = after.training.loss(output, batch) - state.training.loss(output, batch)
    with tapped(model, ["conv2"]) as mine, tapped(wide, ["conv2"]) as theirs:
        model(batch.inputs), wide(batch.inputs)
    torch.testing.assert_close(term, map_distance(mine["conv2"], theirs["conv2"]), rtol=1e-3, atol=1e-6)
