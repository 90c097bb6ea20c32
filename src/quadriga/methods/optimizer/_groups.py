"""Which parameters decay, and which are matrices between hidden units: told by the modules that own them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from quadriga.core.norms import NORMS

TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Roles:
    """A model's trainable parameters, each once, in the order of the model.

    Args:
        matrices: weights of two dimensions, and kernels, between hidden units.
        outputs: the weight of the last linear layer in the order of modules; tied to an embedding, it is here alone.
        others: further weights of more than one dimension.
        tables: weights of embeddings.
        vectors: biases, and everything in norms: parameters of at most one dimension, or of a norm's module.
        all: every one.
    """

    matrices: list[nn.Parameter]
    outputs: list[nn.Parameter]
    others: list[nn.Parameter]
    tables: list[nn.Parameter]
    vectors: list[nn.Parameter]
    all: list[nn.Parameter]


def roles(model: nn.Module) -> Roles:
    """Sort a model's trainable parameters; those of a parametrization count as the parameter that they make.

    Example:
        >>> found = roles(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)))
        >>> [len(part) for part in (found.matrices, found.outputs, found.others, found.tables, found.vectors)]
        [1, 1, 0, 0, 4]
    """
    found = Roles([], [], [], [], [], [])
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    uses: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            uses.setdefault(p, []).append(name)
    found.all.extend(uses)
    for p, names in uses.items():
        owners = [_owner(name) for name in names]
        modules = [model.get_submodule(owner) for owner in owners]
        if p.dim() <= 1 or any(isinstance(m, NORMS) for m in modules):
            found.vectors.append(p)
        elif linears and linears[-1] in owners:
            found.outputs.append(p)
        elif any(isinstance(m, TABLES) for m in modules):
            found.tables.append(p)
        elif not p.is_complex() and (p.dim() == 2 or any(isinstance(m, _ConvNd) for m in modules)):
            found.matrices.append(p)
        else:
            found.others.append(p)
    return found


def _owner(name: str) -> str:
    """The module whose parameter this is, or is the original of."""
    if name.startswith("parametrizations."):
        return ""
    before, found, _ = name.partition(".parametrizations.")
    return before if found else name.rpartition(".")[0]
