"""Who may import whom, read from the source; and what has to stay short, or free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "quadriga"
PLAIN = {f"core.{name}" for name in ("recipe", "measurement", "trial", "method", "errors", "files", "folders", "roofline")}
RULES = {
    "core": {"core"},
    "methods": {"core", "methods", "verify.promise"},  # which reads core alone
    "workloads": {"core", "workloads"},
    "parallel": {"core", "parallel"},
    "train": {"core", "parallel", "train"},
    "runtime": {"core", "parallel", "train", "runtime"},
    "measure": {"core", "parallel", "train", "runtime", "measure", "workloads", "methods"},  # an arm rebuilds what it times
    "verify": {"core", "parallel", "train", "runtime", "measure", "verify"},
    "artifact": {"core", "parallel", "train", "runtime", "measure", "verify", "artifact"},
    "search": {"search", *PLAIN},
    "report": {"report", *PLAIN},
    "engine": {"core", "parallel", "train", "runtime", "measure", "verify", "artifact", "methods", "workloads", "engine"},
    "stages": {"core", "parallel", "train", "runtime", "measure", "verify", "artifact", "methods", "workloads", "engine"}
    | {"search", "report", "stages"},
    "testing": {"core", "parallel", "train", "runtime", "measure", "methods", "engine", "testing", "verify", "workloads"},
}
NO_TORCH = sorted(PLAIN | {"search", "report", "methods"})


def imports(path):
    """The modules of ours that a file imports, as "core.batch", those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "quadriga" else [f"quadriga.{a.name}" for a in node.names]
        ours = (n.removeprefix("quadriga.") for n in names if n.startswith("quadriga.") and id(node) not in hidden)
        yield from (n for n in ours if not n.startswith("__"))  # such as __version__


def files(package):
    return sorted((SOURCE / package).rglob("*.py"))


@pytest.mark.parametrize("package", RULES)
def test_imports_go_downward(package):
    """Every import of a package is one that design.md allows; one that names a plain-data module is that or a child."""
    wrong = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in files(package)
        for name in imports(path)
        if not any(name == allowed or name.startswith(allowed + ".") for allowed in RULES[package])
    ]
    assert not wrong


def test_methods_do_not_know_one_another():
    """A method imports core, and helpers of its family whose names begin with an underscore; never another method."""
    for family in ("structure", "training", "optimizer", "hardware"):
        for path in files(f"methods/{family}"):
            for name in imports(path):
                last = name.split(".")[-1]
                assert not name.startswith("methods") or last.startswith("_"), f"{path.relative_to(SOURCE)} imports {name}"


def test_backward_is_called_in_train_and_parallel_alone():
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] not in ("train", "parallel"):
            calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
            found = [c.lineno for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "backward"]
            assert not found, f"{path}:{found} calls backward()"


def test_nothing_unpickles():
    """No pickle, and no torch.load but with weights_only=True."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", ["study.py", "train/loop.py"])
def test_the_composers_stay_short(name):
    path = SOURCE / name
    if not path.exists():
        pytest.skip(f"{name} is not written yet")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 200


def test_plain_data_imports_no_torch():
    """In a fresh process: neither the plain-data half of core, nor search, report and the registry load torch."""
    modules = [
        ".".join(("quadriga", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for name in NO_TORCH
        for path in (files(name) if (SOURCE / name).is_dir() and name != "methods" else [])
    ]
    modules += [f"quadriga.{name}" for name in NO_TORCH if "." in name or name == "methods"]
    code = "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m); assert 'torch' not in sys.modules, m"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], env={"PYTHONPATH": str(SOURCE.parent)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
