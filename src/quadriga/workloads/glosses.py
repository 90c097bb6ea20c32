"""WordNet's definitions as a text classification task: which of the 45 lexicographer files does one belong to?"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quadriga.core.data import TensorData
from quadriga.workloads import shipped
from quadriga.workloads.fashion import Splits

FILE = "wordnet-glosses.tsv.xz"
CLASSES = 45
Row = tuple[int, tuple[str, ...]]  # label, words


def words(text: str, length: int) -> tuple[str, ...]:
    """The first `length` words of a definition, in lower case; digits become 0.

    Example:
        >>> words("(of 12 Men) a fast-growing oak", 5)
        ('of', '00', 'men', 'a', 'fast')
    """
    return tuple(re.findall(r"[a-z0]+", re.sub(r"\d", "0", text.lower()))[:length])


def part(row: tuple[str, ...]) -> str:
    """The split of a definition, by the SHA-256 of its words, so that equal ones share it: 85 % train, 5 % val, 10 % test."""
    place = int.from_bytes(hashlib.sha256(" ".join(row).encode()).digest()[:4]) / 2**32
    return "train" if place < 0.85 else "val" if place < 0.9 else "test"


def rows(length: int = 24) -> dict[str, list[Row]]:
    """Split → rows of (label, words), each row once, in the order of a hash, so that any first part is a fair sample."""
    splits: dict[str, dict[Row, None]] = {"train": {}, "val": {}, "test": {}}
    for line in shipped.read(FILE).decode().splitlines():
        label, text = line.split("\t", 1)
        if row := words(text, length):
            splits[part(row)][int(label), row] = None
    return {name: sorted(found, key=_order) for name, found in splits.items()}


def _order(row: Row) -> tuple[int, Row]:
    return zlib.crc32(" ".join(row[1]).encode()), row


class Vocabulary:
    """Words to numbers: 0 is padding, then the most frequent words of train, then buckets that rare words are hashed into.

    Args:
        texts: of the training split only.
        size: of the vocabulary, with padding and buckets.
        buckets: how many numbers the rare and the unseen words share.
    """

    def __init__(self, texts: Iterable[tuple[str, ...]], size: int = 8192, buckets: int = 2048) -> None:
        counts = Counter(word for text in texts for word in text)
        common = sorted(counts, key=lambda w: (-counts[w], w))[: size - buckets - 1]
        self.known = {word: number for number, word in enumerate(common, 1)}
        self.first, self.buckets, self.size = size - buckets, buckets, size

    def number(self, word: str) -> int:
        """The word's number in 1..size - 1."""
        return self.known.get(word) or self.first + zlib.crc32(word.encode()) % self.buckets

    def encode(self, texts: list[tuple[str, ...]], length: int) -> Tensor:
        """Texts as int64 [n, length], padded with 0 on the left, so that the last place is the last word."""
        out = np.zeros((len(texts), length), np.int64)
        for row, text in zip(out, texts, strict=True):
            row[length - len(text) :] = [self.number(word) for word in text]
        return torch.from_numpy(out)


def wordnet_glosses(*, length: int = 24, size: int = 8192, examples: int | None = None) -> Splits:
    """Definitions as word numbers int64 [n, length] in 0..size - 1, with int64 labels [n] in 0..44.

    Args:
        length: words kept of a definition; nineteen in twenty have at most 22.
        size: of the vocabulary, which is built from train.
        examples: keep that many of train; all by default.
    """
    splits = rows(length)
    splits["train"] = splits["train"][:examples]
    vocabulary = Vocabulary((text for _, text in splits["train"]), size, size // 4)

    def data(name: str) -> TensorData:
        labels, texts = zip(*splits[name], strict=True)
        return TensorData(vocabulary.encode(list(texts), length), torch.tensor(labels))

    return Splits(data("train"), data("val"), data("test"), note(splits))


def note(splits: dict[str, list[Row]]) -> dict[str, Any]:
    """What every record says about these data."""
    return {
        "data": "WordNet 3.0 definitions, 45 lexicographer files",
        "source": "shipped",
        "sha256": {FILE: shipped.checksums()[FILE]},
        "examples": {name: len(found) for name, found in splits.items()},
        "licence": "WordNet 3.0 licence, Copyright 2006 Princeton University",
    }
