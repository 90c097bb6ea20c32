"""Networks that no method was written for, as small trained workloads; `benchmarks/zoo.py` puts structure methods on them."""

from __future__ import annotations

from networks import architectures, sequences, tables, vision

WORKLOADS = {**vision.WORKLOADS, **sequences.WORKLOADS, **tables.WORKLOADS, **architectures.WORKLOADS}
