"""Networks that no method was written for, as small trained workloads; `benchmarks/zoo.py` puts structure methods on them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from networks import architectures, sequences, tables, vision, vision_more
from quadriga.core.workload import Workload
from quadriga.workloads import load

READY = ("lenet_fashion", "resnet20_fashion", "lstm_wordnet", "gpt_shakespeare", "mobilenetv2_fashion", "minilm_wordnet")


def ready(name: str) -> Workload:
    """A ready-made workload, taken for trained."""
    return replace(load(name), trained=True)


WORKLOADS = {
    **{name: partial(ready, name) for name in READY},
    **vision.WORKLOADS,
    **vision_more.WORKLOADS,
    **sequences.WORKLOADS,
    **tables.WORKLOADS,
    **architectures.WORKLOADS,
}
