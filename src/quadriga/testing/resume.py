"""Training that is broken off under one plan and continued under another.

    torchrun --standalone --nproc-per-node 2 -m quadriga.testing.resume FOLDER=PLAN:STOP …

trains the small GPT by AdamW with clipping and an average of the weights, and breaks off behind STOP steps, or goes on to the
end of what the folder holds. With FOLDER=PLAN:STOP! the last rank kills itself there, once, and torchrun starts all again.
`losses(folder)` are those of a finished run.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from quadriga.core.recipe import Step, step
from quadriga.core.slots import Hook
from quadriga.parallel import group
from quadriga.testing.ranks import DDP, EMA, FSDP, PP, STEPS, TP, network, setup_of
from quadriga.train.checkpoint import read_state
from quadriga.train.loop import fit

PLANS: dict[str, tuple[Step, ...]] = {
    "one": (),
    "ddp": (DDP,),
    "fsdp": (FSDP,),
    "tp": (TP,),
    "dp × tp": (DDP, TP),
    "pp": (PP,),
    "pp × fsdp": (PP, FSDP),
}
MORE = (step("optimizer", kind="adamw", lr=0.001), step("clip_gradients", limit=0.5), EMA)


class Broken(Exception):
    """Training was broken off on purpose."""


class Breaks(Hook):
    """Ends training in a step, counted from 1 (0: never), or kills this process there.

    Args:
        stop: the step.
        marker: is written by who is about to be killed; where it exists nobody is. None: raise `Broken`.
    """

    spreads = True

    def __init__(self, stop: int, marker: Path | None = None) -> None:
        self.left, self.marker = stop, marker

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Count down. The state behind the step before is saved by then."""
        self.left -= 1
        if self.left == 0 and self.marker is None:
            raise Broken
        if self.left == 0 and group.rank() == torch.distributed.get_world_size() - 1 and not self.marker.exists():
            self.marker.write_text(f"rank {group.rank()}, process {os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, plan: str, stop: int = 0, kill: bool = False) -> None:
    """Ten steps, or so many and a break, with a checkpoint behind each."""
    marker = killed(folder) if kill else None
    setup, task = setup_of("gpt", (*PLANS[plan], *MORE)), network("gpt")
    hooks = (*setup.training.make_hooks, lambda model: Breaks(stop + 1 if stop else 0, marker))
    setup = replace(setup, training=replace(setup.training, make_hooks=hooks))
    fit(setup, task.train, epochs=STEPS * task.batch_size / len(task.train), seed=0, checkpoint=folder, every=0)


def killed(folder: Path) -> Path:
    """The file that says who was killed."""
    return folder.with_name(f"{folder.name}.killed")


def losses(folder: Path) -> list[float]:
    """Of all steps of a finished run."""
    state = read_state(folder)
    assert state is not None and state.extra["finished"]
    return list(state.extra["recent"])


def main(*jobs: str) -> int:
    """Carry out all jobs in turn."""
    torch.set_num_threads(1)
    group.join()
    for job in jobs:
        folder, _, rest = job.partition("=")
        plan, _, stop = rest.partition(":")
        try:
            train(Path(folder), plan, int(stop.rstrip("!") or 0), stop.endswith("!"))
        except Broken:
            if not stop:
                raise
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
