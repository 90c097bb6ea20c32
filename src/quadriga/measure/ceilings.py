"""What this machine reaches at best in PyTorch: products in three types, and copies of several sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from quadriga.core.products import LIMIT, matmul_precision, medium_error

SIZES = (256, 512, 1024)  # rows and columns of a square product
COPIES = (512_000, 4_000_000, 32_000_000, 256_000_000)  # bytes read and written: in a core's cache … beyond all of them
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches.

    Args:
        flops: operations a second of the best float32 product; a multiply and an add are two.
        bytes: bytes a second of a copy that no cache holds, read and written.
        products: operations a second by type: "default" is float32 as PyTorch multiplies unasked, "fp32" the best that is
            still float32, "bf16", "int8"; a type that the processor emulates has its low figure, one it lacks has None.
        copies: (bytes read and written, bytes a second), small to large.
        missing: why a product is None, or why a faster one is not counted, by type.
    """

    flops: float
    bytes: float
    products: Mapping[str, float | None] = field(default_factory=dict)
    copies: Sequence[tuple[int, float]] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**asdict(self), "copies": [list(pair) for pair in self.copies]}


@lru_cache(maxsize=8)
def ceilings(threads: int | None = None, seconds: float = 0.15, clock: Clock = time.perf_counter) -> Ceilings:
    """Measure the ceilings: square products of up to 1024 rows in each type, copies from 0.5 to 256 MB.

    They are the best that PyTorch reaches, not the data sheet's figures. A layer can still exceed them, as a convolution
    does that computes with fewer multiplications than are counted (Winograd).

    Args:
        threads: only a key: the figures hold for one thread count; None is the present one.
        seconds: for each of the four products, and for the copies together; smaller ones where the time is over.
        clock: in seconds.
    """
    missing: dict[str, str] = {}
    with torch.no_grad():
        default, best = _float32(seconds, clock, missing)
        products = {"default": default, "fp32": best}
        products["bf16"] = _tried(
            "bf16", lambda: _product(lambda n: _pair(n, torch.bfloat16), torch.mm, seconds, clock), missing
        )
        products["int8"] = _tried("int8", lambda: _int8(seconds, clock), missing)
        copies = tuple((size, size / _copy(size, seconds / len(COPIES), clock)) for size in COPIES)
    return Ceilings(best, copies[-1][1], products, copies, missing)


def _float32(seconds: float, clock: Clock, missing: dict[str, str]) -> tuple[float, float]:
    """PyTorch's default product; and the faster of it and oneDNN's, if that is float32 too."""
    with matmul_precision("highest"):
        default = _product(_pair, torch.mm, seconds, clock)
    if (error := medium_error()) > LIMIT:
        missing["fp32"] = f'the precision "medium" rounds here (error {error:.1g}) and is not counted'
        return default, default
    with matmul_precision("medium"):
        return default, max(default, _product(_pair, torch.mm, seconds, clock))


def _bf16(seconds: float, clock: Clock) -> float:
    return _product(lambda n: _pair(n, torch.bfloat16), torch.mm, seconds, clock)


def _int8(seconds: float, clock: Clock) -> float:
    """int8 × int8 → int32."""
    if not hasattr(torch, "_int_mm"):
        raise NotImplementedError("this PyTorch has no torch._int_mm")
    return _product(lambda n: _pair(n, torch.int8), torch._int_mm, seconds, clock)


def _tried(kind: str, measure: Callable[[], float], missing: dict[str, str]) -> float | None:
    try:
        return measure()
    except (NotImplementedError, RuntimeError) as error:
        missing[kind] = f"no product here: {str(error).splitlines()[0]}"
        return None


def _pair(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two matrices [size, size] with values that fit every type."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-50, 50, (size, size), generator=draw).to(dtype) for _ in range(2))
    return a, b


def _product(
    pair: Callable[[int], tuple[Tensor, Tensor]], multiply: Callable[[Tensor, Tensor], Tensor], seconds: float, clock: Clock
) -> float:
    """Operations a second of the best size; no larger one is tried that would overrun the time, as an emulated type does."""
    best = 0.0
    for size in SIZES:
        if best and 5 * 2 * size**3 / best > 2 * seconds:
            break
        a, b = pair(size)
        best = max(best, 2 * size**3 / _shortest(partial(multiply, a, b), seconds / len(SIZES), clock))
    return best


def _copy(moved: int, seconds: float, clock: Clock) -> float:
    """Seconds of a copy that reads and writes so many bytes."""
    source, target = torch.ones(moved // 8), torch.ones(moved // 8)  # half of them read, of four bytes each
    return _shortest(lambda: target.copy_(source), seconds, clock)


def _shortest(run: Callable[[], object], seconds: float, clock: Clock) -> float:
    """The shortest of at least five calls, after one that is not timed."""
    run()
    times: list[float] = []
    start = clock()
    while len(times) < 5 or clock() - start < seconds:
        before = clock()
        run()
        times.append(clock() - before)
    return min(times)
