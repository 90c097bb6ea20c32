"""Parts of tensors in a folder, written and read by torch.distributed.checkpoint: any number of ranks, dealt out anyhow.

The files are safetensors with the offsets of each part in their headers; its usual format keeps a pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from quadriga.core.errors import BadInput
from quadriga.core.files import sha256
from quadriga.parallel.collect import Parts
from quadriga.parallel.group import gathered, rank
from quadriga.parallel.place import Place


class Parcel:
    """A part of a tensor, as torch.distributed.checkpoint asks for it: blocks of consecutive entries, each with its offsets."""

    def __init__(self, part: Tensor, place: Place) -> None:
        self.place, self.dtype = place, part.dtype
        self.pieces = {torch.Size(offsets): (torch.Size(sizes), piece) for (offsets, sizes), piece in place.pieces(part)}

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size(self.place.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, sizes) for offsets, (sizes, _) in self.pieces.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        kind = TensorProperties(dtype=self.dtype)
        chunks = self.__create_chunk_list__()
        parts = [(MetadataIndex(name, c.offsets), TensorWriteData(c, kind, self.size())) for c in chunks]
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data) for index, data in parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[torch.Size(index.offset)][1]


class SavePlanner(dcp.DefaultSavePlanner):
    """Finds blocks in parcels, where PyTorch's expects tensors."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Finds blocks in parcels, where PyTorch's expects tensors and drops all else."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator, self.mappings = metadata, is_coordinator, {}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class Writer(HuggingFaceStorageWriter):
    """A file of it names a tensor once, so a rank's second block of a tensor goes into its second file."""

    def _split_by_storage_plan(self, plan: dict[str, int] | None, items: list[WriteItem]) -> dict[int, list[WriteItem]]:
        files: dict[int, list[WriteItem]] = {}
        seen: dict[str, int] = {}
        for item in items:
            number = seen[item.index.fqn] = seen.get(item.index.fqn, 0) + 1
            files.setdefault(number, []).append(item)
        return files


def write(folder: Path, parts: Parts) -> dict[str, str]:
    """Write the parts of all ranks, each once; file name → SHA-256, in all ranks.

    Args:
        folder: on storage that all ranks see.
        parts: of this rank, on the CPU.
    """
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    parcels = {name: Parcel(part, place) for name, (part, place) in parts.items()}
    with _quiet():
        dcp.save(parcels, storage_writer=Writer(str(folder), save_distributed=True), planner=SavePlanner())
    own = {p.name: sha256(p) for p in sorted(folder.glob(f"shard-{rank() + 1:05d}-*"))}
    return {name: digest for each in gathered(own) for name, digest in each.items()}


def sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor that is written there."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tuple(m.size), m.properties.dtype) for name, m in found.items()}  # type: ignore[union-attr]


def read(folder: Path, parts: Parts, *, alone: bool = False) -> None:
    """Fill tensors with their parts of what is written there, by all ranks together or by this process alone."""
    parcels = {name: Parcel(part, place) for name, (part, place) in parts.items()}
    with _quiet():
        dcp.load(parcels, storage_reader=HuggingFaceStorageReader(str(folder)), planner=LoadPlanner(), no_dist=alone)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors that are written there, whole, by this process alone."""
    found = {name: (torch.empty(shape, dtype=kind), Place(shape)) for name, (shape, kind) in sizes(folder).items()}
    read(folder, found, alone=True)
    return {name: tensor for name, (tensor, _) in found.items()}


def check(folder: Path, files: Mapping[str, str], every: int = 1, first: int = 0) -> None:
    """Compare files with their SHA-256; of several processes each looks at a share.

    Raises:
        BadInput: one is missing or damaged.
    """
    for name, digest in list(files.items())[first::every]:
        try:
            good = sha256(folder / name) == digest
        except OSError as error:
            raise BadInput(f"{folder / name} is missing: {error.strerror}", "restore it, or delete the folder") from error
        if not good:
            raise BadInput(
                f"{folder / name} is damaged: its SHA-256 is not the recorded one", "restore it, or delete the folder"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only, and of its own internals
        yield
