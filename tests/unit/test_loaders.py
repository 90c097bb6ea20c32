"""What a DataLoader carries is kept, named as what is not, or refused with a way out."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from quadriga import Workload
from quadriga.core.data import as_data
from quadriga.core.errors import BadInput
from quadriga.train.feed import Feed
from quadriga.workloads import check

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(300, 4, generator=G), torch.arange(300) % 3
WHOLE = TensorDataset(X, Y)
CPU = torch.device("cpu")


class Every(Sampler):
    """A user's sampler: every second example, in an order of its own."""

    def __init__(self, count=300, step=2):
        self.count, self.step = count, step

    def __iter__(self):
        return iter((torch.randperm(self.count // self.step) * self.step).tolist())

    def __len__(self):
        return self.count // self.step


class Given(Sampler):
    """What a function gives."""

    def __init__(self, give):
        self.give = give

    def __iter__(self):
        return iter(self.give())

    def __len__(self):
        return 5


def rows_of(data):
    """Numbers of the examples that a split holds, by their content."""
    found = torch.cat([batch.inputs for batch in data.batches(64)])
    return [int((X == x).all(1).nonzero()[0, 0]) for x in found]


def loader(sampler=None, **options):
    return DataLoader(WHOLE, sampler=sampler, **options) if sampler is not None else DataLoader(WHOLE, **options)


SETS = {  # name → loader, its examples
    "none": (lambda: loader(), range(300)),
    "shuffled": (lambda: loader(shuffle=True, generator=torch.Generator()), range(300)),
    "subset": (lambda: loader(SubsetRandomSampler(range(40, 90))), range(40, 90)),
    "subset of tensor": (lambda: loader(SubsetRandomSampler(torch.tensor([7, 3]))), (3, 7)),
    "a few in order": (lambda: loader(SequentialSampler(range(30))), range(30)),
    "a few shuffled": (lambda: loader(RandomSampler(range(30))), range(30)),
    "own": (lambda: loader(Every()), range(0, 300, 2)),
    "own batches": (lambda: DataLoader(WHOLE, batch_sampler=BatchSampler(SubsetRandomSampler([5, 1, 9]), 2, False)), (1, 5, 9)),
    "own batch sampler": (lambda: DataLoader(WHOLE, batch_sampler=Given(lambda: [[4, 2], [8]])), (4, 2, 8)),
    "alone of one": (lambda: loader(DistributedSampler(WHOLE, 1, 0)), range(300)),
    "counted from the end": (lambda: loader(Given(lambda: [-1, 0])), (299, 0)),
    "over a subset": (lambda: DataLoader(Subset(WHOLE, range(100, 200)), sampler=SubsetRandomSampler([0, 5])), (100, 105)),
}


@pytest.mark.parametrize("kind", SETS)
def test_the_examples_of_a_loader_are_those_of_its_sampler(kind):
    make, expected = SETS[kind]
    state = torch.get_rng_state()
    assert rows_of(as_data(make(), "train")) == list(expected)
    assert torch.equal(state, torch.get_rng_state())


def test_a_samplers_own_generator_goes_on_as_if_it_had_not_been_asked():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert rows_of(as_data(loader(RandomSampler(range(30), generator=generator)))) == list(range(30))
    assert torch.equal(before, generator.get_state())


weights = torch.linspace(0, 1, 300)
REFUSED = {  # name → loader, what is said, the way out
    "weighted": (
        lambda: loader(WeightedRandomSampler(weights, 300)),
        "drawn by a WeightedRandomSampler",
        lambda: Subset(WHOLE, torch.multinomial(weights, 300, replacement=True).tolist()),
    ),
    "share": (lambda: loader(DistributedSampler(WHOLE, 2, 0)), "the share of one of 2 processes", lambda: loader()),
    "repeats": (
        lambda: loader(Given(lambda: [0, 1, 1])), "the Given of train gives example 1 more than once",
        lambda: Subset(WHOLE, [0, 1, 1]),
    ),
    "other ones": (
        lambda: loader(Given(lambda: torch.randperm(300)[:5].tolist())), "gives other examples each time",
        lambda: Subset(WHOLE, range(5)),
    ),
    "endless": (lambda: loader(Given(lambda: iter(lambda: 0, 1))), "more than once", lambda: loader()),
    "outside": (lambda: loader(Given(lambda: [300])), "gives 300, and the data set has 300 examples", lambda: loader()),
    "names": (lambda: loader(Given(lambda: ["a"])), "gives 'a', which is no number", lambda: loader()),
    "nothing": (lambda: loader(Given(list)), "gives no example", lambda: loader()),
    "whole batches": (lambda: loader(batch_size=None), "batch_size=None", lambda: loader(batch_size=8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_refused_and_the_way_out_works(kind):
    make, told, way_out = REFUSED[kind]
    with pytest.raises(BadInput) as caught:
        as_data(make(), "train")
    assert told in caught.value.problem and caught.value.remedy, str(caught.value)
    assert len(as_data(way_out(), "train")) > 0


def test_an_iterable_data_set_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(BadInput, match="val is an iterable data set without a length"):
        as_data(DataLoader(Stream()), "val")


NOTES = {
    "train: its sampler draws 100 of 300 examples an epoch with replacement": loader(
        RandomSampler(WHOLE, replacement=True, num_samples=100)
    ),
    "train: its sampler draws 20 of 300 examples an epoch; here an epoch is all": loader(RandomSampler(WHOLE, num_samples=20)),
    "train: the order of Every is not kept": loader(Every()),
    "train: its loader has batches of 7; training has the workload's batch_size, 64": loader(batch_size=7),
}


@pytest.mark.parametrize("told", NOTES)
def test_what_is_not_kept_is_said(told):
    def more(k):
        return X + 9 * k, Y

    notes = check(Workload(model=nn.Linear(4, 3), train=NOTES[told], val=more(1), test=more(2)))
    assert any(told in note for note in notes), notes


def test_of_val_too():
    val = DataLoader(TensorDataset(X + 9, Y), 64, drop_last=True, num_workers=1, worker_init_fn=print)
    notes = check(Workload(model=nn.Linear(4, 3), train=(X, Y), val=val, test=(X + 20, Y)))
    assert [n for n in notes if "val:" in n] == [
        "val: drop_last is not kept, all examples are scored",
        "val: worker_init_fn is not called, since scoring reads in its own process",
    ]


class Numbered(Dataset):
    """Examples that say which worker read them, and what its init function left there."""

    left = -1.0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        info = get_worker_info()
        known = (-1.0, -1.0, 0.0) if info is None else (info.id, info.num_workers, float(info.dataset is self))
        return torch.tensor([float(i), *known, self.left]), 0


def begin(number):
    get_worker_info().dataset.left = 10.0 + number
    np.random.seed(torch.initial_seed() % 2**32)


def test_workers_know_their_number_and_are_begun_as_the_loader_says():
    given = DataLoader(Numbered(), 4, num_workers=1, worker_init_fn=begin, timeout=50, multiprocessing_context="fork")
    data = as_data(given, "train")
    assert (data.workers, data.timeout, data.begin, data.method, data.batch_size) == (1, 50, begin, "fork", 4)
    feed = Feed(data, 0, lambda position: torch.empty(0, dtype=torch.int64), CPU)
    read = feed.batch(torch.tensor([2, 5]), 0).inputs
    methods = feed.methods
    feed.close()
    assert methods == ["fork"] and read.tolist() == [[2.0, 0.0, 1.0, 1.0, 10.0], [5.0, 0.0, 1.0, 1.0, 10.0]]
    assert data.batch(torch.tensor([2])).inputs.tolist() == [[2.0, -1.0, -1.0, 0.0, -1.0]], "here nothing was begun"
