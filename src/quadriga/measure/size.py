"""Parameters and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from quadriga.core.errors import BadInput


def parameters(model: nn.Module) -> int:
    """Number of parameters; one that is used in two places counts once.

    Example:
        >>> embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        >>> head.weight = embed.weight
        >>> parameters(nn.Sequential(embed, head))
        40
    """
    return sum(p.numel() for p in _distinct(model.parameters()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory, shared storage once.

    Example:
        >>> weight_bytes(nn.Linear(4, 2))
        40
    """
    return sum(t.numel() * t.element_size() for t in _distinct((*model.parameters(), *model.buffers())))


def _distinct(given: Iterable[Tensor]) -> list[Tensor]:
    """Without the tensors that are the same memory under another name."""
    seen: dict[object, Tensor] = {}
    for t in given:
        seen.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else id(t), t)
    return list(seen.values())


def file_bytes(paths: Iterable[str | Path]) -> int:
    """Bytes of files together; a folder counts with everything in it, a file named twice once.

    Raises:
        BadInput: one does not exist.
    """
    files: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path} does not exist", "check the path")
        files |= {p.resolve() for p in path.rglob("*") if p.is_file()} if path.is_dir() else {path.resolve()}
    return sum(p.stat().st_size for p in files)
