"""Every process has the same workload: one seed for the user's file, and a content that is compared before any order."""

import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from quadriga import Workload
from quadriga.core.batch import tensors
from quadriga.core.errors import BadInput
from quadriga.engine.admission import admitted
from quadriga.engine.base import Order
from quadriga.engine.local import Local
from quadriga.engine.ray_worker import Worker
from quadriga.engine.walk import workload_key
from quadriga.stages.state import Study
from quadriga.workloads import load
from quadriga.workloads.identity import FILE, identity, same, write
from quadriga.workloads.suspects import UNKNOWN, suspect

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(120, 3, generator=G), torch.arange(120) % 2
HEAD = """
import glob, os, random, time, uuid
import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset, random_split
from quadriga import Workload

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(1500, 3, generator=G), torch.arange(1500) % 2

def parts(order):
    order = torch.as_tensor(np.asarray(order))
    return {name: (X[rows], Y[rows]) for name, rows in zip(("train", "val", "test"), order.split([900, 300, 300]))}
"""
NET = "model=lambda: nn.Linear(3, 2)"


@pytest.fixture
def written(tmp_path):
    def one(body, name="mine.py"):
        (tmp_path / name).write_text(f"{HEAD}\n{body}\n")
        return str(tmp_path / name)

    return one


def made(**changes):
    given = {"model": lambda: nn.Linear(3, 2), "train": (X[:40], Y[:40]), "val": (X[40:80], Y[40:80]), "test": (X[80:], Y[80:])}
    return Workload(**{**given, **changes})


# one seed

DRAWN = {
    "random_split": "train, val, test = random_split(TensorDataset(X, Y), [900, 300, 300])\n"
    f"    return Workload({NET}, train=train, val=val, test=test)",
    "numpy": f"return Workload({NET}, **parts(np.random.permutation(1500)))",
    "random": f"order = list(range(1500)); random.shuffle(order)\n    return Workload({NET}, **parts(order))",
    "while imported": f"return Workload({NET}, **parts(ORDER))",
    "weights": "return Workload(model=model, **parts(range(1500)))",
}
TOP = """
ORDER = torch.randperm(1500)

def model():
    net = nn.Linear(3, 2)
    nn.init.constant_(net.bias, np.random.rand() + random.random())
    return net
"""


@pytest.mark.parametrize("kind", DRAWN)
def test_what_the_users_file_draws_is_the_same_each_time(written, kind):
    """Whatever generators were at before; and afterwards they are where they were."""
    reference, keys = written(f"{TOP}\ndef workload():\n    {DRAWN[kind]}"), []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        keys.append(workload_key(load(reference)))
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    assert keys[0] == keys[1]


# content


def odd_row(split, place):
    x = split[0].clone()
    x[place] += 1e-6
    return x, split[1]


@pytest.mark.parametrize("place", [0, 17, 39])
def test_the_key_covers_every_row_of_every_split_and_the_weights(place):
    key = workload_key(made())
    assert workload_key(made()) == key
    for name, rows in {"train": slice(0, 40), "val": slice(40, 80), "test": slice(80, 120)}.items():
        assert workload_key(made(**{name: odd_row((X[rows], Y[rows]), place)})) != key
        assert workload_key(made(**{name: (X[rows], 1 - Y[rows])})) != key
    assert workload_key(made(model=lambda: nn.Linear(3, 2, bias=False))) != key
    assert workload_key(made(batch_size=8)) != key


def test_the_key_covers_every_row_behind_data_sets():
    whole = TensorDataset(X, Y)

    def key(base=whole, rows=range(40), other=range(40, 80)):
        both = ConcatDataset([Subset(base, list(rows)), Subset(TensorDataset(X + 9, Y), [3])])
        return workload_key(made(train=both, val=Subset(base, list(other))))

    assert key() == key(TensorDataset(X.clone(), Y.clone()))
    assert key(TensorDataset(*odd_row((X, Y), 33))) != key() != key(rows=[*range(39), 119])
    assert key(other=[*range(40, 79), 118]) != key() != key(rows=[*range(1, 40), 0])


class Read(Dataset):
    """A data set of which nothing is known but what it gives."""

    def __init__(self, change, count=60, labels=Y):
        self.change, self.count, self.labels, self.own = change, count, labels, np.random.default_rng()

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.change(self, X[i % len(X)]), self.labels[i]


CHANGES = {
    "none": lambda data, x: x,
    "torch": lambda data, x: x + torch.randn(3),
    "numpy": lambda data, x: x + np.random.rand(),
    "its own": lambda data, x: x + float(data.own.random()),
    "its own, seldom": lambda data, x: -x if data.own.random() < 0.2 else x,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_at_reading_is_not_another_split(kind, tmp_path):
    """Two processes of which each has a generator of its own; but other labels, or other examples, are found."""
    (tmp_path / "out").mkdir()

    def one(change=CHANGES[kind], **more):
        return made(train=Read(change, **more))

    driver = one()
    key = write(driver, tmp_path / "out")
    worker = one()
    same(worker, tmp_path / "out", key)
    assert workload_key(worker) == key, "checkpoints have one name"
    assert "32 of 60 of train" in identity(driver).notes[0]
    assert identity(made()).notes == []
    with pytest.raises(BadInput, match="examples of train are read with other values"):
        same(one(labels=1 - Y), tmp_path / "out", key)
    with pytest.raises(BadInput, match="train has 59 examples in one and 60 in the other"):
        same(one(count=59), tmp_path / "out", key)
    if "its own" not in kind:
        with pytest.raises(BadInput, match="examples of train are read with other values"):
            same(one(change=lambda data, x: CHANGES[kind](data, x + 1)), tmp_path / "out", key)


def test_rounding_of_another_processor_is_not_another_model(tmp_path):
    net = nn.Linear(30, 2)
    near, far = (nn.Linear(30, 2) for _ in range(2))
    with torch.no_grad():
        for other, weight in ((near, net.weight * (1 + 1e-7)), (far, net.weight.flip(1))):
            other.load_state_dict(net.state_dict())
            other.weight.copy_(weight)
    given = {name: (torch.zeros(20, 30) + k, torch.zeros(20).long()) for k, name in enumerate(("train", "val", "test"))}
    key = write(Workload(model=net, **given), tmp_path)
    same(other := Workload(model=near, **given), tmp_path, key)
    assert workload_key(other) == key
    with pytest.raises(BadInput, match="the untrained weights differ, weight first"):
        same(Workload(model=far, **given), tmp_path, key)


def test_how_many_differ_is_told(tmp_path):
    key = write(made(), tmp_path)
    for val, told in {
        (40, 80): None,
        (50, 90): "10 of 40 examples of val differ",
        (81, 121): "val has 39 examples in one and 40 in the other",
    }.items():
        other = made(val=(X[slice(*val)], Y[slice(*val)]))
        if told is None:
            same(other, tmp_path, key)
            continue
        with pytest.raises(BadInput, match=told):
            same(other, tmp_path, key)
    with pytest.raises(BadInput, match="val has the same examples in another order"):
        same(made(val=(X[40:80].flip(0), Y[40:80].flip(0))), tmp_path, key)


def test_states_of_any_kind_have_a_content():
    """Packed weights of quantized modules, complex and sparse buffers, lazy parameters, empty ones."""
    odd = nn.Module()
    odd.register_buffer("c", torch.ones(3, dtype=torch.complex64))
    odd.register_buffer("s", torch.eye(3).to_sparse())
    odd.register_buffer("e", torch.zeros(0, 4))
    odd.register_buffer("h", torch.ones(3, dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd.lazy, odd.quantized = nn.LazyLinear(2), torch.ao.nn.quantized.Linear(3, 2)
    odd.w = nn.Parameter(torch.ones(1))
    found = identity(made(model=odd)).weights
    assert {"c", "s", "e", "h", "w", "lazy.weight"} <= found.keys()
    odd.c[1] = 2j
    assert identity(made(model=odd)).weights["c"] != found["c"]


# what to mend

CAUSES = {  # line → what is put in its place, as the remedy says
    "order = np.random.default_rng().permutation(1500)": ("np.random.default_rng()", "np.random.default_rng(0)"),
    "order = random.Random().sample(range(1500), 1500)": ("random.Random()", "random.Random(0)"),
    "torch.seed(); order = torch.randperm(1500)": ("torch.seed()", "torch.manual_seed(0)"),
    "order = np.roll(np.arange(1500), time.time_ns() % 1499 + 1)": ("time.time_ns()", "7"),
    "order = np.roll(np.arange(1500), int(uuid.uuid4()) % 1499 + 1)": ("int(uuid.uuid4())", "7"),
    "order = np.roll(np.arange(1500), os.urandom(2)[0] * 5 + os.urandom(1)[0])": (
        "os.urandom(2)[0] * 5 + os.urandom(1)[0]",
        "7",
    ),
}


@pytest.mark.parametrize("line", CAUSES)
def test_the_line_is_named_and_its_remedy_helps(written, tmp_path, line):
    text = f"def workload():\n    {line}\n    return Workload({NET}, **parts(order))"
    reference = written(text)
    key = write(load(reference), tmp_path)
    with pytest.raises(BadInput, match=r"examples of train differ") as caught:
        same(load(reference), tmp_path, key)
    assert "of 900" in caught.value.problem and f"mine.py:17: {line}; " in caught.value.remedy, str(caught.value)
    reference = written(text.replace(*CAUSES[line]))
    same(load(reference), tmp_path, write(load(reference), tmp_path))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("names = list(set('abc'))", "mine.py:16: names = list(set('abc')); sort it, as in sorted(set('abc'))"),
        ("n = sorted(set('abc')) + os.listdir('.')", "sort it, as in sorted(os.listdir('.'))"),
        ("n = glob.glob('*.png')", "sort it, as in sorted(glob.glob('*.png'))"),
        ("n = [hash('a') % 3]", "hash() of text differs in every process"),
        ("a, b = random_split(X, [1, 1499])", "give it generator=torch.Generator().manual_seed(0)"),
        ("n = sorted(glob.glob('*')); g = np.random.default_rng(0); random_split(X, [1], generator=G)", UNKNOWN),
        ("n = len(set('abc')); m = torch.randperm(3, generator=G)", UNKNOWN),
        ("import beside", "beside.py:2: r = np.random.default_rng(); give it a seed"),
    ],
)
def test_lines_that_differ_from_process_to_process(written, tmp_path, body, told):
    (tmp_path / "beside.py").write_text("import numpy as np\nr = np.random.default_rng()\n")
    assert told in suspect(written(body) + ":workload")


# processes

UNSEEDED = f"def workload():\n    return Workload({NET}, **parts(np.random.default_rng().permutation(1500)))"
SLOW = f"def workload():\n    time.sleep(float(os.environ['NAP']))\n    return Workload({NET}, **parts(range(1500)))"


def answer(engine, limit=60.0):
    engine.submit(Order(1, "hello", {"recipe": [], "hash": "y"}, limit=limit))
    for _ in range(200):
        if (found := engine.wait(1.0)) is not None:
            return found[1]
    raise AssertionError("nothing came back")


def test_a_worker_that_finds_another_workload_ends_the_study(written, tmp_path):
    reference = written(UNSEEDED)
    key = write(load(reference), tmp_path)
    engine = Local(reference, tmp_path, 0, 1, key=key)
    try:
        told = answer(engine)
    finally:
        engine.stop()
    assert told["fatal"] and "examples of train differ" in told["reason"] and "mine.py:17" in told["bad_input"][1]
    study = Study.__new__(Study)
    study.engine = SimpleNamespace(wait=lambda timeout: (1, told))
    with pytest.raises(BadInput, match=r"another process made another workload.*default_rng\(0\)"):
        study.collect(1.0)


def test_a_worker_on_ray_compares_before_any_order(written, tmp_path):
    spec = {"workload": written(UNSEEDED), "folder": str(tmp_path), "seed": 0}
    key = write(load(spec["workload"]), tmp_path)
    other, alike = Worker({**spec, "key": key}, {}), Worker({**spec, "key": ""}, {})
    for worker in (other, alike):
        worker.ready()
    assert other.do("hello", {"recipe": []}, {})["fatal"]
    assert alike.do("hello", {"recipe": []}, {})["status"] == "complete"
    assert json.loads((tmp_path / FILE).read_text())["key"] == key


def test_a_desk_has_the_drivers_key(written, tmp_path):
    reference = written(f"def workload():\n    return Workload({NET}, **parts(range(1500)))")
    driver = load(reference)
    desk = admitted({"workload": reference, "folder": str(tmp_path), "seed": 0, "key": write(driver, tmp_path)})
    assert workload_key(desk.workload) == workload_key(driver)
    assert all(torch.equal(a, b) for a, b in zip(tensors(desk.workload.val.inputs), tensors(driver.val.inputs), strict=True))


def test_loading_has_a_limit_of_its_own(written, tmp_path, monkeypatch):
    """An order's limit begins when the workload is there; loading that takes too long ends the study."""
    reference = written(SLOW)
    monkeypatch.setenv("NAP", "3")
    engine = Local(reference, tmp_path, 0, 1)
    try:
        assert answer(engine, limit=2.0)["status"] == "complete"
    finally:
        engine.stop()
    monkeypatch.setenv("NAP", "100")
    engine = Local(reference, tmp_path, 0, 1, loading=1.0)
    try:
        told = answer(engine)
    finally:
        engine.stop()
    assert told["fatal"] and "loading the workload took longer than 1 s" in told["reason"]


def test_a_file_that_fails_in_a_worker_alone_says_so(written, tmp_path, monkeypatch):
    reference = written("def workload():\n    raise KeyError(os.environ['MOOD'])")
    monkeypatch.setenv("MOOD", "bad")
    with pytest.raises(BadInput, match="KeyError: 'bad'"):
        admitted({"workload": reference, "folder": str(tmp_path), "seed": 0, "key": "k"})


def test_a_model_that_its_file_trains_is_the_same_on_any_number_of_threads(tmp_path):
    """Sums over threads round differently, and sixty steps of Adam make much of it."""
    (tmp_path / "trained.py").write_text(
        """
import torch
from torch import nn
from quadriga import Workload

def workload():
    x = torch.randn(3000, 64)
    y = (x @ torch.randn(64, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Workload(model=model, val=(x[:500], y[:500]), test=(x[500:900], y[500:900]), trained=True)
"""
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(load(f"{tmp_path}/trained.py").build().state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found[0].values(), found[1].values(), strict=True))
