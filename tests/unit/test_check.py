"""`check` refuses what cannot work, says why, and changes nothing."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from quadriga import Workload
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.engine.timing import timed
from quadriga.measure.quality import score
from quadriga.train.loop import fit
from quadriga.workloads import check

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X = torch.randn(900, 4, generator=G)
Y = torch.arange(900) % 3
PARTS = {"train": slice(0, 300), "val": slice(300, 600), "test": slice(600, 900)}


def parts(x=X, y=Y):
    return {name: (x[rows], y[rows]) for name, rows in PARTS.items()}


def made(**changes):
    """A sound workload: three classes of 4-d points; `changes` break it."""
    return Workload(**{"model": lambda: nn.Linear(4, 3), **parts(), **changes})


def expect_refused(*words, **changes):
    with pytest.raises(BadInput) as caught:
        check(made(**changes))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.remedy


def test_a_sound_workload_has_no_notes():
    assert check(made()) == []


def test_a_trained_model_without_training_data_is_sound():
    assert check(made(train=None, trained=True, model=nn.Linear(4, 3).requires_grad_(False))) == []


def test_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data, state = X.clone(), torch.get_rng_state()
    check(made(model=model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].training and not model[1].training and all(p.grad is None for p in model.parameters())
    assert torch.equal(data, X) and torch.equal(state, torch.get_rng_state())


# data


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")])
@pytest.mark.parametrize("split", list(PARTS))
def test_nan_in_the_inputs(split, value, kind):
    x = X[PARTS[split]].clone()
    x[[17, 40]] = value
    expect_refused(f"the inputs of {split}", kind, "2 of 300 examples", "number 17", **{split: (x, Y[:300])})


def test_large_finite_inputs_are_no_nan():
    """Their sum overflows."""
    x = torch.full((300, 4), 3e38) * torch.linspace(0.5, 1, 300)[:, None]
    assert check(made(val=(x, Y[:300]), model=lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 3)))) == []


def test_nan_in_float_targets():
    y = torch.randn(300, 1)
    y[5] = float("nan")
    expect_refused("the targets of train", "number 5", **regression(train=(X[:300], y)))


def test_nan_behind_a_loader():
    x = X[300:500].clone()
    x[123] = float("nan")
    expect_refused("the inputs of val", "number 123", val=DataLoader(TensorDataset(x, Y[300:500]), 8))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (Y.int(), ("labels of train are int32", "cross_entropy needs int64", "labels.long()")),
        (Y.float(), ("labels of train are float32", "int64")),
        (Y.bool(), ("labels of train are bool", "int64")),
        (Y[:, None], ("train: the labels have the shape [n, 1]", "the outputs [n, 3]", "labels.squeeze(1)")),
        (Y + 1, ("100 labels of train are outside 0..2", "first 3 at example 2", "3 outputs")),
        (Y - 1, ("100 labels of train are outside 0..2", "first -1 at example 0")),
    ],
)
def test_labels(labels, words):
    expect_refused(*words, **parts(y=labels))


def test_labels_of_a_later_split():
    expect_refused("labels of test are outside", test=(X[600:], Y[600:] * 2))


def test_soft_labels_need_a_metric_that_reads_them():
    soft = nn.functional.one_hot(Y, 3).float()
    assert check(made(train=(X[:300], soft[:300]))) == []
    expect_refused("the labels of val are float32", **parts(y=soft))


def test_equal_labels_are_noted():
    assert "all labels of val are 1" in check(made(val=(X[300:600], torch.ones(300, dtype=torch.int64))))


def test_unlearned_classes_are_noted():
    assert "val has classes that train lacks: 2" in check(made(train=(X[:300], Y[:300] % 2)))


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(PARTS, 2)))
def test_one_data_set_as_two_splits(one, two):
    given = parts()
    expect_refused(f"{one} and {two}", "same", **{two: given[one]})
    expect_refused(f"{one} and {two}", "same", **{two: (given[one][0].clone(), given[one][1])})
    expect_refused(f"{one} and {two}", "same", **{two: (given[one][0].flip(0), given[one][1].flip(0))})


def test_overlap_is_counted():
    expect_refused("30 of 300 examples (10.0%) are in both val and test", "at most 1 %", test=(X[570:870], Y[570:870]))
    assert check(made(test=(X[597:897], Y[597:897]))) == ["3 of 300 examples (1.0%) are in both val and test"]


def test_subsets_of_one_data_set():
    whole = TensorDataset(X, Y)
    train, val, test = random_split(whole, [300, 300, 300], generator=torch.Generator().manual_seed(0))
    assert check(made(train=train, val=DataLoader(val, 32), test=test)) == []
    test.indices = [*test.indices[:250], *val.indices[:50]]
    expect_refused("50 of 300", "val and test", train=train, val=val, test=test)
    expect_refused("train and val", "same", train=whole, val=DataLoader(whole, 8), test=test)


def test_too_few_to_compare():
    expect_refused("val has 12 examples", "at least 20", val=(X[300:312], Y[300:312]))
    assert any("only 60 examples" in note for note in check(made(val=(X[300:360], Y[300:360]))))


class Odd(Dataset):
    """A data set whose items are what it is given."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.item() if callable(self.item) else self.item


def broken():
    raise KeyError("image 7")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (3.0, ("val", "a batch is a Tensor")),
        ({"x": 1, "y": 2}, ("val", "['x', 'y']", "labels")),
        (("text", 1), ("val", "without a tensor")),
        (broken, ("val cannot be read", "test_check.py:", "KeyError: 'image 7'")),
    ],
)
def test_a_loader_of_another_form(item, words):
    expect_refused(*words, val=DataLoader(Odd(item), 8))


def test_a_collate_that_drops_rows():
    def collate(items):
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])[1:]

    expect_refused(
        "targets of shape", "one row per example", val=DataLoader(TensorDataset(X[300:600], Y[300:600]), 8, collate_fn=collate)
    )


# model


class Model(nn.Module):
    """A linear layer, and what `then` makes of its output."""

    def __init__(self, then=lambda y: y, inputs=4):
        super().__init__()
        self.fc = nn.Linear(inputs, 3)
        self.then = then

    def forward(self, x):
        return self.then(self.fc(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model(inputs=5), ("fails on inputs [2, 4]", "test_check.py:", "mat1 and mat2 shapes cannot be multiplied")),
        (Model(lambda y: "logits"), ("returned str", "no tensor")),
        (Model(lambda y: y.squeeze().mean(0)), ("returned [3] for 2 examples", "one row per example")),
        (Model(lambda y: y / 0 * 0), ("output has 6 of 6 values NaN",)),
        (Model().requires_grad_(False), ("nothing to train: 2 parameters", "requires_grad")),
        (nn.Flatten(), ("nothing to train: 0 parameters",)),
        (Model(lambda y: y.detach()), ("loss does not depend on the parameters", "detach")),
        (Model(lambda y: y.view(2, 3)), ("fails on inputs [1, 4]", "shape '[2, 3]' is invalid")),
        (lambda: nn.Linear("4", 3), ("the model cannot be built", "test_check.py:")),
        (lambda: None, ("returned NoneType", "nn.Module")),
    ],
)
def test_models(model, words):
    expect_refused(*words, model=model)


def test_keyword_inputs_that_forward_does_not_take():
    data = {name: ({"pixels": x}, y) for name, (x, y) in parts().items()}
    expect_refused("cannot be called with inputs", "unexpected keyword argument 'pixels'", **data)


# loss


def regression(**changes):
    data = {n: (x, x.sum(1, keepdim=True)) for n, (x, _) in parts().items()}
    return {"model": lambda: nn.Linear(4, 1), "loss": "squared_error", "metric": "mean_squared_error", **data, **changes}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda o, t: "low", ("returned 'low', a str", "return a tensor")),
        (lambda o, t: float("nan"), ("a float", "return a tensor")),
        (lambda o, t: nn.functional.cross_entropy(o, t) * float("nan"), ("loss of the first batch of train is nan",)),
        (lambda o, t: o, ("loss has the shape [64, 3] for 64 examples",)),
        (lambda o, t: o[:5].mean(1), ("loss has the shape [5]",)),
        (lambda o, t: o.missing, ("loss fails on the first batch", "test_check.py:", "AttributeError")),
        (lambda o, t: nn.functional.mse_loss(o, t), ("the loss broadcasts", "[64, 3]")),
    ],
)
def test_losses(loss, words):
    expect_refused(*words, loss=loss)


def test_targets_that_broadcast():
    flat = {n: (x, x.sum(1)) for n, (x, _) in parts().items()}
    expect_refused("outputs (64, 1) and targets (64,) differ", **regression(**flat))
    same = Metric("error", examples=lambda o, b: ((o.squeeze() - b.target).abs(), torch.ones(len(b))))
    expect_refused(
        "the loss broadcasts", "[64]", **regression(**flat, loss=lambda o, t: nn.functional.mse_loss(o, t), metric=same)
    )
    expect_refused("are broadcast in the loss", **regression(**flat, loss=lambda o, t: ((o - t) ** 2).mean(), metric=same))
    expect_refused("are broadcast in the loss", **regression(**flat, loss=lambda o, t: ((o - t) ** 2).mean(1), metric=same))
    for sound in (lambda o, t: ((o.squeeze(1) - t) ** 2).mean(), lambda o, t: ((o.squeeze(1) - t) ** 2).sum()):
        assert check(made(**regression(**flat, loss=sound, metric=same))) == []
    assert check(made(**regression())) == []


# metric


def hits(o, t):
    return (o.argmax(1) == t).float()


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda o, t: "good", ("returned 'good', a str",)),
        (lambda o, t: None, ("returned None",)),
        (lambda o, t: float("nan"), ("returned nan",)),
        (lambda o, t: hits(o, t) / 0, ("returned",)),
        (lambda o, t: hits(o, t)[:3], ("returned the shape [3] for 128 examples", "[n] values or one number")),
        (lambda o, t: o, ("returned the shape [128, 3]",)),
        (lambda o, t: o.missing, ("fails", "test_check.py:", "AttributeError")),
        (lambda o, t: hits(o, t).mean() + torch.rand(()), ("different values for equal outputs",)),
        (Metric("m", examples=lambda o, b: hits(o, b.target)), ("metric m fails",)),
        (Metric("m", examples=lambda o, b: (hits(o, b.target), torch.ones(3))), ("128 values and 3 weights",)),
    ],
)
def test_metrics(metric, words):
    expect_refused(*words, metric=metric)


@pytest.mark.parametrize(
    "metric", [hits, lambda o, t: hits(o, t).mean(), lambda o, t: hits(o, t).mean().item(), lambda o, t: 1]
)
def test_sound_metrics(metric):
    assert check(made(metric=metric)) == []


class Caching(nn.Module):
    """Keeps a table from its first forward pass, as rotary embeddings and relative positions do."""

    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(4, 3), None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, x.shape[-1])
        return self.fc(x * self.table)


def test_what_a_model_keeps_from_a_first_look_at_it_can_be_learned_from(tmp_path):
    workload = made(model=Caching(), trained=True)
    setup = Setup.of(workload)
    assert isinstance(check(workload), list)
    assert score(setup.model, workload.val, workload.metric).value >= 0
    assert timed([(setup.model, X[:2])], RuntimeSpec(), setup.context, tmp_path)[0] > 0
    assert fit(setup, workload.train, epochs=1, seed=0).samples > 0


@pytest.mark.parametrize("out", [(4,), (4, 1)])
def test_the_way_out_of_broadcasting_works(out):
    """Outputs [n, 1] against targets [n], and the other way round."""

    def model():
        return nn.Sequential(nn.Linear(4, 1), *([] if len(out) == 2 else [nn.Flatten(0)]))

    task = {"model": model, "loss": lambda o, t: (o - t).square().mean(), "metric": lambda o, t: -(o - t).square().flatten()}
    wrong = {n: (x, x.sum(1) if len(out) == 2 else x.sum(1, keepdim=True)) for n, (x, _) in parts().items()}
    shape = (-1, *out[1:])
    expect_refused("broadcast", f"target.reshape({', '.join(map(str, shape))})", **task, **wrong)
    assert check(made(**task, **{n: (x, y.reshape(shape)) for n, (x, y) in wrong.items()})) == []
