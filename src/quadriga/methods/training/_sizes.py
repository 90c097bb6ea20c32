"""Images of other sizes: shrinking them, and whether a model takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Tree, call, evaluating, keeping_mode, tensors, tree_map

Size = tuple[int, int]


@lru_cache(maxsize=64)
def shares(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[new, old]: how much of new pixel i is covered by each old pixel; rows add up to 1.

    Example:
        >>> shares(3, 2, torch.device("cpu"), torch.float32).mul(3).tolist()
        [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
    """
    edges, pixels = torch.arange(new + 1, dtype=torch.float64) * old / new, torch.arange(old, dtype=torch.float64)
    right, left = torch.minimum(edges[1:, None], pixels + 1), torch.maximum(edges[:-1, None], pixels)
    return ((right - left).clamp_min(0) * new / old).to(device, dtype)


def shrunk(images: Tensor, size: Size) -> Tensor:
    """Images [..., height, width] at a smaller size, each new pixel the mean of the area that it covers.

    Two matrix products: at 32×32 they take 0.3 to 0.5 of the time of bilinear or area interpolation, which for fractional
    factors are no exact means, and at 64×64 0.65 to 0.86 of the former.
    """
    down, across = (shares(old, new, images.device, images.dtype) for old, new in zip(images.shape[-2:], size, strict=True))
    return down @ images @ across.T


def is_image(t: Tensor) -> bool:
    """Whether a tensor of the inputs is float, [batch, channels, height, width]."""
    return t.dim() == 4 and t.is_floating_point()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, buffers (as of batch norm) and the global generator are afterwards what they were."""
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.copy_(value)


def outputs(model: nn.Module, inputs: Tree) -> list[tuple[int, ...]]:
    """Shapes of a model's outputs."""
    output = call(model, inputs)
    return [tuple(t.shape) for t in tensors(dict(output) if hasattr(output, "keys") else output)]


def obstacle(model: nn.Module, inputs: Tree, size: Size) -> str | None:
    """What keeps a model from images of another size, in training or in evaluation mode, in words; None if nothing does."""
    other = tree_map(lambda t: shrunk(t, size) if is_image(t) else t, inputs)
    for training in (True, False):
        with buffers_kept(model), keeping_mode(model) if training else evaluating(model):
            model.train(training)
            expected = outputs(model, inputs)
            path: list[str] = []
            try:
                with followed(model, path):
                    found = outputs(model, other)
            except Exception as error:  # whatever a user's network raises
                return f"{place(model, path)} does not take images of {size[0]}×{size[1]}: {first_line(error)}"
            if found != expected:
                return f"on images of {size[0]}×{size[1]} the outputs are {found}, not {expected}"
    return None


@contextmanager
def followed(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Note the layers that begin and end in a call: "+name" and "-name"."""

    def note(mark: str) -> Any:
        return lambda *_: path.append(mark)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(note(f"+{name}")).remove)
                stack.callback(module.register_forward_hook(note(f"-{name}")).remove)
        yield


def place(model: nn.Module, path: list[str]) -> str:
    """The innermost layer that began and did not end; or where in the model's own code, behind the last one that ended.

    Example:
        >>> place(nn.Sequential(nn.ReLU()), ["+0", "-0"])
        'Sequential behind the layer 0'
    """
    opened: list[str] = []
    for mark in path:
        opened.append(mark[1:]) if mark[0] == "+" else opened.remove(mark[1:])
    if opened and path[-1] == f"+{opened[-1]}":
        return f"the layer {opened[-1]}"
    name = opened[-1] if opened else type(model).__name__
    return f"{name} behind the layer {path[-1][1:]}" if path else name


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
