"""Floating-point operations of a forward pass, as PyTorch's counter sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quadriga.core.batch import Tree, call, evaluating, resize

Shape = tuple[int, ...]


def flops(model: nn.Module, inputs: Tree, batch: int | None = 1) -> int:
    """FLOPs of one forward pass; a multiply and an add are two.

    Counted: convolutions, matrix products, attention, LSTM, GRU and RNN layers. Missed: activations, normalisation,
    pooling, softmax, embedding look-ups, element-wise and integer arithmetic, products inside custom kernels; for
    convolutional and transformer networks they are a few percent of the operations, though not of the time.
    PyTorch's own table counts neither attention nor recurrent layers on the CPU; the formulas here do.

    Args:
        model: called in eval mode without gradients, and left as it was.
        inputs: any inputs of the model.
        batch: inputs are cut or repeated to that many examples; None leaves them.

    Source: torch.utils.flop_counter.

    Example:
        >>> flops(nn.Linear(400, 120), torch.randn(5, 400))
        96000
    """
    inputs = inputs if batch is None else resize(inputs, batch)
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    with evaluating(model), _frozen(model), torch.no_grad(), counter:
        call(model, inputs)
    return int(counter.get_total_flops())


def formulas() -> dict[Any, Any]:
    """What PyTorch's counter lacks: recurrent layers and attention on the CPU."""
    aten = torch.ops.aten
    found = {"mkldnn_rnn_layer": _rnn_layer, "_scaled_dot_product_flash_attention_for_cpu": _attention}
    return {getattr(aten, name): formula for name, formula in found.items() if hasattr(aten, name)}


def _rnn_layer(x: Shape, weight_ih: Shape, weight_hh: Shape, *args: Any, **kwargs: Any) -> int:
    """x [steps, batch, inputs]; each step multiplies both weight matrices."""
    return 2 * x[0] * x[1] * (prod(weight_ih) + prod(weight_hh))


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """query [batch, heads, positions, width]; both products, whole even where a causal mask halves them."""
    b, h, s, d = query
    return 2 * b * h * s * key[-2] * (d + value[-1])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The counter asks for the gradient function of what a layer reads, and fails where that is a parameter (DeBERTa's)."""
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
