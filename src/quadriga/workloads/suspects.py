"""Which line of a user's file makes another workload in every process."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SORT, SEED, FIX = "sort it, as in sorted({0})", "give it a seed, as in {0}(0)", "put a constant in its place"
ENTROPY = {  # calls whose result no seed of ours reaches → what to do
    "default_rng": SEED, "Random": SEED, "RandomState": SEED, "SystemRandom": "use random.Random(0)", "Generator.seed": SEED,
    "time": FIX, "time_ns": FIX, "perf_counter": FIX, "monotonic": FIX, "now": FIX, "today": FIX, "getpid": FIX, "urandom": FIX,
    "uuid1": FIX, "uuid4": FIX, "token_bytes": FIX, "token_hex": FIX, "randbits": FIX, "id": FIX,
    "hash": "use hashlib, since hash() of text differs in every process",
    "set": SORT, "frozenset": SORT, "listdir": SORT, "scandir": SORT, "glob": SORT, "iglob": SORT, "rglob": SORT,
    "iterdir": SORT,
}  # fmt: skip
DRAWS = {  # calls that draw from the global generators, which are seeded here, unless something before them drew → its seed
    "random_split": "generator", "randperm": "generator", "multinomial": "generator", "train_test_split": "random_state",
    "shuffle": "random_state", "permutation": "", "sample": "random_state", "choice": "",
}  # fmt: skip
RESEED = ("seed", "manual_seed")  # without a number, they take one from the clock
UNKNOWN = "look for what is drawn without a seed, or depends on time, process or the order of files"


def suspect(reference: str | None) -> str:
    """A remedy that names the most likely line of the file behind a reference, and of those it imports from its folder.

    Example:
        >>> suspect("lenet_fashion") == UNKNOWN
        True
    """
    from quadriga.workloads import parse

    target = Path(parse(reference)[0]) if reference else Path()
    for calls in (ENTROPY, DRAWS):
        for file in files(target):
            if found := next(_calls(file, calls), None):
                line, text, what = found
                return f"{file.name}:{line}: {text}; {what}"
    return UNKNOWN


def files(main: Path) -> list[Path]:
    """A Python file and those of its folder that it imports, and so on; none where it is no file."""
    found, waiting = list[Path](), [main] if main.suffix == ".py" and main.is_file() else []
    while waiting:
        found.append(waiting.pop(0))
        waiting += [p for p in _beside(found[-1]) if p not in found and p not in waiting]
    return found


def _beside(file: Path) -> list[Path]:
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return []
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    near = [file.parent / f"{name.split('.')[0]}.py" for name in dict.fromkeys(names)]
    return [p for p in near if p.is_file()]


def _calls(file: Path, calls: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """Line, text and what to do, of each call of these that has no seed and is not sorted."""
    source = file.read_text(errors="replace")
    tree = ast.parse(source)
    sorted_ones = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _name(node) in ("sorted", "len", "min", "max", "sum", "any", "all")
        for inner in ast.walk(node)
    }
    lines = source.splitlines()
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)):
        name = _name(node)
        if calls is ENTROPY and name in RESEED and not node.args and not node.keywords:
            yield node.lineno, lines[node.lineno - 1].strip(), "give it a number"
        elif name in calls and id(node) not in sorted_ones and not _seeded(node, calls[name]):
            yield node.lineno, lines[node.lineno - 1].strip(), _remedy(node, name, calls)


def _name(call: ast.Call) -> str:
    f = call.func
    return f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""


def _seeded(call: ast.Call, what: str) -> bool:
    """Whether the call is given what makes it the same each time."""
    if what == SEED:
        return bool(call.args or call.keywords)
    return bool(what) and any(k.arg in (what, "generator", "random_state", "seed") for k in call.keywords)


def _remedy(call: ast.Call, name: str, calls: dict[str, str]) -> str:
    if calls is ENTROPY:
        text = ast.unparse(call if calls[name] == SORT else call.func)
        return calls[name].format(text)
    seed = calls[name]
    return f"give it {seed}=" + ("torch.Generator().manual_seed(0)" if seed == "generator" else "0") if seed else "seed it"
