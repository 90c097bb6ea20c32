"""Weights that training has to keep in a form: zeros, or a few shared values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch
from quadriga.core.computed import computes_weight
from quadriga.core.slots import Hook

Keep = Callable[[Tensor], Tensor]  # a weight after a step → the weight in its form


def weights(model: nn.Module, only: str = "*", embeddings: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices, kernels and tables, each once, by the name of its first use; biases and norms are left.

    So are layers that compute their weight, by weight_norm or a mask: their parameters are not what is multiplied.

    Args:
        only: layers: globs of names, comma-separated.
        embeddings: whether tables that indices look rows up in are given too.
    """
    results = {name for name, module in model.named_modules() if computes_weight(module)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for name, p in model.named_parameters():
        layer = name.rpartition(".")[0]
        table = id(p) in tables and not embeddings
        if p.dim() < 2 or not p.is_floating_point() or table or layer in results or ".parametrizations." in name:
            continue
        if any(fnmatchcase(layer, glob.strip()) for glob in only.split(",")):
            yield name, p


class Hold(Hook):
    """Brings weights back into their form after each step, and at the end of training."""

    def __init__(self, model: nn.Module, forms: Mapping[str, Keep]) -> None:
        named = dict(model.named_parameters())
        self.held = [(named[name], keep) for name, keep in forms.items() if name in named]

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Project every held weight."""
        with torch.no_grad():
            for p, keep in self.held:
                p.copy_(keep(p))

    def end(self, model: nn.Module, data: Iterable[Batch]) -> None:
        """Once more, in case another hook changed weights at the end."""
        self.after_step(model, 1.0)
