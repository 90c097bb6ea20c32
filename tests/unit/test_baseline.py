"""What a study waits for before it searches, on an engine whose answers are made up."""

from __future__ import annotations

import pytest
from made_up import Engine

from quadriga import methods
from quadriga.core.metric import Floor
from quadriga.core.recipe import Recipe
from quadriga.engine.store import Store
from quadriga.search.space import Space
from quadriga.stages.baseline import measure_baseline
from quadriga.stages.opening import _for_search
from quadriga.stages.state import NothingToFind, Options, Study
from quadriga.testing import tiny_mlp

WHY = "the model branches on the values of its input"


class Late(Engine):
    """Answers everything at once but the export, which comes last and is refused."""

    def wait(self, timeout):
        if not self.queue:
            return None
        self.queue.sort(key=lambda order: order.task == "export")
        order = self.queue.pop(0)
        self.done.append(order.task)
        if order.task == "export":
            return order.number, {"status": "refused", "reason": WHY, "info": {"remedy": "use torch.where"}}
        values = {"quality": 90.0, "bytes": 400.0, "seconds": 1.0, "samples": 96.0, "parameters": 10.0, "step": 0.01}
        speeds = {f"speed/{b}": 1.0 for b in order.args.get("batches", ())}
        return order.number, {"status": "complete", "values": values | speeds, "info": {}}


def test_no_search_begins_before_the_export_has_answered(tmp_path):
    """On a busy machine the baseline of a small model is trained before the first export has come back."""
    with Store(tmp_path) as store:
        cards = {c["name"]: {**_for_search(c, ()), "unsearched": ""} for c in methods.cards()}
        space = Space(cards, frozenset({"FLOAT_WEIGHTS"}), Recipe(), frozenset({"hardware"}))
        options = Options(Floor.parse("-20pt"), families=("hardware",))
        study = Study(tiny_mlp(), options, tmp_path, store, Late(workers=2), space, lambda event: None)
        with pytest.raises(NothingToFind, match=f"no runtime can execute the model: {WHY}") as end:
            measure_baseline(study)
        assert end.value.remedy == "use torch.where"
        assert study.engine.done[-1] == "export" and "train" in study.engine.done
