"""Each ready-made workload from end to end: the quality stated is that of the artifact, by plain PyTorch on data read by hand.

Nothing below reads, prepares, batches or scores by code of Quadriga. A workload that scores other images than it trains on, or
another split than it names, is found here; so is one whose network guesses.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import quadriga
from quadriga.cli import app
from quadriga.exits import guarded
from quadriga.workloads import fetch, names

SHIPPED = Path(quadriga.__file__).parent / "workloads" / "data"


def unpacked(name):
    return lzma.decompress((SHIPPED / name).read_bytes())


def fashion(split, examples):
    """Normalised images [n, 1, 28, 28] and labels: val is the last 2,000 of the 12,000 training images shipped."""
    part = "t10k" if split == "test" else "train"
    rows = {"train": slice(0, 10_000), "val": slice(10_000, None), "test": slice(None)}[split]
    raw = np.frombuffer(unpacked(f"fashion-mnist-{part}-images-idx3-ubyte.xz"), np.uint8, offset=16)
    labels = np.frombuffer(unpacked(f"fashion-mnist-{part}-labels-idx1-ubyte.xz"), np.uint8, offset=8)
    images = torch.from_numpy(raw.reshape(-1, 1, 28, 28)[rows].astype(np.float32)) / 255
    return (images - 0.2860) / 0.3530, torch.from_numpy(labels[rows].astype(np.int64))


def padded(split, examples):
    """32×32, the border as black as the background: pixels of 0, before normalisation."""
    images, labels = fashion(split, examples)
    return functional.pad(images, (2, 2, 2, 2), value=(0 - 0.2860) / 0.3530), labels


def enlarged(split, examples):
    images, labels = fashion(split, examples)
    return functional.interpolate(images[:1000], size=(64, 64), mode="bilinear"), labels


@cache
def glosses(split):
    """(label, words) of WordNet's definitions, each once, in the order of a checksum."""
    found = set()
    for line in unpacked("wordnet-glosses.tsv.xz").decode().splitlines():
        label, text = line.split("\t", 1)
        row = tuple(re.findall("[a-z0]+", re.sub(r"\d", "0", text.lower()))[:24])
        share = int.from_bytes(hashlib.sha256(" ".join(row).encode()).digest()[:4], "big") / 2**32
        if row and split == ("train" if share < 0.85 else "val" if share < 0.9 else "test"):
            found.add((int(label), row))
    return sorted(found, key=lambda r: (zlib.crc32(" ".join(r[1]).encode()), r))


def words(split, examples):
    """Word numbers, padded on the left: the frequent words of train by rank, the rest in 2,048 buckets."""
    counts = Counter(word for _, row in glosses("train")[:examples] for word in row)
    ranked = sorted(counts, key=lambda w: (-counts[w], w))[: 8192 - 2048 - 1]
    known = {word: place for place, word in enumerate(ranked, 1)}
    rows = glosses(split)
    numbers = [[known.get(w) or 6144 + zlib.crc32(w.encode()) % 2048 for w in row] for _, row in rows]
    return torch.tensor([[0] * (24 - len(n)) + n for n in numbers]), torch.tensor([label for label, _ in rows])


def pieces(split, examples):
    """Word pieces with their mask, padded on the right to 32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch.folder("minilm") / "tokenizer.json"))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32)
    rows = glosses(split)[:1000]
    made = tokenizer.encode_batch([" ".join(row) for _, row in rows])
    ids, mask = (torch.tensor([getattr(e, name) for e in made]) for name in ("ids", "attention_mask"))
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for label, _ in rows])


def plays(split, examples):
    """Windows of 128 bytes and the bytes that follow each; val and test are plays that train lacks."""
    held = {"val": ("henry_viii", "othello", "tempest"), "test": ("john", "macbeth", "twelfth_night")}
    texts = dict(part.split(b"\n", 1) for part in unpacked("shakespeare-plays.txt.xz").split(b"\f")[1:])
    chosen = held.get(split) or [n for n in map(bytes.decode, texts) if n not in held["val"] + held["test"]]
    inputs, targets = [], []
    for text in (list(texts[name.encode()]) for name in chosen):
        starts = range(0, len(text) - 128, 128)
        inputs += [text[s : s + 128] for s in starts]
        targets += [text[s + 1 : s + 129] for s in starts]
    return torch.tensor(inputs), torch.tensor(targets)


def accuracy(outputs, labels):
    return 100 * (outputs.argmax(-1) == labels).double().mean().item()


def bits(logits, targets):
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / math.log(2)


def majority(train, labels):
    """The accuracy of the class that train has most of, in points."""
    return 100 * (labels == train.flatten().mode().values).double().mean().item()


def unigram(train, targets):
    """Bits a byte for who knows how often each byte occurs in train, and nothing else."""
    counts = torch.bincount(train.flatten(), minlength=256).double() + 1
    return -(counts / counts.sum()).log2()[targets].mean().item()


@dataclass(frozen=True)
class Task:
    """How to read a workload's data, score its outputs and guess; the gain over guessing that is due; the training for it."""

    read: Callable
    measure: Callable
    guess: Callable
    margin: float
    examples: int
    held_out: int
    training: str


SMALL_BATCHES = 'method = "batch_ramp"\nkind = "linear"\nstages = 1\nstart = 0.125\nuntil = 1.0'
ADAMW = 'method = "optimizer"\nkind = "adamw"\nlr = {}\n[[step]]\n{}\n[[step]]\nmethod = "train"\nepochs = {}'
MUON = 'method = "optimizer"\nkind = "muon"\nscale = 3.0\n[[step]]\nmethod = "train"\nepochs = 3'
TASKS = {
    "lenet_fashion": Task(padded, accuracy, majority, 40, 500, 300, ADAMW.format(0.002, SMALL_BATCHES, 2)),
    "resnet20_fashion": Task(padded, accuracy, majority, 30, 512, 300, ADAMW.format(0.003, SMALL_BATCHES, 1.5)),
    "mobilenetv2_fashion": Task(enlarged, accuracy, majority, 40, 320, 300, ADAMW.format(0.001, SMALL_BATCHES, 1.5)),
    "lstm_wordnet": Task(words, accuracy, majority, 5, 3000, 300, ADAMW.format(0.005, SMALL_BATCHES, 1)),
    "minilm_wordnet": Task(pieces, accuracy, majority, 10, 192, 128, ADAMW.format(0.0002, SMALL_BATCHES, 1.5)),
    "gpt_shakespeare": Task(plays, bits, unigram, 0.4, 200, 100, MUON),
}
FETCHED = {package.workload: name for name, package in fetch.PACKAGES.items()}


def test_every_ready_made_workload_is_here():
    assert sorted(TASKS) == names()


@pytest.fixture(params=sorted(TASKS))
def task(request, monkeypatch):
    monkeypatch.setenv("QUADRIGA_DATA", "shipped")
    return request.param


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command line in this process; the JSON object that it printed, and its exit status."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run(*words):
        status = guarded(app, [*words, "--json"])
        captured = capsys.readouterr()
        assert captured.out.strip(), captured.err
        return {**json.loads(captured.out.strip().splitlines()[-1]), "exit status": status, "said": captured.err}

    yield run
    torch.set_num_threads(threads)


def loaded(folder):
    """The artifact, by its own load.py."""
    spec = importlib.util.spec_from_file_location("its_load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def by_hand(name, folder, split):
    """The artifact's quality on a split, and how much better than guessing that is."""
    task = TASKS[name]
    few = slice(task.held_out)
    inputs, target = task.read(split, task.examples)
    inputs = {k: v[few] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[few]
    with torch.no_grad():
        quality = task.measure(loaded(folder)(inputs), target[few])
    guessed = task.guess(task.read("train", task.examples)[1][: task.examples], target[few])
    return quality, guessed - quality if task.measure is bits else quality - guessed


def small(name):
    return f"{name}?examples={TASKS[name].examples}&held_out={TASKS[name].held_out}"


def fetched(call, name):
    """Bring the weights that a workload needs; without a connection that is a failure in CI, and a reason to skip elsewhere."""
    with contextlib.suppress(KeyError):
        found = call("fetch", FETCHED[name])
        if found["exit status"] and "could not be downloaded" in found["said"] and os.environ.get("CI") != "true":
            pytest.skip(found["said"])
        assert found["exit status"] == 0, found["said"]


def test_train_states_the_quality_of_its_artifact(call, task, tmp_path):
    fetched(call, task)
    (tmp_path / "short.toml").write_text(f'[[step]]\n{TASKS[task].training}\n[[step]]\nmethod = "onnxruntime"\n')
    found = call("train", small(task), "--recipe", "short.toml", "--out", "made")
    assert (found["exit status"], found["status"]) == (0, "complete"), found["said"]
    stated = json.loads((tmp_path / "made" / "train.json").read_text())["quality"]
    quality, better = by_hand(task, tmp_path / "made" / "artifact", "val")
    print(task, stated, quality, better)
    assert stated == found["quality"] == pytest.approx(quality, rel=1e-4, abs=0.8)  # one of 128 may fall either way, two of 300
    assert better > TASKS[task].margin, f"{quality} is only {better} better than guessing"
    checked = call("verify", "made/artifact")
    assert checked["exit status"] == 0 and checked["ok"], checked


SOON = {"lenet_fashion": "60s"}  # workload → budget; the others need minutes, most of them to train and to export


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in sorted(TASKS)], indirect=True
)
@pytest.mark.timeout(900)
def test_run_states_the_quality_of_its_artifact(call, task, tmp_path):
    fetched(call, task)
    words = ("--only", "hardware", "--floor", "-10pt", "--budget", SOON.get(task, "300s"), "--out", "made")
    found = call("run", small(task), *words)
    assert found["status"] in ("verified", "infeasible", "unmeasured") and found["artifact"] == "artifact", found["said"]
    won, base = found["winner"], found["baseline"]
    assert found["exit status"] == (0 if won else 1) and (won is not None) == (found["status"] == "verified")
    stated, split = (won["quality"]["value"], "test") if won else (base["quality"], base["quality_split"])
    quality, better = by_hand(task, tmp_path / "made" / "artifact", split)
    assert stated == pytest.approx(quality, rel=1e-3, abs=0.8)  # two of 300, one of 128
    assert better > TASKS[task].margin / 3, f"{quality} is only {better} better than guessing"
    checked = call("verify", "made/artifact")
    assert checked["exit status"] == 0 and checked["ok"], checked
