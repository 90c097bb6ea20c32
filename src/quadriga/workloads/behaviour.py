"""What a model may not do in eval mode: draw random numbers, remember calls, mix examples, or write into what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from quadriga.core import rng
from quadriga.core.batch import Tree, call, copied, tensors, tree_map
from quadriga.core.errors import BadInput
from quadriga.workloads.calls import Watch, apart, differing, record, same

EXAMPLES = 8
NOISE = 1e-4  # of the magnitude: what another order of float32 sums may change
COARSE = 5e-2  # as NOISE, where products are taken in half precision or in integers
SHIFTED = 1e-3  # of the magnitude: a change of this size by the other examples of the batch is worth a note
MIXED = 5e-2  # of the magnitude: a change by more is no rounding, not even of half precision inside of a forward
COPIED = 2**28  # bytes of tensors that are copied to see whether somebody writes into them
STEADY = "let outputs depend on inputs and weights alone, if not self.training"


def well_behaved(model: nn.Module, inputs: Tree, notes: list[str]) -> None:
    """Look at a few calls of a model in eval mode; equal inputs and equal random numbers come first, then others.

    Args:
        model: in eval mode; may be changed by its own forward.
        inputs: some examples, of which a few are used.
        notes: gets what is worth knowing.

    Raises:
        BadInput: it writes into its inputs or buffers, depends on earlier calls, on random numbers or on other examples of
            the batch; with the module, and the line where one can be told.
    """
    few = tree_map(lambda t: t[:EXAMPLES], inputs)
    with torch.no_grad():
        first = _unwritten(model, few)
        _stateless(model, few, first)
        _certain(model, few, first)
        _by_rows(model, few, first, notes)
        _plain_attention(model, few, first, notes)


def _unwritten(model: nn.Module, inputs: Tree) -> Tree:
    """The output for the inputs, which must not be written into."""
    own = copied(inputs)
    with unwritten(own) as found:
        output = called(model, own)
    if found:
        refuse_writer(model, inputs)
    return output


@contextmanager
def unwritten(tree: Tree) -> Iterator[list[int]]:
    """Gives a list that afterwards holds the numbers of the tensors that were written into.

    Values are compared too, unless a copy of them takes much memory: then a write past autograd's eyes is missed.
    """
    small = sum(t.numel() * t.element_size() for t in tensors(tree)) <= COPIED
    kept, found = [(t, t._version, t.detach().clone() if small else None) for t in tensors(tree)], list[int]()
    yield found
    for number, (tensor, version, values) in enumerate(kept):
        if tensor._version != version or (values is not None and not same(tensor, values)):
            found.append(number)


def refuse_writer(model: nn.Module, inputs: Tree, mode: str = "") -> None:
    """Name the module and the line that writes into the inputs.

    Raises:
        BadInput: always.
    """
    watch = Watch(versions_and_values(own := copied(inputs)))
    with watch.on(model), torch.no_grad():
        called(model, own)
    layer = model.get_submodule(watch.path) if watch.path is not None else model
    what = f"{_spell(watch.path or '', layer)} changes the model's input in place{mode}{_at(watch.line)}"
    if getattr(layer, "inplace", False):
        raise BadInput(what, "give that layer inplace=False: else the data change while they are read")
    raise BadInput(what, "make a new tensor, as with x = x - mean instead of x.sub_(mean), or begin with x = x.clone()")


def only_read(who: str, run: Callable[..., Any], **given: Tree) -> Any:
    """What a loss or a metric gives, which may not write into what it is given, since others read it too.

    Raises:
        BadInput: it does; with the line, where one can be told.
    """
    with ExitStack() as stack:
        found = {name: stack.enter_context(unwritten(tree)) for name, tree in given.items()}
        result = run(**given)
    for name, numbers in found.items():
        if numbers:
            own = {k: tree_map(lambda t: t.detach().clone(), tree) for k, tree in given.items()}
            with Watch(versions_and_values(own[name])) as watch, torch.no_grad():
                run(**own)
            raise BadInput(f"{who} changes its {name} in place{_at(watch.line)}", f"begin with {name} = {name}.clone()")
    return result


def versions_and_values(tree: Tree) -> Callable[[], list[Any]]:
    """A function that tells whether tensors were written into, for `Watch`."""
    held = [t.detach() for t in tensors(tree)]  # of the same memory and version
    return lambda: [(t._version, t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for t in held]


def _stateless(model: nn.Module, inputs: Tree, first: Tree) -> None:
    """Refuse a model that remembers: buffers that change, or other outputs at a second call."""
    before = {name: (b, b._version, b.clone()) for name, b in model.named_buffers()}
    again = _fresh(model, inputs)
    for name, buffer in model.named_buffers():
        old, version, values = before.get(name, (None, 0, None))
        if values is None or buffer is not old or buffer._version != version or not same(buffer, values):
            raise BadInput(f"the model changes its buffer {name} in eval mode", "change buffers only if self.training")
    if _gap(first, again) > _noise(model):
        one, two = (record(model, lambda: _fresh(model, inputs)) for _ in range(2))
        where = _where(model, differing(one, two, _noise(model)))
        problem = f"the model gives other outputs at a second call in eval mode: {where} remembers earlier ones"
        raise BadInput(f"{problem}, or has a random generator of its own", STEADY)


def _certain(model: nn.Module, inputs: Tree, first: Tree) -> None:
    """Refuse a model that draws random numbers."""
    other = _fresh(model, inputs, 1)
    if all(same(a, b) for a, b in zip(tensors(first), tensors(other), strict=True)):
        return
    if _gap(first, other) <= _noise(model) and not _repeats(model, inputs, first, other):
        return  # rounding, by threads
    one, two = (record(model, lambda seed=seed: _fresh(model, inputs, seed)) for seed in (0, 1))  # type: ignore[misc]
    found = differing(one, two, 0.0)
    watch = Watch(lambda: hash(torch.get_rng_state().numpy().tobytes()))
    with watch.on(model, found):
        _fresh(model, inputs)
    problem = f"the model's outputs are random in eval mode: {_where(model, found)} draws random numbers{_at(watch.line)}"
    raise BadInput(problem, "draw only if self.training, as F.dropout(x, p, self.training) does, and use the mean otherwise")


def _repeats(model: nn.Module, inputs: Tree, first: Tree, other: Tree) -> bool:
    """Whether each seed gives its own bits again: then a small difference is no rounding."""
    pairs = ((first, _fresh(model, inputs)), (other, _fresh(model, inputs, 1)))
    return all(same(a, b) for one, two in pairs for a, b in zip(tensors(one), tensors(two), strict=True))


def _by_rows(model: nn.Module, inputs: Tree, whole: Tree, notes: list[str]) -> None:
    """Refuse a model whose output for an example depends on the others: its quality would hold at one batch size only."""
    count = len(tensors(inputs)[0])
    if count < 2:
        return
    alone = tree_map(lambda t: t[:1], inputs)
    pairs = zip(tensors(whole), tensors(_fresh(model, alone)), strict=True)
    found = max((_row_gap(a, b, count) for a, b in pairs), default=0.0)
    limit = max(MIXED, 4 * _noise(model))
    if found > limit:
        calls = record(model, lambda: _fresh(model, inputs)), record(model, lambda: _fresh(model, alone))
        path = differing(*calls, limit, rows=1)
        remedy = "let each example be computed by itself, if not self.training"
        if path and isinstance(model.get_submodule(path), _NormBase):
            remedy = "let it use running statistics in eval mode: track_running_stats=True"
        text = f"the output for an example depends on the others in its batch, by {found:.2g} of its magnitude"
        raise BadInput(f"{text}, first in {_where(model, path)}", remedy)
    if found > max(SHIFTED, 2 * _noise(model)):
        notes.append(f"the output for an example changes by {found:.2g} of its magnitude with the others in its batch")


def _plain_attention(model: nn.Module, inputs: Tree, first: Tree, notes: list[str]) -> None:
    """A note where PyTorch's fused attention, which `core.batch` turns off, gives other outputs: zeros at padded positions."""
    if not any(isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer) for m in model.modules()):
        return
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        found = _gap(first, _fresh(model, inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    if found > _noise(model):
        what = f"PyTorch's fused attention, which runs in eval mode only, gives outputs that are {found:.2g} apart"
        notes.append(f"{what}, since padded positions are read: scored and exported without it, as trained")


def _row_gap(whole: Tensor, alone: Tensor, count: int) -> float:
    """How far the first row is from what it is alone, over positions that both have: some models pad to the longest."""
    if whole.dim() != alone.dim() or not whole.dim() or len(whole) != count or len(alone) != 1 or not whole.is_floating_point():
        return 0.0
    common = tuple(slice(0, min(a, b)) for a, b in zip(whole.shape, alone.shape, strict=True))
    return apart(whole[common], alone[common])


def called(model: nn.Module, inputs: Tree, seed: int = 0) -> Tree:
    """The output under a seed of every usual generator of random numbers, which all have their state back afterwards."""
    with seeded(seed):
        return call(model, inputs)


def _fresh(model: nn.Module, inputs: Tree, seed: int = 0) -> Tree:
    return called(model, copied(inputs), seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's, NumPy's and Python's random numbers from a seed, for a while."""
    with rng.isolated():
        rng.seed_all(seed)
        yield


def _gap(one: Tree, two: Tree) -> float:
    a, b = tensors(one), tensors(two)
    return max((apart(x, y) for x, y in zip(a, b, strict=True)), default=0.0) if len(a) == len(b) else float("inf")


def _noise(model: nn.Module) -> float:
    """What rounding may change, by the coarsest type of the model's weights; integers are of a quantized one."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    quantized = any("quantized" in type(m).__module__ for m in model.modules())
    return COARSE if quantized or kinds & {torch.bfloat16, torch.float16} else NOISE


def _where(model: nn.Module, path: str | None) -> str:
    return _spell(path or "", model.get_submodule(path or ""))


def _spell(path: str, layer: nn.Module) -> str:
    return f"its layer {path} ({type(layer).__name__})" if path else f"the forward of {type(layer).__name__}"


def _at(line: str) -> str:
    return f" at {line}" if line else ""
