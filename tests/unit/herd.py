"""Train steps whose parts workers can import, for `test_training_hogwild.py`; run as a program, it trains until it is killed.

Usage: python herd.py FOLDER: two workers note in FOLDER what they see, and keep a checkpoint at every step.
"""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quadriga.core.setup import Setup
from quadriga.core.slots import OptimizerSlot
from quadriga.methods.training.hogwild import Hogwild
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import tiny_cnn
from quadriga.train.loop import fit

SEED, EPOCHS = 3, 4


@dataclass(frozen=True)
class Noting:
    """A transform that appends which process sees which examples to a file."""

    folder: Path

    def __call__(self, batch, moment):
        with open(self.folder / "seen.txt", "a") as file:
            file.write(f"{os.getpid()} {' '.join(str(i) for i in batch.index.tolist())}\n")
        return batch


@dataclass(frozen=True)
class Failing:
    """A transform that ends a worker, by a signal or an error, while there is a file `how` in the folder."""

    folder: Path

    def __call__(self, batch, moment):
        if multiprocessing.parent_process() is not None and (self.folder / "how").exists():
            if (self.folder / "how").read_text() == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("an odd batch")
        return batch


@dataclass(frozen=True)
class Slow:
    """A loss that lets others update the weights before its gradient is there."""

    inner: object
    seconds: float = 0.003

    def __call__(self, output, batch):
        time.sleep(self.seconds)
        return self.inner(output, batch)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.5)


def make(workers, *transforms, seconds=0.003, optimizer=momentum, alone=0.0):
    """A setup with batch norm, dropout, momentum, a schedule and a slow loss; and its data."""
    workload = tiny_cnn()
    setup = Schedule(kind="cosine")(Setup.of(workload, seed=SEED))
    training = replace(setup.training, transforms=transforms, loss=Slow(setup.training.loss, seconds))
    setup = replace(setup, training=training, optimizer=OptimizerSlot(optimizer))
    return (Hogwild(workers=workers, alone=alone)(setup) if workers else setup), workload.train


def seen(folder):
    """(process, examples of a batch), in the order in which they were noted."""
    rows = [[int(n) for n in line.split()] for line in (folder / "seen.txt").read_text().splitlines()]
    return [(row[0], row[1:]) for row in rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    setup, data = make(2, Noting(folder), seconds=0.05)
    fit(setup, data, epochs=EPOCHS, seed=SEED, checkpoint=folder / "kept", every=0.0)
