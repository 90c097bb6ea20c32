"""How exactly this machine multiplies float32 matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CUDNN: Any = torch.backends.cudnn
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
def products_kept() -> Iterator[None]:
    """However float32 products are set to be computed meanwhile, it is put back: matrices', and those of cuDNN."""
    precision, cudnn = torch.get_float32_matmul_precision(), cudnn_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if cudnn_precision() != cudnn:
            _set_cudnn(cudnn)


@contextmanager
def matmul_precision(precision: str, device: str = "cpu") -> Iterator[None]:
    """The process's float32 precision is `precision` meanwhile; it is put back.

    Args:
        precision: "highest", or "high" and "medium", which mean TF32 on a GPU.
        device: on a GPU, cuDNN's convolutions and recurrent layers are held to it too: PyTorch lets them round to TF32 from
            the start, whatever it is told of matrices.
    """
    with products_kept():
        torch.set_float32_matmul_precision(precision)
        if device != "cpu":
            CUDNN.allow_tf32 = precision != "highest"
        yield


def cudnn_precision() -> tuple[str, str]:
    """Of convolutions and of recurrent layers: "tf32", "ieee" or "none", which is float32."""
    return CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision


def _set_cudnn(wanted: tuple[str, str]) -> None:
    CUDNN.allow_tf32 = set(wanted) == {"tf32"}  # the older name first: PyTorch raises where the two disagree
    if cudnn_precision() != wanted:
        CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = wanted


def medium_error() -> float:
    """The error of this processor's products at the precision "medium", which goes through oneDNN."""
    with matmul_precision("medium"):
        return product_error(torch.matmul)
