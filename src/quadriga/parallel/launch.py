"""Start the ranks: torchrun around the same command, and what its processes tell the one that waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from quadriga.core import world
from quadriga.core.errors import BadInput

TOLD = "QUADRIGA_TOLD"  # names the file in which a rank says how it ended, for good
# each life of the ranks gets a store of its own: with the shared one 14 of 23 restarts worked, without it 20 of 20
RELIABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def command(words: Sequence[str], nproc: int, restarts: int, module: str = "quadriga") -> list[str]:
    """torchrun on this machine around a module and its words.

    Example:
        >>> command(["train", "w"], 2, 3)[2:-2]
        ['torch.distributed.run', '--standalone', '--nproc-per-node=2', '--max-restarts=3', '-m', 'quadriga']
    """
    options = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", module, *words]


def environment(nproc: int, environ: Mapping[str, str]) -> dict[str, str]:
    """For torchrun: restarts that work, and the processor's threads shared out."""
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    return {"OMP_NUM_THREADS": threads, **environ, **RELIABLE}


def launch(words: Sequence[str], nproc: int, restarts: int = 3) -> int:
    """Run a command in so many ranks and wait for them; the exit status that they ended with.

    A rank that dies takes the others along, and all start again, at most `restarts` times. One that refuses its input is
    not started again.

    Raises:
        BadInput: a number is out of range.
    """
    if nproc < 1:
        raise BadInput(f"--nproc is {nproc}", "give a positive number of processes")
    if restarts < 0:
        raise BadInput(f"--restarts is {restarts}", "give 0 or more")
    with tempfile.TemporaryDirectory(prefix="quadriga-") as folder:
        told = Path(folder) / "status"
        env = {**environment(nproc, os.environ), TOLD: str(told)}
        process = subprocess.Popen(command(words, nproc, restarts), env=env)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        return int(told.read_text()) if told.exists() else code and 1


def tell(status: int) -> bool:
    """Say how the command ended, if nobody did; whether this process is the one that speaks for all.

    It is where there is only one, and under a torchrun of the user's in every rank.
    """
    if not (told := os.environ.get(TOLD)) or world.found().size == 1:
        return True
    try:
        with open(told, "x") as file:
            file.write(str(status))
    except FileExistsError:
        return False
    return True


def over() -> bool:
    """Whether a rank said in an earlier life that the command is over, so that there is nothing to start again."""
    return bool(told := os.environ.get(TOLD)) and Path(told).exists()
