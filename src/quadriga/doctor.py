"""What this machine has, what is missing, and which methods that removes."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quadriga import __version__

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "optuna",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "executorch",
    "torchao",
    "tinygrad",
    "transformers",
    "ray",
)
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino", "executorch": "executorch", "opencl": "opencl"}  # runtime → its extra
ROOM = 2e9  # bytes that a study of small models may need


def examine(folder: Path = Path()) -> dict[str, Any]:
    """Facts, checks and the methods that are not to be had here, as plain data.

    Args:
        folder: where a study would write.
    """
    from quadriga.core import cuda, opencl
    from quadriga.measure.machine import facts, load
    from quadriga.runtime import probe

    runtimes = probe()
    gpus = cuda.found()
    built = (_runtime(name, found) for name, found in runtimes.items())
    checks = [_python(), _space(folder), _gpu(gpus), *built, _ray(), *_weights()]
    away = [name for name, found in runtimes.items() if not found.ok]
    return {
        "ok": all(c["ok"] or not c["needed"] for c in checks),
        "checks": checks,
        "removed": [
            *({"runtime": name, "methods": ", ".join(_methods_of(name)) or "–"} for name in away),
            *([] if gpus.used is not None else [{"runtime": "PyTorch on a GPU", "methods": ", ".join(_on_gpu())}]),
        ],
        "cuda": list(gpus.devices),
        "opencl": list(opencl.found().devices),
        "quadriga": __version__,
        "versions": {name: _version(name) for name in PACKAGES},
        **facts(),
        "load": round(load() or 0.0, 2),
    }


def check(name: str, ok: bool, detail: str, remedy: str = "", needed: bool = True) -> dict[str, Any]:
    """One line of the examination; a check that is not needed may fail without spoiling the whole."""
    return {"check": name, "ok": ok, "detail": detail, "remedy": "" if ok else remedy, "needed": needed}


def _python() -> dict[str, Any]:
    return check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")


def _space(folder: Path) -> dict[str, Any]:
    free = shutil.disk_usage(next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())).free
    return check(
        "disk", free >= ROOM, f"{free / 1e9:.1f} GB free", f"free {ROOM / 1e9:.0f} GB, or choose another --out", needed=False
    )


def _gpu(found: Any) -> dict[str, Any]:
    """The GPUs that PyTorch can use, with the versions of CUDA and of the driver."""
    software = [f"CUDA {found.toolkit}" if found.toolkit else "", f"driver {found.driver}" if found.driver else ""]
    names = [f"{d['name']} ({d['memory'] / 1e9:.0f} GB, capability {d['capability']})" for d in found.devices]
    told = "; ".join(filter(None, [found.reason, *names, *software]))
    return check("gpu", found.used is not None, told, found.remedy, needed=False)


def _runtime(name: str, found: Any) -> dict[str, Any]:
    remedy = found.remedy or (f'pip install "quadriga[{EXTRAS[name]}]"' if name in EXTRAS else "")
    detail = str(found.version or "") if found.ok else str(found.reason)
    return check(f"runtime {name}", bool(found.ok), detail, remedy, needed=name == "eager")


def _ray() -> dict[str, Any]:
    """Whether a search can run on a cluster."""
    found = _version("ray")
    return check("engine ray", found is not None, found or "not installed", "pip install 'quadriga[ray]'", needed=False)


def _weights() -> list[dict[str, Any]]:
    """Pretrained weights, which two ready-made workloads need."""
    from quadriga.workloads import fetch

    return [
        check(f"weights {name}", there, "in the cache" if there else "not fetched", f"quadriga fetch {name}", needed=False)
        for name, there in fetch.present().items()
    ]


def _methods_of(runtime: str) -> list[str]:
    """Methods that choose this runtime: their name is its name."""
    from quadriga.methods import cards

    return [str(c["name"]) for c in cards() if str(c["name"]) == runtime or _default_runtime(c) == runtime]


def _on_gpu() -> list[str]:
    """Methods that need a GPU, besides those that choose a runtime."""
    from quadriga.methods import cards

    return [str(c["name"]) for c in cards() if "CUDA" in (*c["requires"], *c["adds"]) and "RUNTIME" not in c["adds"]]


def _default_runtime(card: Mapping[str, Any]) -> str:
    fields = card.get("fields")
    return str(fields.get("runtime", "")) if isinstance(fields, Mapping) else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
