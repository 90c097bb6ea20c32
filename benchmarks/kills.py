"""Kill the driver ten times at random, each time run the same command again, and check that nothing acknowledged is lost.

Each round is a fresh study of `examples/mlp_fashion.py` with a budget of 60 seconds: SIGKILL after a random time, then
the same command to its end. Prints one line of JSON.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quadriga.testing.studies import acknowledged

ROUNDS, BUDGET = 10, 60
WORKLOAD = str(Path(__file__).resolve().parents[1] / "examples" / "mlp_fashion.py")


def command(out: Path) -> list[str]:
    """The command that is killed and repeated."""
    options = ["--floor", "-1pt", "--budget", f"{BUDGET}s", "--out", str(out), "--json"]
    return [sys.executable, "-m", "quadriga", "run", WORKLOAD, *options]


def one(after: float) -> dict[str, object]:
    """One round: kill, look, repeat, look."""
    out = Path(tempfile.mkdtemp(prefix="quadriga-kill-"))
    try:
        first = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after)
        killed = first.poll() is None
        first.kill()
        first.wait()
        before = acknowledged(out)
        second = subprocess.run(command(out), capture_output=True, text=True)
        later = acknowledged(out)
        status = json.loads(second.stdout.strip().splitlines()[-1])["status"] if second.stdout.strip() else second.stderr[-300:]
        return {
            "after": round(after, 1),
            "killed": killed,
            "kept": len(before),
            "lost": later[: len(before)] != before,
            "status": status,
        }
    finally:
        shutil.rmtree(out, ignore_errors=True)


def main() -> int:
    """Run all rounds; 0 if nothing was lost and every result is verified."""
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(one(rng.uniform(0.5, BUDGET - 5)))
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    good = all(not r["lost"] and r["status"] == "verified" for r in rounds)
    print(json.dumps({"benchmark": "kills", "rounds": rounds, "good": good}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
