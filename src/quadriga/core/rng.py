"""Random numbers: seeds derived from names and counters, and the states of the global generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, and is the same in every process.

    Example:
        >>> derive("order", 0, 1) == derive("order", 0, 1) != derive("order", 1, 0)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_all(seed: int) -> None:
    """Seed torch (every device), `random` and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def capture() -> dict[str, Any]:
    """The states of the global generators, as tensors and numbers."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "place": int(place),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def restore(state: Mapping[str, Any]) -> None:
    """Put back what `capture` gave; a CUDA state is left out where that device is missing."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["place"], numpy["has_gauss"], numpy["cached"]))


@contextmanager
def isolated() -> Iterator[None]:
    """Whatever happens inside, the caller's generators go on as if it had not."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


@contextmanager
def alike(seed: int) -> Iterator[None]:
    """The same result in every process: under a seed, and on one thread, since sums in another order round differently.

    The caller's generators and threads are as before; a number of threads that is set inside stays, since it was meant.

    Args:
        seed: of torch, `random` and numpy.
    """
    threads = torch.get_num_threads()
    with isolated():
        seed_all(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch.get_num_threads() == 1:
                torch.set_num_threads(threads)
