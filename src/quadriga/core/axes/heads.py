"""Numbers of heads that a user's module keeps (`self.heads = 4`), which have to follow when whole heads are cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain, combinations

from torch import Tensor, nn

from quadriga.core.axes.groups import Group

Counts = dict[str, list[tuple[nn.Module, str, int]]]  # attribute → (module, attribute, new value), for all modules that have it
TRIES = 24  # of combinations; each traces the model again


def counts(model: nn.Module, choices: Mapping[Group, Tensor]) -> Counts:
    """Attributes that may count heads, or the features in them: whole numbers, multiples of the number of heads.

    Args:
        model: not cut yet.
        choices: group → units to keep.

    Returns:
        the new values, of the modules that hold a cut layer; names that speak of heads come first.
    """
    found: Counts = defaultdict(list)
    for group, keep in choices.items():
        widest = max((len(m.units) for m in group.members), default=0)
        for module in _holders(model, group) if group.split else ():
            for name, value in vars(module).items():
                if type(value) is int and group.size <= value <= widest and value % group.size == 0:
                    found[name].append((module, name, value // group.size * len(keep)))
    return dict(sorted(found.items(), key=lambda item: ("head" not in item[0], "dim" in item[0])))


def subsets(names: Mapping[str, object]) -> Iterator[tuple[str, ...]]:
    """None of them, each one, each two and each three, the first ones first.

    Example:
        >>> list(subsets({"heads": 4, "width": 16}))
        [(), ('heads',), ('width',), ('heads', 'width')]
    """
    every = chain.from_iterable(combinations(names, k) for k in range(4))
    return (found for _, found in zip(range(TRIES), every, strict=False))


def _holders(model: nn.Module, group: Group) -> list[nn.Module]:
    return [model.get_submodule(path) for path in dict.fromkeys(layer.rpartition(".")[0] for layer in group.layers)]
