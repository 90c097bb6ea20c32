"""A batch, and how models are called with one: tensors, tuples, dicts and ModelOutput alike."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Eval mode would send nn.TransformerEncoder through fused kernels over nested tensors. They leave zeros at padded positions,
# read packed weights that structure methods replace, and are in no export: models are called by their plain operations.
torch.backends.mha.set_fastpath_enabled(False)

Tree = Any  # a tensor, or a tuple, list or mapping of trees


@dataclass(frozen=True)
class Batch:
    """Examples along dimension 0 of every tensor.

    Args:
        inputs: what the model is called with: a tensor, a tuple (positional) or a dict (keywords).
        target: what the loss compares with, or None.
        index: [batch] int64, the examples' places in their split.
        weight: [batch] float, or None for ones.
        augmented: a transform has acted on it, so that `index` no longer tells its inputs.
        of: examples in the whole batch, where this is one process's part of it.
    """

    inputs: Tree
    target: Tree
    index: Tensor
    weight: Tensor | None = None
    augmented: bool = False
    of: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: str | torch.device) -> Batch:
        """The batch with every tensor on a device; the batch itself when all are there."""
        parts, device = (self.inputs, self.target, self.index, self.weight), torch.device(device)
        if all(t.device == device for t in tensors(parts)):
            return self
        inputs, target, index, weight = (to_device(part, device) for part in parts)
        return Batch(inputs, target, index, weight, self.augmented, self.of)


def rows(batch: Batch, here: slice) -> Batch:
    """Some examples of a batch."""
    inputs, target = (tree_map(lambda t: t[here], tree) for tree in (batch.inputs, batch.target))
    weight = None if batch.weight is None else batch.weight[here]
    return replace(batch, inputs=inputs, target=target, index=batch.index[here], weight=weight)


def call(model: Callable[..., Any], inputs: Tree) -> Tree:
    """Call a model: a tuple spreads as positional arguments, a mapping as keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


@contextmanager
def keeping_mode(model: nn.Module) -> Iterator[None]:
    """Afterwards each module has its own mode back.

    It is set by `train` and `eval` first: models that keep tensors from evaluation (LeViT its biases, with the graph or the
    fake values that they had) drop them then, and none may outlive a trace, a gradient or a change of weights.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        model.train()
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, with nothing that the model kept from an earlier one."""
    with keeping_mode(model):
        model.train()
        model.eval()
        yield


class Fields(dict[Any, Any]):
    """A dict whose entries are attributes too, and are counted by whole numbers, as in a `ModelOutput`.

    Example:
        >>> output = Fields(loss=None, logits=3)
        >>> output.logits, output["logits"], output[0]
        (3, 3, 3)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name}; it has {', '.join(map(str, self))}") from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key not in self:
            return [v for v in self.values() if v is not None][key]
        return super().__getitem__(key)


def named(tree: Tree) -> Mapping[str, Any] | None:
    """The entries of a mapping or a dataclass by name; None for another tree."""
    if isinstance(tree, Mapping):
        return tree
    if is_dataclass(tree) and not isinstance(tree, type):
        return Fields({f.name: getattr(tree, f.name) for f in fields(tree)})
    return None


def primary(output: Tree) -> Tensor:
    """The tensor that losses and metrics read: the output itself, its `logits`, or its first tensor with rows.

    Raises:
        TypeError: there is no tensor in it.

    Example:
        >>> primary({"loss": None, "logits": torch.ones(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    entries = named(output)
    if entries is not None and isinstance(entries.get("logits"), Tensor):
        return entries["logits"]
    found = candidates(output)
    if not found:
        raise TypeError(f"the model returned {type(output).__name__}, which holds no tensor")
    return next(iter(found.values()))


def candidates(output: Tree) -> dict[str, Tensor]:
    """The tensors on top of an output that may be its prediction, by name: those with rows, if any has.

    Example:
        >>> list(candidates({"loss": torch.tensor(1.0), "scores": torch.ones(2, 3)}))
        ['scores']
    """
    entries = named(output)
    if entries is None:
        entries = {str(k): v for k, v in enumerate(output)} if isinstance(output, tuple | list) else {}
    found = {str(k): v for k, v in entries.items() if isinstance(v, Tensor)}
    return {k: v for k, v in found.items() if v.dim()} or found


def tree_map(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply to every tensor of a tree; other leaves stay. Mappings become dicts, those with attributes `Fields`."""
    if isinstance(tree, Tensor):
        return function(tree)
    if (entries := named(tree)) is not None:
        mapped = {k: tree_map(function, v) for k, v in entries.items()}
        return mapped if type(tree) is dict else Fields(mapped)
    if isinstance(tree, tuple | list):
        parts = [tree_map(function, v) for v in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def storable(tree: Tree, left: list[str] | None = None, name: str = "") -> Tree:
    """The tree with None for what no export can hold, such as a cache; tensors, numbers and strings stay.

    Args:
        left: gets the name and the type of each of them.
        name: of the tree, for that.

    Example:
        >>> left = []
        >>> storable({"logits": 1, "past": object()}, left), left
        ({'logits': 1, 'past': None}, ['past (object)'])
    """
    if (entries := named(tree)) is not None:
        kept = {k: storable(v, left, f"{name}.{k}" if name else str(k)) for k, v in entries.items()}
        return kept if type(tree) is dict else Fields(kept)
    if isinstance(tree, tuple | list):
        parts = [storable(v, left, f"{name}[{k}]") for k, v in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if tree is None or isinstance(tree, Tensor | bool | int | float | str):
        return tree
    if left is not None:
        left.append(f"{name or 'output'} ({type(tree).__name__})")
    return None


def tensors(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def copied(tree: Tree) -> Tree:
    """The same tree in memory of its own: whoever writes into it changes nothing else. Containers keep their types.

    Example:
        >>> given = {"x": [torch.zeros(2)]}
        >>> copied(given)["x"][0].add_(1).tolist(), given["x"][0].tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, Batch):
        return replace(tree, **{name: copied(getattr(tree, name)) for name in ("inputs", "target", "index", "weight")})
    if isinstance(tree, Mapping):
        return _like(tree, {k: copied(v) for k, v in tree.items()})
    if isinstance(tree, tuple | list):
        made = [copied(v) for v in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    if is_dataclass(tree) and not isinstance(tree, type):
        other: Any = copy(tree)
        for field in fields(tree):
            object.__setattr__(other, field.name, copied(getattr(tree, field.name)))
        return other
    return copy(tree) if hasattr(tree, "__array__") else tree


def _like(given: Mapping[str, Any], parts: dict[str, Any]) -> Tree:
    """A mapping with other values; of those whose copy has a table of its own, the type is kept."""
    if type(given) is dict or not isinstance(given, dict | UserDict):
        return parts
    other = copy(given)
    for name, part in parts.items():
        other[name] = part
    return other


def resize(inputs: Tree, batch: int) -> Tree:
    """Inputs with exactly `batch` examples: cut, or repeated from the front."""

    def one(t: Tensor) -> Tensor:
        return t[:batch] if len(t) >= batch else t.repeat((-(-batch // len(t)),) + (1,) * (t.dim() - 1))[:batch]

    return tree_map(one, inputs)


def to_device(tree: Tree, device: str | torch.device) -> Tree:
    """Move every tensor; towards a GPU asynchronously where the memory is pinned. On the CPU the values are there."""
    ahead = torch.device(device).type != "cpu"  # a copy to the CPU that is not waited for may be read too early
    return tree_map(lambda t: t.to(device, non_blocking=ahead), tree)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer lives; the CPU when it has none."""
    for t in (*model.parameters(), *model.buffers()):
        return t.device
    return torch.device("cpu")
