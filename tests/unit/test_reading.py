"""One way to read: whatever reads a split sees what its `batch` gives, in memory of its own."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import quadriga
from quadriga import Workload
from quadriga.core.batch import Batch, tensors
from quadriga.core.data import Data, DatasetData, Part, TensorData, as_data
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.recipe import Recipe
from quadriga.core.setup import Setup
from quadriga.engine.tasks import Desk
from quadriga.measure import guess
from quadriga.measure.quality import score
from quadriga.parallel.share import Share
from quadriga.train.data import Loader, Sampler
from quadriga.train.feed import Feed, home_of, resident
from quadriga.workloads.fashion import Enlarged
from quadriga.workloads.splits import sample

torch.set_num_threads(1)
CPU, N = torch.device("cpu"), 48
X = torch.arange(N * 4.0).view(N, 1, 2, 2)
Y = torch.arange(N) % 3


class Doubled(TensorData):
    """A user's split that overrides `batch` alone."""

    def batch(self, index):
        got = super().batch(index)
        return replace(got, inputs=2 * got.inputs + 1)


class Windows(TensorData):
    """A user's split whose examples are not the rows of its tensors, and are handed out as views."""

    def __init__(self):
        super().__init__(torch.arange(100.0))

    def __len__(self):
        return N

    def batch(self, index):
        rows = self.inputs.unfold(0, 4, 2)[:N]
        first, last = int(index[0]), int(index[-1]) + 1
        return Batch(rows[first:last] if last - first == len(index) else rows[index], Y[index], index)


class Own(Data):
    """A user's split that hands out what it keeps."""

    def __init__(self):
        self.kept = {"a": X.clone(), "b": X.clone()}

    def __len__(self):
        return N

    def batch(self, index):
        whole = slice(int(index[0]), int(index[0]) + len(index))
        if torch.equal(index, torch.arange(N)[whole]):
            return Batch({k: v[whole] for k, v in self.kept.items()}, Y[whole], index)
        return Batch({k: v[index] for k, v in self.kept.items()}, Y[index], index)


class Pictures(Dataset):
    """A map-style data set with a transform, which keeps arrays and hands them out."""

    def __init__(self, transform=lambda x: x):
        self.x, self.y, self.transform = X.numpy().copy(), Y.tolist(), transform

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.transform(self.x[i]), self.y[i]


class Kept(Dataset):
    """A data set that gives the same tensor objects again and again."""

    def __init__(self):
        self.x = [x.clone() for x in X]

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.x[i], Y[i]


def add_three(x):
    return x + 3


def own_collate(items):
    return torch.stack([torch.as_tensor(x) for x, _ in items]) / 2, torch.tensor([int(y) for _, y in items])


def lending(items):
    """A collate that copies nothing where it is given one example."""
    if len(items) == 1:
        return items[0][0].unsqueeze(0), items[0][1].unsqueeze(0)
    return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


MADE = {  # every class of the package, and what users write
    TensorData: lambda: TensorData(X.clone(), Y.clone()),
    Enlarged: lambda: Enlarged(X.clone(), Y.clone(), 4),
    DatasetData: lambda: DatasetData(Pictures(), workers=1),
    Part: lambda: Part(Enlarged(torch.cat([X, X]), torch.cat([Y, Y]), 4), torch.arange(N) * 2),
    guess._Once: None,  # one batch that was read before
    "tensors in a dict": lambda: TensorData({"a": X.clone(), "b": (X + 1).clone()}, Y.clone()),
    "batch alone": lambda: Doubled(X.clone(), Y.clone()),
    "windows": Windows,
    "own class": Own,
    "transform": lambda: as_data(Pictures(add_three)),
    "loader": lambda: as_data(DataLoader(Pictures(add_three), 8, collate_fn=own_collate, num_workers=1)),
    "no copies": lambda: as_data(DataLoader(Kept(), 8, collate_fn=lending)),
}
KINDS = [kind for kind, make in MADE.items() if make]


def walked(cls):
    return {cls, *(inner for each in cls.__subclasses__() for inner in walked(each))}


def test_no_class_of_the_package_is_forgotten():
    """Every file in which a class may inherit from one of them is imported, so that all are known."""
    root = Path(quadriga.__file__).parent
    for file in root.rglob("*.py"):
        if re.search(r"^ *class \w+\(.*(Data|Part|Enlarged|_Once)\b", file.read_text(), re.MULTILINE):
            importlib.import_module(".".join(["quadriga", *file.relative_to(root).with_suffix("").parts]))
    ours = {cls for cls in walked(Data) if cls.__module__.startswith("quadriga.")} - {Data}
    assert ours == {kind for kind in MADE if isinstance(kind, type)}, "add the new one to MADE"


def flat(batch):
    return [t.clone() for t in tensors(batch.inputs) + tensors(batch.target)]


def same(batch, other):
    one, two = flat(batch), flat(other)
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def joined(batches):
    return [torch.cat(parts) for parts in zip(*map(flat, batches), strict=True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_paths_see_the_same_values(kind, tmp_path):
    """In order, one by one, as a part, as a sample, in training with and without workers, in scoring, calibration, probes."""
    data, every = MADE[kind](), torch.arange(N)
    truth = [torch.cat(rows) for rows in zip(*(flat(data.batch(every[i : i + 1])) for i in range(N)), strict=True)]

    def holds(found, index=every):
        assert len(found) == len(truth) and all(torch.equal(a, t[index]) for a, t in zip(found, truth, strict=True)), kind

    for size in (1, 7, N):
        holds(joined(data.batches(size)))
    index = torch.tensor([5, 40, 5, 0])
    holds(flat(data.batch(index)), index)
    holds(joined(data.part(index).batches(3)), index)
    found = sample("val", data)
    holds(flat(found), found.index)
    seen = []
    score(
        lambda x: torch.zeros(len(tensors(x)[0]), 3), _spied(data, seen), Metric("m", "", True, whole=lambda o, t: o[:, 0]), 7
    )
    holds(joined(seen))
    for workers in (0, 1):
        holds(*_trained_on(data, workers))
    _study_sees(data, holds, tmp_path)


def _spied(data, seen):
    class Spied(Data, fresh=True):
        """The split, and what was read of it."""

        def __len__(self):
            return len(data)

        def batch(self, index):
            seen.append(data.batch(index))
            return seen[-1]

    return Spied()


def _trained_on(data, workers):
    """What the loop reads in one epoch, and its order."""
    here, order = resident(data, CPU), Sampler(N, 16, seed=3, device=home_of(data))
    upcoming = lambda position: order.indices(position) if position < N else torch.empty(0, dtype=torch.int64)  # noqa: E731
    feed = None if here.resident else Feed(here, 3, upcoming, CPU, Share())
    if feed is not None:
        feed.workers, feed.methods = workers, ["fork"]
    loader = Loader(here, order, (), lambda b: b.to(CPU), lambda b: b, feed=feed)
    drawn = [loader.draw(position, step, 16, 0.0)[0] for step, position in enumerate(range(0, N, 16))]
    loader.close()
    return joined(drawn), torch.cat([batch.index for batch in drawn])


class Any3(nn.Module):
    """Three scores of whatever it is given."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, *given, **named):
        first = (*given, *named.values())[0]
        return first.flatten(1).mean(1, keepdim=True) * self.w / 100


def _study_sees(data, holds, tmp_path):
    workload = Workload(model=Any3(), train=data, val=data, test=data, trained=True, baseline=Recipe())
    inputs = [t[:16] for t in tensors(workload.inputs(16))]
    assert all(torch.equal(a, b) for a, b in zip(inputs, tensors(data.batch(torch.arange(16)).inputs), strict=True))
    assert all(torch.equal(a, b[:2]) for a, b in zip(tensors(workload.example), inputs, strict=True))
    setup = Setup.of(workload, 0)
    holds(joined(setup.context.calibration))
    assert all(torch.equal(a, b[:2]) for a, b in zip(tensors(setup.context.example), inputs, strict=True))
    probes = []
    desk = Desk(workload, tmp_path, 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("quadriga.artifact.write", lambda *a, probes_inputs, **k: probes.append(probes_inputs) or tmp_path)
        patched.setattr("quadriga.artifact.bytes_of", lambda folder: 0)
        told = desk.do("artifact", {"recipe": [], "hash": "x", "batches": [1], "evidence": {}})
    assert told["status"] == "complete", told
    assert all(torch.equal(a, b) for a, b in zip(tensors(probes[0]), tensors(data.batch(torch.arange(N)).inputs), strict=True))


# memory


class InPlace(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, *given, **named):
        for x in (*given, *named.values()):
            x.sub_(1.0).div_(2.0)
        return (
            given[0].flatten(1).mean(1, keepdim=True) * self.w
            if given
            else next(iter(named.values())).flatten(1)[:, :3] * self.w
        )


def spoil(output, batch):
    """A loss that writes into everything."""
    loss = output.square().mean(1)
    for t in tensors(batch.inputs) + tensors(batch.target):
        t.zero_()
    return loss


def spoiling(output, target):
    target.add_(7)
    return output.detach().mean(1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_that_is_written_reaches_the_split(kind):
    data, every = MADE[kind](), torch.arange(N)
    before = flat(data.batch(every))
    stored = _stored(data)
    writers = [lambda: data.part(every), *(lambda index=i: data.batch(index) for i in (every, every[3:9], every[4:5]))]
    for write in writers:
        found = write()
        for t in tensors(found.inputs) + tensors(found.target) if isinstance(found, Batch) else flat_of(found):
            t.add_(1)
    metric = Metric("spoiling", "", True, whole=spoiling)
    for size in (1, 5, N):
        score(InPlace(), data, metric, size)
    workload = Workload(model=InPlace(), train=data, val=data, test=data, loss=spoil, metric=metric, trained=True)
    example = flat(Batch(workload.example, None, every))
    setup = Setup.of(workload, 0)
    calibration = joined(setup.context.calibration)
    for _ in range(2):
        for batch in (*setup.context.calibration, setup.context.calibration[0], *setup.context.calibration[:1]):
            workload.loss(InPlace()(*_args(batch.inputs)), batch).sum().backward()
        InPlace()(*_args(setup.context.example)), InPlace()(*_args(workload.example)), InPlace()(*_args(workload.inputs(4)))
    assert all(torch.equal(a, b) for a, b in zip(before, flat(data.batch(every)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stored, _stored(data), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(example, tensors(workload.example), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(example, tensors(setup.context.example), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(calibration, joined(setup.context.calibration), strict=True))


def _args(inputs):
    return tuple(inputs.values()) if isinstance(inputs, dict) else (inputs,)


def flat_of(data):
    """The tensors that a split keeps, where it is made of tensors."""
    return tensors((data.inputs, data.target)) if isinstance(data, TensorData) else []


def _stored(data):
    kept = getattr(data, "dataset", data)
    held = [v for v in vars(kept).values() if isinstance(v, torch.Tensor | np.ndarray | dict | list)]
    return [torch.as_tensor(t).clone() for t in tensors([torch.as_tensor(h) if isinstance(h, np.ndarray) else h for h in held])]


def test_scores_of_a_model_that_writes_are_those_of_one_that_does_not():
    """The issue's case: after three scores all of val had changed, and quality fell."""

    class Pure(InPlace):
        def forward(self, x):
            return ((x - 1.0) / 2.0).flatten(1).mean(1, keepdim=True) * self.w

    data, metric = TensorData(torch.randn(N, 1, 2, 2), Y), Metric("m", "", True, whole=lambda o, t: o[:, 0])
    found = [score(model, data, metric, 5).value for model in (Pure(), InPlace(), InPlace(), InPlace())]
    assert len(set(found)) == 1


def test_a_metric_that_writes_sees_each_example_as_it_is():
    seen = []

    def metric(output, target):
        seen.append(target.clone())
        return spoiling(output, target)

    score(lambda x: x.flatten(1), TensorData(X, Y), Metric("m", "", True, whole=metric), 16)
    assert [t.tolist() for t in seen] == [Y[:16].tolist(), *(Y[i : i + 16].tolist() for i in (0, 16, 32))]


def test_a_class_cannot_have_another_order_for_scoring_alone():
    with pytest.raises(BadInput, match=r"Odd has batches\(\) of its own.*override batch\(\)"):

        class Odd(TensorData):
            def batches(self, size):
                yield self.batch(torch.arange(size))


def test_random_reading_is_the_same_in_every_process_where_it_is_kept():
    """Calibration and scoring of a split that is changed at random depend on no generator of the caller's."""

    class Noisy(TensorData):
        def batch(self, index):
            got = super().batch(index)
            return replace(got, inputs=got.inputs + torch.randn_like(got.inputs) + float(np.random.rand()))

    data, found = Noisy(X.clone(), Y.clone()), []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed)
        state = torch.get_rng_state()
        found.append(joined(data.batches(16)))
        assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(data.batch(torch.arange(4)).inputs, data.batch(torch.arange(4)).inputs), "training sees new ones"


def test_a_part_reads_as_its_split_does():
    part = Doubled(X.clone(), Y.clone()).part(torch.tensor([4, 2]))
    assert same(part.batch(torch.tensor([1, 0])), Batch(2 * X[[2, 4]] + 1, Y[[2, 4]], torch.tensor([1, 0])))
    assert part.batch(torch.tensor([1, 0])).index.tolist() == [1, 0] and part.resident
    assert type(TensorData(X, Y).part(torch.tensor([0]))) is TensorData
