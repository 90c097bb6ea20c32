"""Scores of classes in the second dimension, as PyTorch's own losses have it, and in the last: by name, everywhere."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga.core.batch import Batch
from quadriga.core.classes import class_dim
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import METRICS, accuracy, bits_per_byte, cross_entropy, laid_out
from quadriga.core.setup import Setup
from quadriga.core.workload import Workload
from quadriga.measure.quality import score
from quadriga.methods.structure.distill import Distill
from quadriga.methods.training.label_smoothing import LabelSmoothing
from quadriga.methods.training.mixup import Mixup
from quadriga.train.loop import fit
from quadriga.workloads import check

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)


def batch_of(target):
    return Batch(None, target, torch.arange(len(target)))


@pytest.mark.parametrize("positions", [(), (7,), (6, 4)])
def test_both_layouts_are_pytorchs_loss(positions):
    logits, target = torch.randn(9, 5, *positions, generator=G), torch.randint(5, (9, *positions), generator=G)
    plain = functional.cross_entropy(logits, target, reduction="none").reshape(9, -1)
    right = (logits.argmax(1) == target).double().reshape(9, -1)
    for given in (logits, logits.movedim(1, -1).contiguous()):
        torch.testing.assert_close(cross_entropy(given, batch_of(target)), plain.mean(1))
        values, weights = accuracy.examples(given, batch_of(target))
        torch.testing.assert_close(values, right.mean(1)), torch.testing.assert_close(weights, torch.ones(9).double())
        if positions:
            bits, count = bits_per_byte.examples(given, batch_of(target))
            torch.testing.assert_close(bits.float(), plain.mean(1) / torch.tensor(2.0).log())
            assert count.tolist() == [right.shape[1]] * 9


def test_ignored_positions_count_for_nothing():
    logits, target = torch.randn(3, 5, 4, generator=G), torch.randint(5, (3, 4), generator=G)
    target[0, 1:], target[1] = -100, -100
    values, weights = accuracy.examples(logits, batch_of(target))
    assert weights.tolist() == [1, 0, 1] and values[0] == (logits.argmax(1) == target)[0, 0]
    alone = torch.tensor([1, -100])
    assert accuracy.examples(torch.tensor([[0.0, 1], [0, 1]]), batch_of(alone))[1].tolist() == [1, 0]
    assert cross_entropy(logits, batch_of(target)).tolist()[1] == 0


@pytest.mark.parametrize("dim", [1, -1])
def test_soft_targets_of_positions(dim):
    logits = torch.randn(3, 5, 4, generator=G)
    target = torch.randn(3, 5, 4, generator=G).softmax(1)
    wanted = functional.cross_entropy(logits, target, reduction="none").mean(1)
    loss = laid_out(cross_entropy, dim)
    torch.testing.assert_close(loss(logits.movedim(1, dim), batch_of(target.movedim(1, dim))), wanted)
    with pytest.raises(BadInput, match="classes_dim"):
        cross_entropy(logits, batch_of(target))  # shapes cannot tell


@pytest.mark.parametrize(
    ("outputs", "targets", "remedy"),
    [
        ((9, 8, 8), (9, 8), r"Workload\(classes_dim=1\)"),
        ((9, 4, 4, 4), (9, 4, 4), r"classes_dim=-1"),
        ((9, 5), (9, 1), r"labels.squeeze\(1\)"),
        ((9, 5, 6, 4), (9, 1, 6, 4), r"labels.squeeze\(1\)"),
        ((9, 5, 1), (9,), r"outputs.squeeze\(2\)"),
        ((9, 5, 6), (9, 7), r"\[n, classes, 7\] or \[n, 7, classes\]"),
        ((9, 5), (9, 7), r"\[n, classes, 7\] or \[n, 7, classes\]"),
        ((9,), (9,), r"\[n, classes\]"),
    ],
)
def test_shapes_that_do_not_tell_or_do_not_fit(outputs, targets, remedy):
    with pytest.raises(BadInput, match=remedy):
        class_dim(outputs, targets)


def test_remedies_of_shapes_help():
    assert class_dim((9, 8, 8), (9, 8), 1) == 1 and class_dim((9, 8, 8), (9, 8), -1) == -1
    assert class_dim((9, 5), (9,)) == -1 and class_dim((9, 5, 6, 4), (9, 6, 4)) == 1 and class_dim((9, 5), (9,), 1) == -1
    assert class_dim((9, 5, 7), (9, 7)) == 1 and class_dim((9, 7, 5), (9, 7)) == -1
    with pytest.raises(BadInput, match="give classes_dim=1, or none"):
        class_dim((9, 5, 7), (9, 7), -1)


def tagger(classes, length, last=False):
    """Each position's class is told by its own input; outputs [n, classes, length], or the classes last."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Conv1d(classes, classes, 1)

        def forward(self, x):
            y = self.scores(x)
            return y.movedim(1, -1) if last else y

    x = torch.randn(600, classes, length, generator=torch.Generator().manual_seed(1))
    y = x.argmax(1)
    splits = {"train": (x[:200], y[:200]), "val": (x[200:400], y[200:400]), "test": (x[400:], y[400:])}

    def build():
        torch.manual_seed(0)
        return Tagger()

    return {"model": build, **splits, "batch_size": 20}


@pytest.mark.parametrize(("classes", "length", "said"), [(2, 35, None), (8, 8, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_a_tagger_learns_by_name(classes, length, said, last):
    """With [n, 8, 8] it came to 22.5 points instead of 97.9, without a word."""
    given = tagger(classes, length, last)
    if said is not None:
        with pytest.raises(BadInput, match=r"second dimension or in the last.*classes_dim"):
            check(Workload(**given))
        said = -1 if last else 1
    workload = Workload(**given, classes_dim=said)
    assert check(workload) == []
    setup = Setup.of(workload)
    fit(setup, workload.train, epochs=20, seed=0)
    with torch.no_grad():
        scores = setup.model(workload.test.inputs)
    right = (scores.argmax(-1 if last else 1) == workload.test.target).float().mean()
    assert score(setup.model, workload.test, workload.metric).value == pytest.approx(100 * float(right))
    assert right > 0.9


def test_segmentation_by_name():
    x = torch.randn(150, 3, 10, 12, generator=G)
    y = x.argmax(1)
    workload = Workload(
        model=nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)),
        train=(x[:50], y[:50]),
        val=(x[50:100], y[50:100]),
        test=(x[100:], y[100:]),
    )
    assert all("fewer than" in note or "val has only" in note for note in check(workload))
    setup = Setup.of(workload)
    assert setup.context.classes_dim == 1 and "LOGITS" in setup.traits and "CLASSES" not in setup.traits
    for method in (LabelSmoothing(), Mixup()):
        with pytest.raises(NotApplicable):
            method(setup)


@pytest.mark.parametrize("dim", [1, -1])
def test_distillation_is_over_classes(dim):
    """With equal sizes a softmax over positions would not be noticed by its shape."""
    given = tagger(6, 6, dim == -1)
    workload = Workload(**given, classes_dim=dim, trained=True)
    setup = Setup.of(workload, teacher=workload.build(3).eval())
    with torch.no_grad():
        for p in setup.model.parameters():
            p.add_(0.3)
    batch = workload.train.batch(torch.arange(10))
    after = Distill(alpha=1.0, temperature=2.0)(setup)
    student, teacher = (m(batch.inputs).movedim(dim, -1) / 2 for m in (after.model, setup.context.teacher))
    wanted = 4 * functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(after.training.loss(after.model(batch.inputs), batch), wanted.mean(1))


def test_classes_dim_is_checked_and_reaches_loss_and_metric():
    with pytest.raises(BadInput, match="classes_dim is 2"):
        Workload(**tagger(3, 5), classes_dim=2)
    workload = Workload(**tagger(3, 5), classes_dim=1)
    assert workload.loss.classes_dim == 1 and workload.metric.examples.classes_dim == 1
    assert METRICS["accuracy"].examples.classes_dim is None
    own = replace(METRICS["mean_squared_error"], name="own")
    assert laid_out(own, 1) == own
