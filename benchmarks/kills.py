"""Kill a small study at its writes, run the same command again, and hold the end against that of a study nobody killed.

    python benchmarks/kills.py                  # ten writes, evenly spaced from the first to the last (20 minutes)
    python benchmarks/kills.py --kills 1000     # writes at random, a night's run
    python benchmarks/kills.py --every 1        # each write in turn

A write is a call of `os.fsync`, `os.replace` or `os.rename`, or a statement to the store, in driver or worker. Right before
it the whole command is killed (SIGKILL). The study's objective is bytes, which no clock has a say in: so the same command again
has to hand over the same recipe and the same model files, and nothing that was acknowledged may be missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quadriga.testing.studies import acknowledged

BUDGET = 60
HOOK = """
import fcntl, os, signal, sqlite3, time

def write(plain):
    def hooked(*args, **kwargs):
        with open(os.environ["KILL_COUNT"], "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write("x")
            file.flush()
            number = file.tell()
        if number == int(os.environ["KILL_AT"]):
            os.kill(int(os.environ["KILL_PID"]), signal.SIGKILL)
            time.sleep(60)
        return plain(*args, **kwargs)
    return hooked

if "KILL_COUNT" in os.environ:
    os.fsync, os.replace, os.rename = map(write, (os.fsync, os.replace, os.rename))
    connect = sqlite3.connect

    class Counted(sqlite3.Connection):
        execute = write(sqlite3.Connection.execute)

    sqlite3.connect = lambda *a, **k: connect(*a, **{"factory": Counted, **k})
"""
MODEL = """
import torch
from torch import nn
from quadriga import Recipe, Workload, step

def workload():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9000, 32, generator=g)
    y = (x @ torch.randn(32, 4, generator=g)).argmax(1)
    train, val, test = ((x[a:b], y[a:b]) for a, b in ((0, 3000), (3000, 5000), (5000, 9000)))
    model = lambda: nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4))
    baseline = Recipe((step("optimizer", kind="adam", lr=0.001), step("train", epochs=4)))
    return Workload(model=model, train=train, val=val, test=test, name="small", baseline=baseline)
"""


def run(place: Path, out: str, at: int = 0) -> tuple[int, dict[str, Any]]:
    """One call of the command, killed at a write if `at` is one; how many writes there were, and the result."""
    count = place / f"{out}.count"
    count.unlink(missing_ok=True)
    words = ["run", "small.py", "--floor", "-2pt", "--minimize", "bytes", "--only", "hardware", "--budget", f"{BUDGET}s"]
    command = [sys.executable, "-m", "quadriga", *words, "--out", out, "--json"]
    env = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "KILL_COUNT": str(count)}
    shell = ["sh", "-c", 'export KILL_PID=$$; exec "$@"', "sh", *command]  # exec keeps the shell's number
    done = subprocess.run(shell, cwd=place, env={**env, "KILL_AT": str(at)}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return count.stat().st_size if count.exists() else 0, json.loads(lines[-1]) if lines else {"error": done.stderr[-400:]}


def handed_over(place: Path, out: str, result: dict[str, Any]) -> dict[str, Any]:
    """What may not depend on a kill: status, recipe, and the hashes of the files that run."""
    folder = place / out / "artifact"
    files = json.loads((folder / "manifest.json").read_text())["files"] if (folder / "manifest.json").is_file() else {}
    entry = json.loads((folder / "runtime.json").read_text()) if files else {}
    names = ["runtime.json", *([entry["packed"]] if "packed" in entry else entry.get("files", []))] if files else []
    winner = result.get("winner") or {}
    return {"status": result.get("status"), "recipe": winner.get("recipe"), "files": {n: files[n]["sha256"] for n in names}}


def one(place: Path, at: int, whole: dict[str, Any]) -> dict[str, Any]:
    """One round: kill before a write, look, run again, look."""
    out = f"out-{at}"
    run(place, out, at)
    before = acknowledged(place / out)
    _, result = run(place, out)
    after, found = acknowledged(place / out), handed_over(place, out, result)
    left = [p.name for p in place.iterdir() if p.name.startswith(("quadriga-", "tmp"))]
    told = {"at": at, "kept": len(before), "lost": after[: len(before)] != before, "same": found == whole, "left": left}
    if found != whole:
        told["instead"] = {**found, "error": result.get("error")}
    shutil.rmtree(place / out)
    return told


def main() -> int:
    """The rounds that are asked for; 0 if nothing was lost and every end was the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=int, help="each so-many-th write, in place of --kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        (place / "sitecustomize.py").write_text(HOOK)
        (place / "small.py").write_text(MODEL)
        writes, result = run(place, "whole")
        whole = handed_over(place, "whole", result)
        print(json.dumps({"writes": writes, "whole": whole}), file=sys.stderr, flush=True)
        step = options.every or max(1, writes // options.kills)
        points = list(range(1, writes + 1, step))
        if options.kills > writes:
            points = [random.Random(options.seed + n).randint(1, writes) for n in range(options.kills)]
        rounds = []
        for at in points:
            rounds.append(one(place, at, whole))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    good = whole["status"] == "verified" and all(r["same"] and not r["lost"] for r in rounds)
    bad = [r for r in rounds if r["lost"] or not r["same"]]
    print(json.dumps({"benchmark": "kills", "writes": writes, "kills": len(rounds), "bad": bad, "good": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
