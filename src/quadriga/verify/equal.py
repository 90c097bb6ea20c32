"""Equal outputs: bit by bit for EXACT methods, within a tolerance by compute type for CLOSE ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quadriga.core.batch import Tree, named, resize
from quadriga.core.method import Numerics

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest error / largest magnitude of an output. Sums in another order cost about sqrt(layers · width) roundings of
2⁻²⁴ (float32), 2⁻¹¹ (tf32, float16) or 2⁻⁸ (bfloat16) each; the limits leave a factor of ten to a few."""


@dataclass(frozen=True)
class Equality:
    """Whether a model still gives the outputs it gave.

    Args:
        holds: for every output and batch size.
        numerics: "exact" or "close".
        compute: the compute type that set the tolerance.
        tolerance: largest error allowed, relative to the output's largest magnitude; 0 for "exact".
        max_abs: largest error.
        max_rel: largest error / the largest magnitude of that output.
        batches: sizes that were compared.
        failures: what was unequal, for people; empty if it holds.
    """

    holds: bool
    numerics: str
    compute: str
    tolerance: float
    max_abs: float
    max_rel: float
    batches: tuple[int, ...]
    failures: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON data; an infinite error is None."""
        data = asdict(self)
        return {k: None if v in (float("inf"),) else list(v) if isinstance(v, tuple) else v for k, v in data.items()}


def equal(
    reference: Callable[[Tree], Tree],
    candidate: Callable[[Tree], Tree],
    inputs: Tree,
    *,
    numerics: Numerics = Numerics.CLOSE,
    compute: str = "float32",
    batches: Iterable[int] = (1, 2, 64),
) -> Equality:
    """Compare two models output by output, on real inputs, at several batch sizes.

    An output is a tensor of the outputs tree; each is held to its own magnitude, so that a small one is not hidden by a
    large one. Integer and boolean outputs have to be equal; NaN and infinities have to be in the same places.

    Args:
        reference, candidate: inputs tree → outputs tree.
        inputs: real examples; cut or repeated to each batch size.
        numerics: EXACT (bit-equal) or CLOSE.
        compute: the coarsest type that products are computed in: "float64", "float32", "tf32", "float16", "bfloat16".
        batches: sizes to compare at; 1, 2 and the largest used.

    Raises:
        ValueError: numerics is CHANGED, which is judged by quality, or there is no such compute type.

    Example:
        >>> found = equal(lambda x: x, lambda x: x + 1e-3, torch.ones(3, 2))
        >>> found.holds, found.failures[0]
        (False, 'output at batch 1: error 0.001 is 0.001 of its magnitude, more than 0.0001')
    """
    if numerics is Numerics.CHANGED or compute not in TOLERANCE:
        raise ValueError(f"{numerics} with {compute} has no tolerance; judge it by quality")
    tolerance = 0.0 if numerics is Numerics.EXACT else TOLERANCE[compute]
    sizes, worst_abs, worst_rel, failures = tuple(dict.fromkeys(batches)), 0.0, 0.0, []
    for size in sizes:
        given = resize(inputs, size)
        with torch.no_grad():
            expected, found = dict(_named(reference(given))), dict(_named(candidate(given)))
        if expected.keys() != found.keys():
            failures.append(f"batch {size}: outputs are {sorted(found)} instead of {sorted(expected)}")
            worst_abs = worst_rel = float("inf")
        for name in expected.keys() & found.keys():
            error, relative, reason = _difference(expected[name], found[name], tolerance, numerics is Numerics.EXACT)
            worst_abs, worst_rel = max(worst_abs, error), max(worst_rel, relative)
            if reason:
                failures.append(f"{name} at batch {size}: {reason}")
    return Equality(not failures, str(numerics), compute, tolerance, worst_abs, worst_rel, sizes, tuple(failures))


def _named(tree: Tree, name: str = "output") -> list[tuple[str, Tensor]]:
    """Every tensor of a tree under a readable name."""
    if isinstance(tree, Tensor):
        return [(name, tree.cpu())]
    if (entries := named(tree)) is not None:
        return [pair for k, v in entries.items() for pair in _named(v, f"{name}.{k}")]
    if isinstance(tree, tuple | list):
        return [pair for i, v in enumerate(tree) for pair in _named(v, f"{name}[{i}]")]
    return []


def _difference(expected: Tensor, found: Tensor, tolerance: float, exact: bool) -> tuple[float, float, str]:
    """(absolute error, error / magnitude, what is wrong or "")."""
    if expected.shape != found.shape:
        return float("inf"), float("inf"), f"shape {list(found.shape)} instead of {list(expected.shape)}"
    if exact and expected.dtype != found.dtype:
        return float("inf"), float("inf"), f"type {found.dtype} instead of {expected.dtype}"
    if not expected.numel():
        return 0.0, 0.0, ""
    a, b = expected.double(), found.double()
    special = ~(a.isfinite() & b.isfinite())
    if not torch.equal(a[special].nan_to_num(), b[special].nan_to_num()) or not torch.equal(a.isnan(), b.isnan()):
        return (
            float("inf"),
            float("inf"),
            f"{int((~b.isfinite()).sum())} values are not finite, {int((~a.isfinite()).sum())} were",
        )
    error = float((a - b).masked_fill(special, 0).abs().max())
    magnitude = float(a.masked_fill(special, 0).abs().max())
    relative = error / magnitude if magnitude else (0.0 if error == 0 else float("inf"))
    limit = tolerance if expected.is_floating_point() else 0.0
    reason = f"error {error:.3g} is {relative:.3g} of its magnitude, more than {limit:g}" if relative > limit else ""
    if exact and not reason and not _same_bits(expected, found):
        reason = "bits differ (the sign of a zero, or the kind of a NaN)"
    return error, relative, reason


def _same_bits(a: Tensor, b: Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) if t.dtype is not torch.bool else t for t in (a, b)]
    return torch.equal(*flat)
