"""Compression that does not compress: zeros, masks and simulated integers that cost as much as before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

LARGE = 256  # smaller tensors are biases and norms; equal or zero ones among them mean nothing
MOSTLY = 0.3  # of a weight's entries
ALMOST = 0.9  # of what float32 takes


def fakes(
    model: nn.Module | None = None,
    baseline: nn.Module | None = None,
    *,
    bytes: int | None = None,
    baseline_bytes: int | None = None,
    bits: int = 32,
) -> list[dict[str, Any]]:
    """Findings that belie a claim of compression; an empty list is a clean bill.

    Args:
        model: the finished model, as it is exported; None to look at the bytes alone.
        baseline: what it came from; ties and zeros that it had already are not held against the model.
        bytes, baseline_bytes: of the files that each needs in order to run.
        bits: that a weight of the model is said to take.

    Returns:
        Rows {"kind", "where", "number", "text"}; kinds: "mask", "parametrization", "zeros", "fake_quant", "untied", "storage"
        (float weights in files that are said to hold integers), "bytes".

    Example:
        >>> layer = torch.nn.utils.prune.random_unstructured(nn.Linear(30, 30), "weight", amount=0.5)
        >>> [row["kind"] for row in fakes(layer)]
        ['mask', 'zeros']
    """
    found = []
    if model is not None:
        found += [*_masks(model), *_zeros(model, baseline), *_fake_quant(model), *_untied(model, baseline)]
        found += _storage(model, bytes, bits)
    if bytes is not None and baseline_bytes is not None and bytes >= baseline_bytes:
        text = f"the files take {bytes:,} bytes, the baseline's {baseline_bytes:,}"
        found.append(_finding("bytes", "", bytes / baseline_bytes, text))
    return found


@dataclass(frozen=True)
class Worth:
    """What the model gained over the unchanged one in the same runtime, as it was measured.

    Args:
        runtime: that executes both.
        smaller: share of the bytes that is gone; negative where there are more.
        faster: share of the speed that was won; None where nothing was timed.
    """

    runtime: str
    smaller: float
    faster: float | None = None

    def __str__(self) -> str:
        speed = "" if self.faster is None else f", {_percent(self.faster)} % {'slower' if self.faster <= -0.005 else 'faster'}"
        return f"{_percent(self.smaller)} % {'larger' if self.smaller <= -0.005 else 'smaller'}{speed} in {self.runtime}"


def _percent(share: float) -> str:
    return f"{abs(100 * share):.0f}"


def told(found: Sequence[Mapping[str, Any]], worth: Worth, storage: str = "plain") -> list[str]:
    """The findings as sentences of a report, zeros together, each with what the whole model has gained by measurement.

    Args:
        found: rows of `fakes`.
        worth: of the model.
        storage: "plain" or "entropy", which makes zeros cost few bytes.

    Example:
        >>> told([{"kind": "zeros", "where": "fc.weight", "number": 0.9}], Worth("onnxruntime", 0.0, 0.0))
        ['zeros (90% of fc.weight) are multiplied by all the same: 0 % smaller, 0 % faster in onnxruntime']
        >>> str(Worth("eager", -0.251))
        '25 % larger in eager'
    """
    lines = [f"compression that does not compress: {row['text']}: {worth}" for row in found if row["kind"] != "zeros"]
    zeros = ", ".join(f"{row['number']:.0%} of {row['where']}" for row in found if row["kind"] == "zeros")
    coded = " (bytes by entropy coding)" if storage == "entropy" else ""
    return [*lines, *([f"zeros ({zeros}) are multiplied by all the same: {worth}{coded}"] if zeros else [])]


def _finding(kind: str, where: str, number: float, text: str) -> dict[str, Any]:
    return {"kind": kind, "where": where, "number": number, "text": text}


def _masks(model: nn.Module) -> list[dict[str, Any]]:
    """Pruning masks and parametrizations still in force: the dense weight is kept beside what hides it."""
    rows = []
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                mask = getattr(module, f"{hook._tensor_name}_mask", torch.ones(1))
                share = float((mask == 0).float().mean())
                rows.append(
                    _finding("mask", _at(name), share, f"{_at(name)} hides {share:.0%} of {hook._tensor_name} by a mask")
                )
        if parametrize.is_parametrized(module):
            kinds = ", ".join(type(p).__name__ for listed in module.parametrizations.values() for p in listed)
            count = len(module.parametrizations)
            rows.append(_finding("parametrization", _at(name), count, f"{_at(name)} is computed anew at each call by {kinds}"))
    return rows


def _zeros(model: nn.Module, baseline: nn.Module | None) -> list[dict[str, Any]]:
    """Weights that are mostly zero and as large as before: a dense kernel multiplies by every one of them."""
    before = dict(_weights(baseline)) if baseline is not None else {}
    rows = []
    for name, weight in _weights(model):
        share, had = _zero_share(weight), _zero_share(before[name]) if name in before else 0.0
        if share > MOSTLY and share > had + 0.1:
            text = f"{share:.0%} of {name} {list(weight.shape)} are zeros, which dense kernels multiply by all the same"
            rows.append(_finding("zeros", name, share, text))
    return rows


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights as the forward pass sees them, under their plain names."""
    found = {}
    for name, module in model.named_modules():
        names = {*module._parameters, *(k for k in vars(module) if isinstance(vars(module)[k], Tensor))}
        for key in sorted(names):
            value = getattr(module, key)
            if value is not None and value.dim() > 1 and value.numel() >= LARGE and f"{key}_mask" not in names:
                found[f"{name}.{key}".lstrip(".")] = value.detach()
    return [(k, v) for k, v in found.items() if not (k.endswith("_orig") and k.removesuffix("_orig") in found)]


def _zero_share(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def _fake_quant(model: nn.Module) -> list[dict[str, Any]]:
    """Modules that round to integers and go on in float: as slow and as large as before, or more so."""
    names = [n for n, m in model.named_modules() if any(w in type(m).__name__ for w in ("FakeQuant", "TensorQuantizer"))]
    graphs = [m.graph for m in model.modules() if isinstance(m, torch.fx.GraphModule)]
    names += [node.name for graph in graphs for node in graph.nodes if "fake_quantize" in str(node.target)]
    if not names:
        return []
    text = f"{len(names)} places simulate integers in float, such as {_at(names[0])}; convert them before export"
    return [_finding("fake_quant", _at(names[0]), len(names), text)]


def _storage(model: nn.Module, bytes: int | None, bits: int) -> list[dict[str, Any]]:
    """Files as large as float32 weights, though a weight is said to take fewer bits."""
    count = sum(p.numel() for p in model.parameters())
    if bytes is None or bits >= 32 or not count or bytes < ALMOST * 4 * count:
        return []
    text = f"weights are said to take {bits} bits, and the files hold {8 * bytes / count:.0f} for each of {count:,}"
    return [_finding("storage", "", 8 * bytes / count, text)]


def _untied(model: nn.Module, baseline: nn.Module | None) -> list[dict[str, Any]]:
    """Weights that hold the same numbers twice. With a baseline only the ties that it has and the model lost."""
    tied = _groups(baseline, by_memory=True) if baseline is not None else None
    rows = []
    for names, weight in _groups(model, by_memory=False).items():
        if tied is None or any(set(names) & set(group) and len(set(names) & set(group)) > 1 for group in tied):
            extra = (len(names) - 1) * weight.numel() * weight.element_size()
            rows.append(_finding("untied", names[0], extra, f"{' and '.join(names)} are equal but stored {len(names)} times"))
    return rows


def _groups(model: nn.Module, by_memory: bool) -> dict[tuple[str, ...], Tensor]:
    """Names of large parameters that share memory; or that are equal without sharing it."""
    groups: dict[Any, list[tuple[str, Tensor]]] = defaultdict(list)
    seen: set[int] = set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.numel() < LARGE or (not by_memory and weight.data_ptr() in seen):
            continue
        seen.add(weight.data_ptr())
        content = (tuple(weight.shape), weight.dtype, float(weight.detach().double().sum()))
        groups[weight.data_ptr() if by_memory else content].append((name, weight))
    alike = (g for g in groups.values() if len(g) > 1 and all(torch.equal(g[0][1], w) for _, w in g) and g[0][1].any())
    return {tuple(name for name, _ in group): group[0][1].detach() for group in alike}


def _at(name: str) -> str:
    return name or "the model"
