"""What a runtime says of itself, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from quadriga.core.slots import RuntimeSpec


@dataclass(frozen=True)
class Probe:
    """Whether a runtime can run here.

    Args:
        ok: it can.
        version: of the package that executes, "" when absent.
        reason: what stands in the way.
        remedy: a command or a step that changes it.
    """

    ok: bool
    version: str = ""
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Built:
    """A realised specification: a folder with model files, `load.py` and `runtime.json`.

    Args:
        folder: where it is.
        spec: what was realised.
        entry: the content of runtime.json.
        files: names of the files that `load.py` reads to run the model (not the ones it checks with).
        bytes: their size together, which is what "bytes of an artifact" means everywhere.
    """

    folder: Path
    spec: RuntimeSpec
    entry: Mapping[str, Any]
    files: tuple[str, ...]
    bytes: int

    def run(self, threads: int | None = None) -> Callable[..., Any]:
        """Load it in this process with the code that `load.py` holds: inputs tree → outputs tree of torch tensors."""
        from quadriga.runtime import standalone

        return standalone.load(self.folder, check=False, threads=threads)


def package_probe(package: str, extra: str, *, also: tuple[str, ...] = ()) -> Probe:
    """Probe by looking for packages, without importing them."""
    missing = [name for name in (package, *also) if util.find_spec(name) is None]
    if missing:
        return Probe(False, "", f"the package {missing[0]} is not installed", f"pip install quadriga[{extra}]")
    return Probe(True, metadata.version(package))
