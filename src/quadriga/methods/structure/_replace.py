"""Put other layers in the place of single ones, where the model stands it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from quadriga.core.axes import Patch, Reference, check_interface
from quadriga.core.computed import computed
from quadriga.core.errors import NotApplicable
from quadriga.core.plain import plain_kind
from quadriga.core.setup import Setup

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Make = Callable[[str, Layer], nn.Module]
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def plain_layers(model: nn.Module, only: str = "*") -> Iterator[tuple[str, Layer]]:
    """Linear and convolution layers with one group whose parameters are not tied and not called for by two names.

    Those that compute more than their class in `torch.nn` are left: what takes their place would not.
    """
    names = [(n, m) for n, m in model.named_modules(remove_duplicate=False)]
    uses: dict[int, int] = {}
    for _, tensor in model.named_parameters(remove_duplicate=False):
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    for name, module in names:
        if not name or plain_kind(module, *KINDS) is None or getattr(module, "groups", 1) != 1:
            continue
        if all(uses[id(p)] == 1 for p in module.parameters()) and any(fnmatchcase(name, p.strip()) for p in only.split(",")):
            yield name, module


def kind_of(layer: Layer) -> type[Any]:
    """The class to build a layer's parts of: a subclass without a forward of its own may have another constructor."""
    return plain_kind(layer, *KINDS) or type(layer)


def replace_layers(setup: Setup, layers: Mapping[str, Layer], make: Make, said: str, kinds: str) -> Setup:
    """Replace each layer by what `make` gives for it, and take back what changes the model's interface.

    Args:
        layers: by name.
        make: (name, layer) → module; raises NotApplicable with the reason to leave the layer.
        said: how a refusal begins, such as "tucker pays in no layer".
        kinds: what was looked for, where there is nothing.

    Raises:
        NotApplicable: every layer stays.
    """
    model, example = setup.model, setup.context.example
    reference, done, reasons = Reference.of(model, example), 0, list[str]()
    for name, layer in layers.items():
        patch = Patch()
        try:
            patch.module(model, name, make(name, layer))
            check_interface(model, example, reference)
            done += 1
        except NotApplicable as error:
            patch.undo()
            reasons.append(error.reason if error.reason.startswith(name) else f"{name}: {error.reason}")
    if not done:
        raise NotApplicable(f"{said}: {'; '.join(reasons[:4]) or f'no {kinds} matches{computed(model)}'}")
    return replace(setup, model=model)
