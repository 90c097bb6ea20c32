"""What a model reached on a split, example by example, and its file."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quadriga.core.batch import Tree, tensors
from quadriga.core.errors import BadInput
from quadriga.core.files import atomic_write
from quadriga.measure.tree import flatten, unflatten

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What one model reached on one split.

    Args:
        values: [n] per example, unscaled; None for a metric of the whole set.
        weights: [n]; None for a metric of the whole set.
        predictions: [n] discrete predictions, or None where the metric has none per example.
        value: of the split, in the metric's unit.
        seconds: that the model took, without data and metric.
        outputs, targets: of the whole split, for a metric of the whole set; else None.
    """

    values: Array | None
    weights: Array | None
    predictions: NDArray[np.int64] | None
    value: float
    seconds: float = 0.0
    outputs: Tree = None
    targets: Tree = None

    def __len__(self) -> int:
        return len(self.values) if self.values is not None else len(tensors(self.outputs)[0])

    def plain(self) -> dict[str, Any]:
        """The numbers of the whole, as JSON data; the examples go into `save`."""
        return {"value": self.value, "n": len(self), "seconds": self.seconds}

    def save(self, path: str | Path) -> None:
        """Write everything to one `.npz` file, atomically."""
        leaves, structure = flatten((self.outputs, self.targets))
        arrays: dict[str, Any] = {
            f"tree{i}": (t.float() if t.dtype == torch.bfloat16 else t).numpy() for i, t in enumerate(leaves)
        }
        arrays |= {k: v for k in ("values", "weights", "predictions") if (v := getattr(self, k)) is not None}
        facts = json.dumps({"value": self.value, "seconds": self.seconds, "structure": structure})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, facts=np.array(facts), **arrays)
        atomic_write(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read back what `save` wrote.

        Raises:
            BadInput: the file is missing or damaged.
        """
        try:
            with open(path, "rb") as source, np.load(source, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                count = sum(name.startswith("tree") for name in file.files)
                leaves = [torch.from_numpy(file[f"tree{i}"]) for i in range(count)]
                arrays = {k: file[k] if k in file.files else None for k in ("values", "weights", "predictions")}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path} holds no scores: {error}", "score the model again") from error
        outputs, targets = unflatten(leaves, facts["structure"])
        return cls(**arrays, value=facts["value"], seconds=facts["seconds"], outputs=outputs, targets=targets)
