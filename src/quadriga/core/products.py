"""How exactly this machine multiplies float32 matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LIMIT = 1e-5  # float32 products of this size err by about 4e-7; bfloat16 ones by 4e-3


def product_error(multiply: Callable[[Tensor, Tensor], Tensor], size: int = 192) -> float:
    """‖multiply(a, b) − ab‖ / ‖ab‖ with ab in float64, for normal matrices [size, size].

    Example:
        >>> product_error(torch.matmul) < LIMIT < product_error(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
        True
    """
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(size, size, generator=draw), torch.randn(size, size, generator=draw)
    exact = a.double() @ b.double()
    return float((multiply(a, b).double() - exact).norm() / exact.norm())


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """The process's float32 precision is `precision` meanwhile; it is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def medium_error() -> float:
    """The error of this processor's products at the precision "medium", which goes through oneDNN."""
    with matmul_precision("medium"):
        return product_error(torch.matmul)
