"""Entropy-coded storage: the smallest files for the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup


@dataclass(frozen=True, kw_only=True)
class EntropyStorage(Method):
    """Store the exported model in one file whose weights are entropy-coded; they are decoded when it is loaded.

    Nothing is lost, and the speed stays. It is worth much where weights have few values (`cluster_weights`, `prune_weights`,
    `quantize_int8`), and little elsewhere: trained float weights have hardly any redundancy. Each tensor takes the smallest
    of a table of its values, a table for each of its bytes, and lzma.

    Source: Duda 2013, asymmetric numeral systems, arXiv:1311.2540; Han et al. 2016, Deep Compression, arXiv:1510.00149.
    """

    family = Family.HARDWARE
    common = True
    numerics = Numerics.EXACT
    source = "arXiv:1311.2540"
    search: ClassVar = {}

    def apply(self, setup: Setup) -> Setup:
        if setup.runtime.storage == "entropy":
            raise NotApplicable("the storage is entropy-coded already")
        return replace(setup, runtime=replace(setup.runtime, storage="entropy"))
