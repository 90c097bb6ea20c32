"""Which dimension of an output holds the classes: the second, as PyTorch has it, or the last."""

from __future__ import annotations

from collections.abc import Sequence

from quadriga.core.errors import BadInput

Shape = Sequence[int]
BOTH = "say which: Workload(classes_dim=1) for [n, classes, ...], Workload(classes_dim=-1) for [n, ..., classes]"


def class_dim(outputs: Shape, targets: Shape, given: int | None = None, *, soft: bool = False) -> int:
    """1 or −1: where the scores of classes are, of which each target picks one.

    Args:
        outputs: shape of the scores, the batch first.
        targets: shape of the class numbers, without that dimension; or of probabilities, which is the outputs'.
        given: 1 or −1 where the workload says it; None to tell it from the shapes.
        soft: targets are probabilities.

    Raises:
        BadInput: neither fits, or both do and nothing was given.

    Example:
        >>> class_dim((4, 21, 32, 32), (4, 32, 32)), class_dim((4, 10, 50), (4, 10)), class_dim((4, 3), (4,))
        (1, -1, -1)
    """
    outputs, targets = tuple(outputs), tuple(targets)
    fitting = [dim for dim in (-1, 1) if len(outputs) > 1 and targets == (outputs if soft else _without(outputs, dim))]
    if len(outputs) == 2:
        fitting = fitting[:1]  # they are the same dimension
        given = None if given is None else -1
    if given in fitting:
        assert given is not None
        return given
    if len(fitting) == 1 and given is None:
        return fitting[0]
    shapes = f"the labels have the shape {_spell(targets)}, the outputs {_spell(outputs)}"
    if fitting and given is None:
        raise BadInput(f"{shapes}, so the classes can be in the second dimension or in the last", BOTH)
    if fitting:
        raise BadInput(f"{shapes}, which does not go with classes_dim={given}", f"give classes_dim={fitting[0]}, or none")
    raise BadInput(shapes, _remedy(outputs, targets, given))


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:1], *shape[2:]) if dim == 1 else shape[:-1]


def _remedy(outputs: Shape, targets: Shape, given: int | None) -> str:
    """What makes one of them fit: a dimension of size one to take from labels or outputs; else the two forms that are read."""
    for name, shape in (("labels", targets), ("outputs", outputs)):
        for k in (k for k in range(1, len(shape)) if shape[k] == 1):
            less = (*shape[:k], *shape[k + 1 :])
            pair = (outputs, less) if name == "labels" else (less, targets)
            if len(pair[0]) > 1 and pair[1] in (_without(pair[0], 1), _without(pair[0], -1)):
                return f"drop the dimension of size 1, as with {name}.squeeze({k})"
    if len(outputs) == 2 and len(targets) == 1:
        return "return one row of class scores for each label"
    rest = "".join(f", {size}" for size in targets[1:])
    forms = {1: f"[n, classes{rest}]", -1: f"[n{rest}, classes]"}
    wanted = f"{forms[1]} or {forms[-1]}" if given is None and rest else forms[given or 1]
    return f"return {wanted} for such labels"


def _spell(shape: Shape) -> str:
    return f"[n{''.join(f', {size}' for size in shape[1:])}]"
