"""Ready-made workloads: their data, their models, and how they are found."""

import gzip
import hashlib
import inspect
import math
from importlib import import_module

import numpy as np
import pytest
import torch

from quadriga import workloads
from quadriga.core.batch import call, primary
from quadriga.core.errors import BadInput
from quadriga.workloads import fashion, fetch, glosses, plays, shipped

torch.set_num_threads(1)
SMALL = {"lstm_wordnet": {"examples": 300}, "gpt_shakespeare": {"examples": 300}}
IMAGES = {"lenet_fashion", "resnet20_fashion"}
FETCHED = {package.workload for package in fetch.PACKAGES.values()}  # in test_workloads_pretrained.py


@pytest.fixture(scope="module")
def ready():
    """Every ready-made workload that needs nothing but the shipped data, loaded once."""
    found = [n for n in workloads.names() if n not in FETCHED]
    return {n: workloads.load(n, **({"source": "shipped"} if n in IMAGES else SMALL.get(n, {}))) for n in found}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without Fashion-MNIST: the cache is empty and Debian's folder is missing."""
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    for name in ("QUADRIGA_DATA", "QUADRIGA_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def rows(data):
    return {hash(row.tobytes()) for row in data.inputs.numpy()}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def tiny(monkeypatch):
    """Fashion-MNIST's four files with 60 and 10 images, official for the time of a test."""
    rng = np.random.default_rng(0)
    made = {
        "train-images-idx3-ubyte": idx(rng.integers(0, 256, (60, 28, 28), np.uint8)),
        "train-labels-idx1-ubyte": idx(rng.integers(0, 10, 60).astype(np.uint8)),
        "t10k-images-idx3-ubyte": idx(rng.integers(0, 256, (10, 28, 28), np.uint8)),
        "t10k-labels-idx1-ubyte": idx(rng.integers(0, 10, 10).astype(np.uint8)),
    }
    monkeypatch.setattr(fashion, "FILES", {name: shipped.digest(raw) for name, raw in made.items()})
    monkeypatch.setattr(fashion, "VAL", {60: 5})
    return {name: gzip.compress(raw) for name, raw in made.items()}


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, packed in files.items():
        (folder / f"{name}.gz").write_bytes(packed)


# models


def test_each_workload_is_a_file_and_passes_the_check(ready):
    assert {"lenet_fashion", "resnet20_fashion", "lstm_wordnet", "gpt_shakespeare"} <= set(ready)
    for name, made in ready.items():
        assert made.name == name
        notes = workloads.check(made)
        assert all("in both" in note or "classes that train lacks" in note for note in notes), notes


@pytest.mark.parametrize(
    ("name", "count"), [("lenet_fashion", 61_706), ("resnet20_fashion", 272_186), ("lstm_wordnet", 761_517)]
)
def test_parameters(ready, name, count):
    assert sum(p.numel() for p in ready[name].build().parameters()) == count


def test_lenet_is_the_missions():
    module = import_module("quadriga.workloads.ready.lenet_fashion").LeNet()
    shapes = [tuple(p.shape) for n, p in module.named_parameters() if n.endswith("weight")]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]


@pytest.mark.parametrize(("size", "low", "high"), [("0.8M", 0.75e6, 0.9e6), ("2M", 1.8e6, 2.1e6), ("10M", 10e6, 11e6)])
def test_gpt_sizes(size, low, high):
    module = import_module("quadriga.workloads.ready.gpt_shakespeare")
    assert low < sum(p.numel() for p in module.GPT(*module.SIZES[size]).parameters()) < high


def test_gpt_looks_at_the_past_only():
    """A changed byte changes no earlier logit."""
    module = import_module("quadriga.workloads.ready.gpt_shakespeare")
    gpt = module.GPT(2, 32, 2).eval()
    tokens = torch.randint(256, (1, 16))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 256
    a, b = gpt(tokens), gpt(other)
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])


def test_untrained_gpt_knows_nothing(ready):
    """At the start the prediction is near uniform: eight bits a byte."""
    made = ready["gpt_shakespeare"]
    batch = made.val.batch(torch.arange(16))
    with torch.inference_mode():
        values, weights = made.metric.examples(call(made.build(), batch.inputs), batch)
    assert float((values * weights).sum() / weights.sum()) == pytest.approx(8, abs=0.2)


def test_the_seed_gives_the_weights(ready):
    for made in ready.values():
        one, same, other = (torch.cat([p.flatten() for p in made.build(seed).parameters()]) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_each_learns_from_one_batch(ready):
    """A few steps on one batch lower its loss from about that of chance."""
    for made in ready.values():
        model, batch = made.build(0), made.train.batch(torch.arange(16))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for _ in range(4):
            losses.append(made.loss(call(model, batch.inputs), batch).mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        classes = primary(call(model, batch.inputs)).shape[-1]
        assert losses[0].item() == pytest.approx(math.log(classes), rel=0.25)
        assert losses[-1] < losses[0]


# data


def test_shipped_files_are_listed_whole_and_small():
    files = {p.name for p in shipped.FOLDER.iterdir() if p.suffix == ".xz" or p.name.startswith("LICENSE")}
    assert files == set(shipped.checksums())
    for name, value in shipped.checksums().items():
        assert hashlib.sha256((shipped.FOLDER / name).read_bytes()).hexdigest() == value
    assert sum(p.stat().st_size for p in shipped.FOLDER.iterdir()) < 15e6
    assert sum(name.startswith("LICENSE") for name in files) == 3


def test_a_damaged_shipped_file_is_refused(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("".join(f"{v}  {k}\n" for k, v in shipped.checksums().items()))
    name = "fashion-mnist-t10k-labels-idx1-ubyte.xz"
    raw = bytearray((shipped.FOLDER / name).read_bytes())
    (tmp_path / name).write_bytes(raw)
    assert len(shipped.read(name, tmp_path)) == 10_008
    raw[2000] ^= 1
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BadInput, match=rf"{name} is damaged.*reinstall"):
        shipped.read(name, tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        shipped.read("wordnet-glosses.tsv.xz", tmp_path)


def test_fashion_subset_has_the_official_test_set_and_disjoint_splits(bare):
    data = fashion.fashion_mnist()
    assert (len(data.train), len(data.val), len(data.test)) == (10_000, 2_000, 10_000)
    assert data.note["source"] == "shipped" and "subset" in data.note["data"]
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        assert data.note["sha256"][name] == fashion.FILES[name]
    assert data.test.target.bincount().tolist() == [1000] * 10
    train, val, test = map(rows, (data.train, data.val, data.test))
    assert not train & val and not train & test and not val & test


def test_images_are_padded_with_black_then_normalised(bare):
    padded, plain = fashion.fashion_mnist().val.inputs, fashion.fashion_mnist(pad=0).val.inputs
    assert padded.shape == (2000, 1, 32, 32) and padded.dtype == torch.float32
    assert torch.equal(padded[:, :, 2:-2, 2:-2], plain)
    assert padded[:, :, :2].unique().tolist() == pytest.approx([-fashion.MEAN / fashion.STD])
    assert abs(float(plain.mean())) < 0.02 and float(plain.std()) == pytest.approx(1, abs=0.02)


def test_fashion_is_found_in_the_cache_then_debians_folder(bare, tiny):
    put(bare / "debian", tiny)
    assert fashion.fashion_mnist().note["source"] == "debian"
    put(bare / "cache" / "fashion-mnist", tiny)
    data = fashion.fashion_mnist()
    assert data.note["source"] == "cache"
    assert (len(data.train), len(data.val), len(data.test)) == (55, 5, 10)
    assert data.note["sha256"] == fashion.FILES
    assert fashion.fashion_mnist(source="debian").note["source"] == "debian"


def test_environment_forces_the_source(bare, monkeypatch):
    monkeypatch.setenv("QUADRIGA_DATA", "debian")
    with pytest.raises(BadInput, match=r'not in the source "debian"; install dataset-fashion-mnist'):
        fashion.fashion_mnist()
    monkeypatch.setenv("QUADRIGA_DATA", "chache")
    with pytest.raises(BadInput, match=r'"chache"; did you mean "cache"'):
        fashion.fashion_mnist()


def test_download_goes_into_the_cache_verified(bare, tiny, monkeypatch):
    put(bare / "server", tiny)
    monkeypatch.setattr(fashion, "ADDRESS", (bare / "server").as_uri() + "/")
    monkeypatch.setattr(fashion.fetch, "__defaults__", (fashion.ADDRESS,))
    monkeypatch.setenv("QUADRIGA_DOWNLOAD", "1")
    assert fashion.fashion_mnist().note["source"] == "cache"
    assert len(list((bare / "cache" / "fashion-mnist").iterdir())) == 4


@pytest.mark.parametrize("packed", [b"<html>", gzip.compress(b"other")], ids=["a page", "other bytes"])
def test_a_wrong_download_never_reaches_the_cache(bare, tiny, packed):
    put(bare / "server", {name: packed for name in tiny})
    with pytest.raises(BadInput, match="is damaged"):
        fashion.fetch(bare / "cache", (bare / "server").as_uri() + "/")
    assert not (bare / "cache").exists()
    with pytest.raises(BadInput, match="could not be downloaded"):
        fashion.fetch(bare / "cache", (bare / "nowhere").as_uri() + "/")


def test_a_cut_off_cache_file_is_named(bare, tiny):
    name = next(iter(tiny))
    put(bare / "debian", {**tiny, name: tiny[name][:100]})
    with pytest.raises(BadInput, match=rf"{name}\.gz is damaged"):
        fashion.fashion_mnist()


def test_glosses_never_cross_splits():
    splits = glosses.rows(24)
    texts = {name: {text for _, text in found} for name, found in splits.items()}
    assert not texts["train"] & texts["val"] and not texts["train"] & texts["test"] and not texts["val"] & texts["test"]
    total = sum(map(len, splits.values()))
    for name, share in (("train", 0.85), ("val", 0.05), ("test", 0.1)):
        sd = math.sqrt(share * (1 - share) / total)
        assert len(splits[name]) / total == pytest.approx(share, abs=4 * sd)
    assert {label for label, _ in splits["train"]} == set(range(glosses.CLASSES))


def test_vocabulary_is_built_from_train_and_covers_every_word():
    vocabulary = glosses.Vocabulary([("a", "b", "a"), ("c", "a")], size=8, buckets=4)
    assert [vocabulary.number(w) for w in "abc"] == [1, 2, 3]
    assert all(4 <= vocabulary.number(w) < 8 for w in ("unseen", "d", "e"))
    assert vocabulary.encode([("a",), ("b", "a", "c")], 3).tolist() == [[0, 0, 1], [2, 1, 3]]


def test_whole_plays_are_held_out(ready):
    texts = plays.plays()
    assert len(texts) == 37 and all(len(text) > 80_000 for text in texts.values())
    assert set(plays.VAL).isdisjoint(plays.TEST) and {*plays.VAL, *plays.TEST} <= set(texts)
    data = plays.shakespeare()
    test = bytes(data.test.inputs[0].tolist())
    assert texts["john"].startswith(test)
    known = rows(data.train)
    assert not known & rows(data.test) and not known & rows(data.val) and not rows(data.val) & rows(data.test)


def test_targets_are_the_next_bytes():
    data = plays.windows([bytes(range(10)), bytes(range(100, 107))], 3)
    assert data.inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [100, 101, 102], [103, 104, 105]]
    assert torch.equal(data.target, data.inputs + 1)


# references


def test_references_load_again(ready):
    made = workloads.load("gpt_shakespeare:2M", examples=20)
    again = workloads.load(made.reference)
    assert again.reference == made.reference == "gpt_shakespeare?examples=20&size=2M"
    assert len(again.train) == 20
    assert again.build().head.in_features == 192
    assert ready["lenet_fashion"].reference == "lenet_fashion?source=shipped"


@pytest.mark.parametrize("options", [{}, {"size": "2M"}, {"a": "7", "b": 7, "c": True, "d": "x y&z=1", "e": 1.5}])
def test_options_survive_spelling(options):
    assert workloads.parse("name" + workloads.spell(options)) == ("name", None, options)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("lenet_fashon", {}, 'no workload "lenet_fashon"; did you mean "lenet_fashion"'),
        ("gpt_shakespeare:3M", {}, 'no size "3M"'),
        ("lenet_fashion:big", {}, 'lenet_fashion has no option "size"'),
        ("lstm_wordnet", {"exampels": 3}, 'no option "exampels"; did you mean "examples"'),
        ("lstm_wordnet", {"examples": [3]}, "the option examples is a list"),
    ],
)
def test_bad_references(reference, options, message):
    with pytest.raises(BadInput) as caught:
        workloads.load(reference, **options)
    assert message in str(caught.value)


def test_every_workload_file_documents_its_options():
    for name in workloads.names():
        function = import_module(f"quadriga.workloads.ready.{name}").workload
        for option in inspect.signature(function).parameters:
            assert option in function.__doc__, (name, option)
