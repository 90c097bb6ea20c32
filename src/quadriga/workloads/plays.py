"""Shakespeare's plays as bytes, for language models; whole plays are held out."""

from __future__ import annotations

import numpy as np
import torch

from quadriga.core.data import TensorData
from quadriga.workloads import shipped
from quadriga.workloads.fashion import Splits

FILE = "shakespeare-plays.txt.xz"
VAL = ("henry_viii", "othello", "tempest")  # a history, a tragedy and a comedy each; none belongs to a series
TEST = ("john", "macbeth", "twelfth_night")


def plays() -> dict[str, bytes]:
    """Name → text of the 37 plays, ASCII."""
    parts = (part.split(b"\n", 1) for part in shipped.read(FILE).split(b"\f")[1:])
    return {name.decode(): text for name, text in parts}


def windows(texts: list[bytes], length: int) -> TensorData:
    """Consecutive windows: inputs and targets int64 [n, length], the target being the next byte. No window spans two texts."""
    blocks = []
    for text in texts:
        count = (len(text) - 1) // length
        blocks.append(np.frombuffer(text, np.uint8, count * length + 1).astype(np.int64))
    inputs = np.concatenate([b[:-1].reshape(-1, length) for b in blocks])
    targets = np.concatenate([b[1:].reshape(-1, length) for b in blocks])
    return TensorData(torch.from_numpy(inputs), torch.from_numpy(targets))


def shakespeare(*, context: int = 128, examples: int | None = None) -> Splits:
    """The plays as windows of `context` bytes: 31 plays to learn from, three for val, three for test.

    Args:
        context: bytes in a window.
        examples: keep that many windows of train; all by default.
    """
    texts = plays()
    train = windows([t for name, t in texts.items() if name not in VAL + TEST], context)
    if examples is not None:
        train = train.part(torch.arange(min(examples, len(train))))
    val, test = (windows([texts[name] for name in names], context) for names in (VAL, TEST))
    note = {
        "data": "Shakespeare's plays, bytes",
        "source": "shipped",
        "sha256": {FILE: shipped.checksums()[FILE]},
        "examples": {"train": len(train), "val": len(val), "test": len(test)},
        "held out": {"val": list(VAL), "test": list(TEST)},
        "licence": "public domain; collection CC BY 2.5, Open Knowledge Foundation",
    }
    return Splits(train, val, test, note)
