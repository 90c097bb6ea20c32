"""Read a user's Python file and find the function in it that makes the workload."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from quadriga.core import rng
from quadriga.core.errors import BadInput, did_you_mean
from quadriga.core.workload import Workload
from quadriga.workloads.place import place, told

DEFAULT = "workload"
SEED = 20  # of whatever the user's file draws while it makes the workload
REMEDY = "write a function workload() that returns quadriga.Workload(...)"


def read_file(path: Path) -> ModuleType:
    """Run a Python file as a module under a name of its own, so that it clashes with nothing that is installed.

    Files beside it can be imported, as when Python runs it.

    Raises:
        BadInput: it is missing, has a syntax error, or raises; with file and line.
    """
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
        raise BadInput(f"there is no file {path}", near if near.startswith("did") else "check the path")
    name = f"quadriga_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path} is not a Python file", "give a file that ends in .py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    try:
        _guarded(lambda: _execute(module, path), path, f"{path.name} cannot be run")
    except BadInput:
        del sys.modules[name]
        raise
    return module


def _execute(module: ModuleType, path: Path) -> None:
    """Run the file as it is now: Python's cached bytecode would hide an edit of equal size within the same second."""
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))


def pick(module: ModuleType, name: str | None, path: Path) -> tuple[str, Callable[..., Any]]:
    """A name and its function: the one asked for, else `workload`, else the only one that could return a workload.

    Raises:
        BadInput: there is none, or several.
    """
    own = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    if name is not None:
        found = getattr(module, name, None)
        if not callable(found):
            raise BadInput(f'{path} has no function "{name}"', did_you_mean(name, own) if own else REMEDY)
        return name, found
    if DEFAULT in own:
        return DEFAULT, own[DEFAULT]
    said = [f for f in own.values() if _says_workload(f)]
    able = said or [f for n, f in own.items() if not n.startswith("_") and not _required(f)]
    if len(able) != 1:
        listed = (
            f"{len(able)} that could make one: {', '.join(f.__name__ for f in able)}" if able else "none that could make one"
        )
        raise BadInput(
            f'{path} has no function "{DEFAULT}" and {listed}', f"name one, as in {path.name}:make" if able else REMEDY
        )
    return able[0].__name__, able[0]


def make(function: Callable[..., Any], options: Mapping[str, Any], what: str, folder: Path | None = None) -> Workload:
    """Call the function and check what it returns.

    Args:
        function: returns a `Workload`.
        options: its keyword arguments.
        what: how messages call it.
        folder: where its imports may be found.

    Raises:
        BadInput: an option that it does not take, it raised, or it returned another type.
    """
    taken = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        for key in options:
            if key not in taken:
                raise BadInput(f'{what} has no option "{key}"', did_you_mean(key, taken) if taken else "it takes none")
    if missing := [p for p in _required(function) if p not in options]:
        raise BadInput(f'{what} needs a value for "{missing[0]}"', f"give it a default, or load(..., {missing[0]}=...)")
    result = _guarded(lambda: function(**options), folder / "_" if folder else None, f"{what} failed")
    if not isinstance(result, Workload):
        raise BadInput(f"{what} returned {type(result).__name__}", "it has to return a quadriga.Workload")
    return result


def _guarded(action: Callable[[], Any], path: Path | None, what: str) -> Any:
    """Run code of the user's with its folder importable; its errors become BadInput with file and line.

    It runs under one seed and on one thread, so that a split that it draws and a model that it trains are the same in every
    process; the caller's generators and threads go on as if nothing had happened.
    """
    folder = str(path.parent) if path else None
    if folder:
        sys.path.insert(0, folder)
    try:
        with rng.alike(SEED):
            return action()
    except SyntaxError as error:
        raise BadInput(f"{error.filename}:{error.lineno}: syntax error: {error.msg}", "correct that line") from error
    except ImportError as error:
        raise BadInput(
            told(error), f"install what is missing: pip install {error.name}" if error.name else "correct it there"
        ) from error
    except BadInput as error:
        at = place(error) if folder else ""
        raise BadInput(f"{at}: {error.problem}" if at else error.problem, error.remedy) from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"{what}: {told(error)}", "correct it there") from error
    finally:
        if folder:
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)  # at the end, for imports that the model makes when it is built


def _says_workload(function: Callable[..., Any]) -> bool:
    said = getattr(function, "__annotations__", {}).get("return")
    return said is Workload or (isinstance(said, str) and said.strip("\"'").split(".")[-1] == "Workload")


def _required(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [n for n, p in inspect.signature(function).parameters.items() if p.default is p.empty and p.kind not in kinds]
