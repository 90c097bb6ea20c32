"""How many threads compute."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Threads(Method):
    """Pin the number of CPU threads. A small model is faster on one: waking a second costs more than it saves.

    Args:
        count: from 1 to the machine's cores.

    Source: PyTorch, "CPU threading and TorchScript inference".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html"
    search: ClassVar = {"count": (1, 2, 4)}

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BadInput(f"threads.count is {self.count}", "give a positive integer, or leave the step out")

    def apply(self, setup: Setup) -> Setup:
        """Set the threads. NotApplicable on a machine with fewer cores, where they would take turns."""
        cores = os.cpu_count() or 1
        if self.count > cores:
            raise NotApplicable(f"{self.count} threads on {cores} cores take turns", f"use at most {cores}")
        return replace(setup, runtime=replace(setup.runtime, threads=self.count))
