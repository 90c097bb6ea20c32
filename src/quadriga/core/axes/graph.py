"""The axis graph of a model, and cutting units out of every weight, state and field that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from quadriga.core.axes import rules_layers, rules_maps, rules_parts, rules_shape  # noqa: F401  (they register the rules)
from quadriga.core.axes.derive import ELIDED, Derived, derive
from quadriga.core.axes.fields import refresh
from quadriga.core.axes.groups import Group, find_groups
from quadriga.core.axes.heads import Counts, counts, subsets
from quadriga.core.axes.interface import Reference, check_interface
from quadriga.core.axes.patch import Patch
from quadriga.core.axes.rewrite import settle
from quadriga.core.axes.trace import Traced, trace
from quadriga.core.axes.walk import Walk, op_name
from quadriga.core.batch import Tree
from quadriga.core.errors import NotApplicable


class AxisGraph:
    """The coupled axes of one model as it is now. After other changes of the structure, trace again.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = AxisGraph.trace(net, torch.randn(2, 4))
        >>> [(g.name, g.size, g.fixed) for g in graph.groups()]
        [('0', 8, ''), ('2', 2, "it is the model's output")]
        >>> _ = graph.cut("0", torch.arange(5))
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=5, bias=True)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=2, bias=True)
        )
    """

    def __init__(self, traced: Traced, example: Tree, reference: Reference) -> None:
        self.traced, self.example, self.reference = traced, example, reference
        self.model: nn.Module = traced.model
        self.walk = Walk(traced)
        self._groups = find_groups(self.walk, traced)

    @classmethod
    def trace(cls, model: nn.Module, example: Tree) -> AxisGraph:
        """Trace a model and couple its axes.

        Raises:
            NotApplicable: it cannot be traced (the reason names layer and line), or does not run at batch 1, 2 and 25.
        """
        reference = Reference.of(model, example)
        return cls(trace(model, example), example, reference)

    def groups(self) -> list[Group]:
        """All widths, fixed ones too, in the order of execution."""
        return list(self._groups)

    def group(self, name: str) -> Group:
        """The group of that name, or else the first that a layer of that name produces.

        Raises:
            KeyError: there is none.
        """
        found = [g for g in self._groups if g.name == name] or [g for g in self._groups if name in g.layers]
        if not found:
            raise KeyError(name)
        return found[0]

    def cut(self, group: Group | str, keep: Tensor) -> Patch:
        """Keep only these units of a group; see `cut_all`."""
        return self.cut_all({self.group(group) if isinstance(group, str) else group: keep})

    def cut_all(self, choices: Mapping[Group, Tensor]) -> Patch:
        """Cut several groups at once, in place, and check the interface.

        Args:
            choices: group → int64 units to keep, in any order.

        Returns:
            What was changed, so that it can be undone.

        Raises:
            NotApplicable: a group is fixed, nothing would be left, or the user's forward does not stand the
                change; then the model is as it was.
        """
        patch = Patch()
        numbers = counts(self.model, choices)
        try:
            self._cut(choices, patch)
            self._settle(choices, numbers, patch)
        except NotApplicable:
            patch.undo()
            raise
        return patch

    def cut_each(self, choices: Mapping[Group, Tensor]) -> tuple[Patch, list[str]]:
        """Cut all groups that can be cut: all at once, and if that fails, one after the other.

        Returns:
            what was changed, and for each group that could not be cut, the reason.

        Raises:
            NotApplicable: none could be cut.
        """
        return one_by_one(self.cut_all, choices)

    def check(self) -> None:
        """Raise NotApplicable unless outputs have the shapes that they had when this graph was traced."""
        check_interface(self.model, self.example, self.reference)

    def _settle(self, choices: Mapping[Group, Tensor], numbers: Counts, patch: Patch) -> None:
        """Where heads were cut, let the numbers that a module keeps of them follow: none, one, or as few as it takes."""
        split = next((group for group in choices if group.split), None)
        if split is None:
            settle(self, patch)
            return
        failure: NotApplicable | None = None
        for names in subsets(numbers):
            trial = Patch()
            for module, name, value in (entry for key in names for entry in numbers[key]):
                trial.attr(module, name, value)
            try:
                settle(self, trial)
                reason = f"{split.name} cannot lose whole parts: {split.split}, and the number stands in the code"
                self.confirm(derive(self.traced, self.walk), reason)
            except NotApplicable as error:
                trial.undo()
                failure = failure or error
            else:
                patch.then(trial)
                return
        assert failure is not None, "the first subset is the empty one"
        raise failure

    def confirm(self, derived: Derived, reason: str) -> None:
        """Trace again and raise NotApplicable unless every shape is the derived one: `unflatten(-1, (4, -1))` takes a
        narrower width too, but as four thinner heads instead of three, which no output shape would show.
        """
        now = trace(self.model, self.example)
        found = [tuple(n.meta["val"].shape) for n in now.graph.nodes if _one_tensor(n)]
        if found != derived.shapes:
            raise NotApplicable(reason)

    def _cut(self, choices: Mapping[Group, Tensor], patch: Patch) -> None:
        rows: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        for group, keep in choices.items():
            if group.fixed:
                raise NotApplicable(f"{group.name} has a fixed width: {group.fixed}")
            stays = torch.zeros(group.size, dtype=torch.bool)
            stays[keep.cpu()] = True
            for member in group.members:
                kept = (member.units < 0) | stays[member.units]
                if not kept.any():
                    raise NotApplicable(f"nothing of {member.names[0]} would be left")
                dims = rows.setdefault(id(member.tensor), (member.tensor, {}))[1]
                dims[member.dim] = kept & dims[member.dim] if member.dim in dims else kept
        before = {key: tuple(tensor.shape) for key, (tensor, _) in rows.items()}
        for tensor, dims in rows.values():
            value = tensor.data
            for dim, kept in dims.items():
                value = value.index_select(dim, kept.nonzero().flatten().to(value.device))
            patch.data(tensor, value)
        refresh(self.model, before, patch)


def _one_tensor(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and op_name(node) not in ELIDED


def one_by_one(change: Callable[[Mapping[Group, Tensor]], Patch], choices: Mapping[Group, Tensor]) -> tuple[Patch, list[str]]:
    """Change all groups at once, and where that is refused, those that can be, one after the other; see `cut_each`."""
    try:
        return change(choices), []
    except NotApplicable as error:
        if len(choices) == 1:
            raise
        failure = error
    good: dict[Group, Tensor] = {}
    reasons: list[str] = []
    for group, units in choices.items():
        try:
            change({**good, group: units}).undo()
            good[group] = units
        except NotApplicable as error:
            reasons.append(f"{group.name}: {error.reason}")
    if not good:
        raise NotApplicable("; ".join(reasons) or failure.reason)
    return change(good), reasons
