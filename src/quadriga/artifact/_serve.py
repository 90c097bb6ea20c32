"""An artifact as its user runs it: `python -P -B _serve.py FOLDER`, a process that knows `load.py` and nothing of Quadriga.

Frames on its standard input hold the tensors of a batch; each is answered by a frame with those of the outputs. The first frame
that it sends says that the artifact is loaded, its files and probes checked. An error is a frame too, the last one.
"""

from __future__ import annotations

import os
import sys
from importlib import util
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

TENSORS, ERROR = b"t", b"e"  # what a frame holds
LENGTH = 8  # bytes of a frame's length, behind its kind


def send(sink: IO[bytes], tensors: list[Tensor]) -> None:
    """Write tensors as one frame, in safetensors: no code can hide in it."""
    own = (t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in tensors)  # it refuses shared memory
    _frame(sink, TENSORS, save({str(i): t for i, t in enumerate(own)}))


def complain(sink: IO[bytes], error: BaseException) -> None:
    """Write an error as one frame."""
    _frame(sink, ERROR, f"{type(error).__name__}: {error}".encode())


def receive(source: IO[bytes]) -> list[Tensor] | str | None:
    """The next frame's tensors, or its error; None when the other side has gone."""
    head = source.read(1 + LENGTH)
    if len(head) < 1 + LENGTH:
        return None
    size = int.from_bytes(head[1:])
    body = source.read(size)
    if len(body) < size:
        return None
    if head[:1] == ERROR:
        return body.decode(errors="replace")
    named = load(body)
    return [named[str(i)] for i in range(len(named))]


def _frame(sink: IO[bytes], kind: bytes, body: bytes) -> None:
    sink.write(kind + len(body).to_bytes(LENGTH))
    sink.write(body)
    sink.flush()


def _loader(folder: Path) -> Any:
    """The folder's own `load.py`, imported by its path."""
    spec = util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(folder: Path, source: IO[bytes], sink: IO[bytes]) -> int:
    """Load, say so, and answer until the other side has gone; the exit status."""
    try:
        loader = _loader(folder)
        run = loader.load(folder)
        entry = loader.read_entry(folder)
        send(sink, [])
        while (leaves := receive(source)) is not None:
            assert not isinstance(leaves, str)
            send(sink, loader.flatten(entry["outputs"], run(loader.rebuild(entry["inputs"], leaves))))
    except BaseException as error:
        complain(sink, error)
        return 1
    return 0


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the model or its runtime prints must not mix with the replies
    sys.exit(serve(Path(sys.argv[1]), sys.stdin.buffer, replies))
