"""Data sets for `test_feed.py` that fresh processes can import; run as a program, it trains from one until it is killed.

Usage: python feeding.py FOLDER WORKERS KILL: the run kills itself at step KILL, 0 for never; it prints what it trained.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from quadriga.core.data import DatasetData
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot
from quadriga.testing import fingerprint, tiny_mlp
from quadriga.train.loop import fit

SEED = 5


class Noisy(Dataset):
    """The rows of `tiny_mlp` with noise from all three global generators, as random augmentations draw it."""

    def __init__(self, length: int = 96) -> None:
        train = tiny_mlp((length, 8, 8)).train
        self.x, self.y = train.inputs, train.target

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(10) + random.random() + float(np.random.rand()), self.y[i]


class Deadly(Noisy):
    """Kills the process that reads example `index`, as long as fewer than `times` marks lie in the folder."""

    def __init__(self, folder: Path, index: int, times: int = 1) -> None:
        super().__init__()
        self.folder, self.index, self.times = folder, index, times
        folder.mkdir(exist_ok=True)

    def __getitem__(self, i):
        if i == self.index and len(list(self.folder.iterdir())) < self.times:
            (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Broken(Noisy):
    """Cannot read one of its examples."""

    def __getitem__(self, i):
        if i == 17:
            return [][i]
        return super().__getitem__(i)


class Hanging(Noisy):
    """Never comes back from one of its examples."""

    def __getitem__(self, i):
        while i == 17:
            time.sleep(0.05)
        return super().__getitem__(i)


class Noting(Hook):
    """Keeps the examples seen, and kills its process at a step."""

    kill = 0  # of the class: what a hook is made with has to be the same in a run that goes on

    def __init__(self, model) -> None:
        self.indices, self.left = [], self.kill

    def seen(self, batch, losses):
        self.indices.append(batch.index.clone())
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self):
        return {"indices": self.indices}

    def load_state_dict(self, state):
        self.indices = list(state["indices"])


def trained(dataset, workers, folder=None, kill=0, epochs=2, timeout=60.0):
    """The weights' fingerprint, the outcome and the examples seen, in order."""
    workload = tiny_mlp()
    setup = Setup.of(workload)
    Noting.kill = kill
    training = replace(setup.training, make_hooks=(Noting,))
    optimizer = OptimizerSlot(lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    setup = replace(setup, training=training, optimizer=optimizer)
    data = DatasetData(dataset, workers=workers, timeout=timeout)
    outcome = fit(setup, data, epochs=epochs, seed=SEED, checkpoint=folder, every=0.0)
    return fingerprint(setup.model), outcome, torch.cat(outcome.hooks[-1].indices)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, workers, kill = sys.argv[1:]
    mark, outcome, indices = trained(Noisy(), int(workers), Path(folder), int(kill))
    print(mark, outcome.exact, *indices.tolist())
