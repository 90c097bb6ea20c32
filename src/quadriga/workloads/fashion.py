"""Fashion-MNIST: from the user's cache, Debian's folder, a download when asked, else the subset in the package."""

from __future__ import annotations

import gzip
import os
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quadriga.core.batch import Batch
from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.files import atomic_write
from quadriga.workloads import shipped

ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # Zalando's own; the hashes make plain http safe
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FILES = {  # SHA-256 of the decompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
VAL = {12_000: 2_000, 60_000: 5_000}  # examples → how many of them, the last ones, are val
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, in [0, 1]
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Splits:
    """Three splits of a data set, and the note that every record carries: source, files, examples, licence."""

    train: TensorData
    val: TensorData
    test: TensorData
    note: dict[str, Any]


def fashion_mnist(*, pad: int = 2, source: str | None = None, download: bool = False) -> Splits:
    """Fashion-MNIST as float32 images [n, 1, 28 + 2 pad, 28 + 2 pad], normalised, with int64 labels [n] in 0..9.

    The border is black before normalisation, as the background is. `val` is the end of the training images: the last
    5,000 of 60,000, or the last 2,000 of the subset's 12,000 (the first 12,000 in the official order). `test` is always
    the whole official test set, 10,000 images.

    Args:
        pad: black pixels added on every side.
        source: "cache", "debian" or "shipped"; by default the first that is there, in this order. The environment
            variable QUADRIGA_DATA stands in for it.
        download: fetch the full set into the cache when it is neither there nor in Debian's folder, 30 MB; so does the
            environment variable QUADRIGA_DOWNLOAD=1.

    Raises:
        BadInput: the source is unknown or not there, a file is damaged, or the download failed.
    """
    source, parts = _find(source or os.environ.get("QUADRIGA_DATA"), download or os.environ.get("QUADRIGA_DOWNLOAD") == "1")
    images, labels, test_images, test_labels = (parse_idx(parts[name], name) for name in FILES)
    cut = len(images) - VAL[len(images)]

    def split(x: np.ndarray, y: np.ndarray) -> TensorData:
        return TensorData(prepare(x, pad), torch.from_numpy(y.astype(np.int64)))

    train, val, test = split(images[:cut], labels[:cut]), split(images[cut:], labels[cut:]), split(test_images, test_labels)
    note = {
        "data": "Fashion-MNIST" if len(images) == 60_000 else "Fashion-MNIST, the first 12,000 training images (subset)",
        "source": source,
        "sha256": {name: shipped.digest(raw) for name, raw in parts.items()},
        "examples": {"train": len(train), "val": len(val), "test": len(test)},
        "licence": "MIT, Copyright 2017 Zalando SE",
    }
    return Splits(train, val, test, note)


def prepare(images: np.ndarray, pad: int) -> Tensor:
    """uint8 images [n, 28, 28] as normalised float32 [n, 1, 28 + 2 pad, 28 + 2 pad]."""
    padded = functional.pad(torch.from_numpy(images.copy()), (pad, pad, pad, pad))
    return padded.to(torch.float32).div_(255).sub_(MEAN).div_(STD).unsqueeze_(1)


class Enlarged(TensorData, fresh=True):
    """Images [n, c, h, w] that are kept small and enlarged, bilinearly, when a batch is read.

    64×64 float32 images take five times the memory of 28×28 ones: 1.1 GB for all of Fashion-MNIST, in every process.

    Args:
        inputs: the small images; `inputs` stays what they are. Whoever wants what a model sees reads a batch.
        target: as of `TensorData`.
        side: pixels of the images in a batch, [batch, c, side, side].

    Example:
        >>> Enlarged(torch.ones(3, 1, 2, 2), torch.zeros(3), 4).batch(torch.arange(2)).inputs.shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(self, inputs: Tensor, target: Tensor, side: int) -> None:
        super().__init__(inputs, target)
        self.side = side

    def batch(self, index: Tensor) -> Batch:
        small = super().batch(index)
        large = functional.interpolate(small.inputs, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return replace(small, inputs=large)


def enlarged(data: Splits, side: int, examples: int | None = None) -> Splits:
    """The same splits as images of another size, made when a batch is read; of train the first `examples`, or all."""
    rows = slice(examples)
    train = Enlarged(data.train.inputs[rows], data.train.target[rows], side)
    val, test = (Enlarged(d.inputs, d.target, side) for d in (data.val, data.test))
    counts = {**data.note["examples"], "train": len(train)}
    return Splits(train, val, test, {**data.note, "examples": counts, "enlarged": f"bilinearly to {side}×{side}"})


def parse_idx(raw: bytes, name: str = "file") -> np.ndarray:
    """An idx file of unsigned bytes as an array.

    Raises:
        BadInput: it is not one, or is cut off.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])).tolist()
        [7, 9]
    """
    dims = raw[3] if len(raw) > 4 and raw[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(raw, ">i4", dims, 4)) if dims and len(raw) >= 4 + 4 * dims else ()
    if not shape or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
        raise BadInput(f"{name} is not an idx file of bytes", "restore it")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _find(source: str | None, download: bool) -> tuple[str, dict[str, bytes]]:
    sources: dict[str, Callable[[], dict[str, bytes] | None]] = {
        "cache": lambda: _folder(shipped.cache_folder() / "fashion-mnist"),
        "debian": lambda: _folder(DEBIAN),
        "shipped": lambda: {name: shipped.read(f"fashion-mnist-{name}.xz") for name in FILES},
    }
    if source is not None and source not in sources:
        raise BadInput(f'there is no data source "{source}"', did_you_mean(source, sources))
    for name in [source] if source else ["cache", "debian"]:
        if (parts := sources[name]()) is not None:
            return name, parts
    if download and source in (None, "cache"):
        fetch(shipped.cache_folder() / "fashion-mnist")
        return _find("cache", False)
    if source is None:
        return "shipped", sources["shipped"]()  # type: ignore[return-value]
    remedy = "install dataset-fashion-mnist" if source == "debian" else "set QUADRIGA_DOWNLOAD=1 to fetch it"
    raise BadInput(f'Fashion-MNIST is not in the source "{source}"', remedy)


def _folder(folder: Path) -> dict[str, bytes] | None:
    if not all((folder / f"{name}.gz").is_file() for name in FILES):
        return None
    return {name: unpack((folder / f"{name}.gz").read_bytes(), name, str(folder / f"{name}.gz")) for name in FILES}


def unpack(packed: bytes, name: str, where: str) -> bytes:
    """Decompress and verify one of `FILES`.

    Raises:
        BadInput: it is damaged.
    """
    try:
        raw = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{where} is damaged: {error}", "delete it, so that it is found elsewhere") from error
    if shipped.digest(raw) != FILES[name]:
        raise BadInput(
            f"{where} is damaged: SHA-256 {shipped.digest(raw)[:12]}… of its content is not the official one", "delete it"
        )
    return raw


def fetch(folder: Path, address: str = ADDRESS) -> None:
    """Download the four files, verify each and only then put it, atomically, into `folder`.

    Raises:
        BadInput: the server cannot be reached, or what came is not the official file.
    """
    for name in FILES:
        try:
            with urllib.request.urlopen(f"{address}{name}.gz", timeout=60) as reply:
                packed = reply.read()
        except OSError as error:
            raise BadInput(
                f"{address}{name}.gz could not be downloaded: {error}", "go without download: a subset is shipped"
            ) from error
        unpack(packed, name, f"{address}{name}.gz")
        atomic_write(folder / f"{name}.gz", packed)
