"""The axis graph: which axes of which weights and states change together when one width changes.

`AxisGraph.trace(model, example)` exports the model once and reads couplings off the graph; `groups()` lists the
widths; `cut` removes units from one of them, in place, in every weight, state and field, and then proves at batch
1, 2 and 25 that the model's interface is what it was. Files: `trace` (torch.export), `units` (union-find over single
channels), `walk` and `rules_*` (how each operator couples axes), `groups` and `graph` (widths, cutting), `derive`,
`rewrite` and `follow` (shape constants in the user's code), `interface` (the check), `opened` (attention whose
projections are packed), `kernels`, `chain`, `importance` (what structure methods share).
"""

from quadriga.core.axes.graph import AxisGraph
from quadriga.core.axes.groups import Group, Member, select
from quadriga.core.axes.interface import Reference, check_interface
from quadriga.core.axes.opened import opened
from quadriga.core.axes.patch import Patch, keep_frozen, replace_module

__all__ = [
    "AxisGraph", "Group", "Member", "Patch", "Reference",
    "check_interface", "keep_frozen", "opened", "replace_module", "select",
]  # fmt: skip
