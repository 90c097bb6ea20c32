"""distill: its limits are theorems."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.methods.structure.distill import Distill, soft_divergence

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


def test_it_needs_a_teacher_and_classes():
    with pytest.raises(NotApplicable, match="TEACHER"):
        Distill()(setup(None))
    state = setup(teacher())
    with pytest.raises(NotApplicable, match="CLASSES"):
        Distill()(replace(state, traits=state.traits - {"CLASSES"}))
    for fields in ({"temperature": 0.0}, {"alpha": 1.5}):
        with pytest.raises(BadInput, match=next(iter(fields))):
            Distill(**fields)
