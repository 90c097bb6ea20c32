"""Which module of a model, and which line of a user's code, does a thing: seen by hooks over its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quadriga.core.batch import Tree, tensors
from quadriga.workloads.place import here


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Args:
        path: its name, "" for the model itself.
        given, gave: tensors that went in and came out, as they were then.
    """

    path: str
    given: list[Tensor]
    gave: list[Tensor]


def apart(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |a|; infinite where shapes or NaNs differ, or whole numbers.

    Example:
        >>> apart(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]))
        0.25
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if same(a, b) or a.is_sparse or not a.numel():
        return 0.0 if same(a, b) or not a.numel() else float("inf")
    if not (a.is_floating_point() or a.is_complex()):
        return float("inf")
    equal = (a == b) | (a.isnan() & b.isnan())  # equal infinities too
    gap = torch.where(equal, 0, (a.to(torch.complex128) - b.to(torch.complex128)).abs())
    scale = torch.where(a.isfinite(), a.abs().double(), 0).max().clamp_min(1e-30)
    return float((gap.max() / scale).nan_to_num(float("inf")))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal shapes and values, NaN where there is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def record(model: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """The calls of all modules while something runs, in the order in which they end: inner ones first."""
    found: list[Call] = []
    entered: dict[str, list[list[Tensor]]] = {}

    def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.setdefault(path, []).append(_kept((args, kwargs)))

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Tree) -> None:
        found.append(Call(path, entered[path].pop(), _kept(output)))

    with _hooked(model, before, after):
        run()
    return found


def differing(one: Sequence[Call], two: Sequence[Call], limit: float, rows: int | None = None) -> str | None:
    """The innermost module that gave other outputs for equal inputs in its first call that did; None if none is found.

    Args:
        one, two: calls of the same model.
        limit: the largest difference that counts as none.
        rows: compare the first rows only.
    """
    for a, b in zip(one, two, strict=False):
        if a.path != b.path:
            return None
        if _gap(a.given, b.given, rows) <= limit < _gap(a.gave, b.gave, rows):
            return a.path
    return None


def _gap(a: Sequence[Tensor], b: Sequence[Tensor], rows: int | None) -> float:
    if rows is not None:
        a, b = ([t[:rows] if t.dim() else t for t in side] for side in (a, b))
    return max((apart(x, y) for x, y in zip(a, b, strict=True)), default=0.0) if len(a) == len(b) else float("inf")


class Watch(TorchFunctionMode):
    """Finds the first line, and the innermost module, that changes a state.

    Args:
        state: anything that can be compared.

    Attributes:
        line: "file.py:12", or "" where no operation of PyTorch in a user's file changed it.
        path: of the module; None if none did.
    """

    def __init__(self, state: Callable[[], Any]) -> None:
        super().__init__()
        self.state, self.line, self.path = state, "", None  # type: ignore[var-annotated]
        self.path: str | None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and look at the state before and after."""
        if self.line:
            return func(*args, **(kwargs or {}))
        before = self.state()
        output = func(*args, **(kwargs or {}))
        if self.state() != before:
            self.line = here()
        return output

    @contextmanager
    def on(self, model: nn.Module, path: str | None = None) -> Iterator[None]:
        """Watch the calls that are made meanwhile; lines only inside of one module where a path is given."""
        seen: dict[str, list[Any]] = {}
        inside = 0

        def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal inside
            seen.setdefault(name, []).append(self.state())
            if name == (path or ""):
                inside += 1
                if inside == 1:
                    self.__enter__()

        def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tree) -> None:
            nonlocal inside
            if name == (path or ""):
                inside -= 1
                if inside == 0:
                    self.__exit__(None, None, None)
            if self.state() != seen[name].pop() and self.path is None:
                self.path = name

        with _hooked(model, before, after):
            yield


@contextmanager
def _hooked(model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(before, path), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(tree: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors(tree)]
