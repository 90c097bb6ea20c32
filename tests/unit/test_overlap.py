"""Examples that two splits share are found over all rows, whatever is done to them when they are read."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset, random_split

from quadriga.core.data import DatasetData, TensorData, as_data
from quadriga.core.errors import BadInput
from quadriga.workloads import overlap
from quadriga.workloads.overlap import apart

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
N = 900
X, Y = torch.randn(N, 3, generator=G), torch.arange(N) % 3
PARTS = {"train": range(300), "val": range(300, 600), "test": range(600, 900)}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is, all is read."""
    monkeypatch.setattr(overlap, "READING", 60.0)


class Pictures(Dataset):
    """As torchvision's: `data`, `targets`, `transform`."""

    def __init__(self, transform=None, x=X, y=Y):
        self.data, self.targets, self.transform = (x * 40).byte().numpy(), y.tolist(), transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x = torch.as_tensor(self.data[i]).float()
        return (self.transform(x) if self.transform else x), self.targets[i]


class Folder(Dataset):
    """As torchvision's folders: `samples` of (path, class)."""

    def __init__(self, root, names, transform=None):
        self.root, self.transform = root, transform
        self.samples = [(f"{root}/{name}.png", 0) for name in names]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        raise AssertionError("nothing has to be read")


class Opaque(Dataset):
    """Of which nothing is known but what it gives; it needs its transform."""

    def __init__(self, rows, transform=lambda x: x, nap=0.0):
        self.inside, self.transform, self.nap = [X[i] for i in rows], transform, nap

    def __len__(self):
        return len(self.inside)

    def __getitem__(self, i):
        time.sleep(self.nap)
        return self.transform(self.inside[i]), 0


class With(Dataset):
    """A wrapper that changes what another data set gives."""

    def __init__(self, subset, change):
        self.subset, self.change = subset, change

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, i):
        x, y = self.subset[i]
        return self.change(x), y


class Shaken(TensorData):
    """A split in memory that is changed at random when it is read."""

    def batch(self, index):
        got = super().batch(index)
        return replace(got, inputs=got.inputs + torch.randn_like(got.inputs))


def noise(x):
    return x + torch.randn_like(x)


def own(x, generator=np.random.default_rng()):  # noqa: B008 (one generator, which no seed reaches, is what is meant)
    return x + float(generator.random())


def split_of(rows):
    return Subset(TensorDataset(X, Y), list(rows))


PAIRS = {  # a split of rows, and another: the ways in which users have both
    "tensors": (lambda r: TensorData(X[r], Y[r]), lambda r: TensorData(X[r], Y[r])),
    "augmented tensors": (lambda r: Shaken(X[r], Y[r]), lambda r: TensorData(X[r].clone(), Y[r])),
    "subsets of two equal sets": (lambda r: DatasetData(split_of(r)), lambda r: DatasetData(split_of(r))),
    "tensors and a set": (lambda r: TensorData(X[r], Y[r]), lambda r: DatasetData(split_of(r))),
    "pictures with other transforms": (
        lambda r: DatasetData(Subset(Pictures(noise), r)), lambda r: DatasetData(Subset(Pictures(), r))
    ),
    "pictures with own randomness": (
        lambda r: DatasetData(Subset(Pictures(own), r)), lambda r: DatasetData(Subset(Pictures(own), r))
    ),
    "joined": (
        lambda r: DatasetData(ConcatDataset([Subset(Pictures(noise), r[:99]), Subset(Pictures(), r[99:])])),
        lambda r: DatasetData(Subset(Pictures(), r)),
    ),
    "samplers": (
        lambda r: as_data(DataLoader(Pictures(noise), 8, sampler=SubsetRandomSampler(r))),
        lambda r: as_data(DataLoader(Pictures(), 8, sampler=SubsetRandomSampler(r))),
    ),
    "folders": (
        lambda r: DatasetData(Folder("/a", r)), lambda r: DatasetData(Subset(Folder("/a", range(N), noise), r))
    ),
    "parts": (lambda r: Shaken(X, Y).part(torch.tensor(r)), lambda r: TensorData(X, Y).part(torch.tensor(r))),
    "nothing known": (lambda r: DatasetData(Opaque(r)), lambda r: DatasetData(Opaque(r))),
    "nothing known, same noise": (lambda r: DatasetData(Opaque(r)), lambda r: TensorData(X[r], Y[r])),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_thirty_of_three_hundred_are_found(kind):
    """At the end, where the first 256 rows had not reached."""
    one, other = PAIRS[kind]
    assert apart({"train": one(list(range(300))), "val": other(list(range(300, 600)))}) == []
    with pytest.raises(BadInput, match=r"30 of 300 examples \(10.0%\) are in both train and val"):
        apart({"train": one(list(range(300))), "val": other([*range(330, 600), *range(270, 300)])})
    if kind != "folders":
        few = [*range(302, 600), 7, 299]
        assert apart({"train": one(list(range(300))), "val": other(few)}) == [
            "2 of 300 examples (0.7%) are in both train and val"
        ]


@pytest.mark.parametrize("change", [noise, own])
def test_wrappers_of_one_random_split(change):
    """The usual pair: one data set split once, train augmented and val not."""
    train, val = random_split(Opaque(range(N)), [600, 300], generator=torch.Generator().manual_seed(0))
    assert apart({"train": DatasetData(With(train, change)), "val": DatasetData(val)}) == []
    val.indices = [*val.indices[:290], *train.indices[-10:]]
    with pytest.raises(BadInput, match="10 of 300"):
        apart({"train": DatasetData(With(train, change)), "val": DatasetData(With(val, lambda x: x))})


def test_the_whole_behind_subset_samplers_is_not_both():
    """The issue's case: three loaders over one data set; and one that forgot its sampler."""
    whole = Pictures(own)
    loaders = {name: as_data(DataLoader(whole, 8, sampler=SubsetRandomSampler(rows)), name) for name, rows in PARTS.items()}
    assert apart(loaders) == []
    with pytest.raises(BadInput, match="hold the same examples"):
        apart({**loaders, "train": as_data(DataLoader(whole, 8, shuffle=True))})


def test_the_same_photograph_twice_in_a_split_is_no_overlap():
    twice = torch.cat([X[:100], X[:100]])
    assert apart({"train": TensorData(twice, torch.zeros(200)), "val": TensorData(X[100:200], Y[100:200])}) == []


def test_what_could_not_be_compared_is_said(monkeypatch):
    monkeypatch.setattr(overlap, "READING", 0.2)
    slow = {name: DatasetData(Opaque(rows, nap=0.02)) for name, rows in PARTS.items()}
    notes = apart(slow)
    assert len(notes) == 3 and all("were compared, as many as can be read in 0.2 s" in note for note in notes), notes
    monkeypatch.setattr(overlap, "READING", 60.0)
    shaken = {name: DatasetData(Opaque(rows, own)) for name, rows in PARTS.items()}
    assert all("changes examples at random" in note for note in apart(shaken)) and len(apart(shaken)) == 3


def test_seeded_noise_is_seen_through():
    """Examples are read under one seed, so that equal ones are changed alike."""
    with pytest.raises(BadInput, match="same examples"):
        apart({"train": DatasetData(Opaque(range(300), noise)), "val": DatasetData(Opaque(range(300), noise))})


def test_a_data_set_that_breaks_is_named():
    def broken(x):
        raise KeyError("image 7")

    with pytest.raises(BadInput, match=r"val cannot be read.*test_overlap.py.*KeyError: 'image 7'"):
        apart({"train": TensorData(X[:300], Y[:300]), "val": DatasetData(Opaque(range(300), broken))})
