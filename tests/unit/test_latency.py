"""The paired protocol: order, sleep, faults, budget; simulated arms with an injected clock, and one run with real processes."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from quadriga import workloads
from quadriga.measure.arm import block, load_eager, warm
from quadriga.measure.latency import arm_spec, paired, write_inputs
from quadriga.measure.machine import Busy
from quadriga.measure.memory import peak, peak_resident, resident
from quadriga.measure.process import ArmFailed, Process, user_environment
from quadriga.measure.timings import Timings
from quadriga.measure.tree import flatten, load_tree, save_tree, unflatten
from quadriga.train.checkpoint import save_state

torch.set_num_threads(1)


def arms(names):
    return {name: {} for name in names}


class World:
    """Simulated arms that share one clock and write down what happens."""

    def __init__(self, seconds, broken=None):
        self.now, self.seconds, self.events, self.broken = 0.0, seconds, [], broken or {}

    def launch(self, name, spec, folder):
        self.events.append(("launch", name))
        return SimulatedArm(self, name)

    def time(self, named, **options):
        options = {"restarts": 3, "blocks": 4, "block_seconds": 1.0, "look": lambda: Busy(0.0, 0.0), **options}
        return paired(named, {1: torch.zeros(1), 8: torch.zeros(8)}, launch=self.launch, clock=lambda: self.now, **options)


class SimulatedArm:
    def __init__(self, world, name):
        self.world, self.name, self.open = world, name, True

    def ask(self, command, timeout):
        assert self.open
        world, what = self.world, command["do"]
        world.events.append((what, self.name, command.get("batch")))
        if world.broken.get(self.name) == (what, sum(e[:2] == (what, self.name) for e in world.events)):
            raise ArmFailed(f"{self.name} broke at {what}")
        if what == "warm":
            return {"calls": round(command["seconds"] / world.seconds[self.name])}
        if what == "block":
            world.now += command["calls"] * world.seconds[self.name]
            return {"wall": world.seconds[self.name], "cpu": world.seconds[self.name] / 2}
        return {"startup": 1.5, "peak": 1000, "growth": 10}

    def close(self):
        self.open = False
        self.world.events.append(("close", self.name))


def test_blocks_are_timed_in_turn_in_a_rotating_order(tmp_path):
    world = World({"a": 0.01, "b": 0.02, "c": 0.05})
    timings = world.time(arms("abc"), folder=tmp_path)
    blocks = [event[1:] for event in world.events if event[0] == "block"]
    rounds = [blocks[i : i + 3] for i in range(0, len(blocks), 3)]
    assert len(rounds) == 3 * 4 * 2  # restarts × blocks × batches
    assert all({name for name, _ in r} == set("abc") and len({batch for _, batch in r}) == 1 for r in rounds)
    first = [r[0][0] for r in rounds]
    assert all(first.count(name) >= 6 for name in "abc")  # nobody always goes first
    assert timings.restarts == 3 and not timings.errors
    assert timings.ratio("b", "a", 8).value == pytest.approx(2.0)
    assert timings[1]["c"][2][3] == (0.05, 0.025)


def test_every_restart_has_fresh_processes_and_all_end(tmp_path):
    world = World({"a": 0.01, "b": 0.02})
    world.time(arms("ab"), folder=tmp_path)
    for name in "ab":
        assert world.events.count(("launch", name)) == world.events.count(("close", name)) == 3
    first_ready = next(i for i, e in enumerate(world.events) if e[0] == "ready")
    assert {e for e in world.events[:first_ready]} == {("launch", "a"), ("launch", "b")}  # all load at the same time


def test_calls_are_counted_once_per_arm_and_batch(tmp_path):
    """Faster arms get more calls, so that each block lasts as long; a later restart's count is not used."""
    world = World({"a": 0.01, "b": 0.05})
    asked = []
    original = SimulatedArm.ask

    class Counting(SimulatedArm):
        def ask(self, command, timeout):
            if command["do"] == "block":
                asked.append((self.name, command["calls"]))
            if command["do"] == "warm" and any(e[0] == "block" for e in world.events):
                return {"calls": 1}
            return original(self, command, timeout)

    world.launch = lambda name, spec, folder: Counting(world, name)
    world.time(arms("ab"), folder=tmp_path)
    assert set(asked) == {("a", 100), ("b", 20)}


@pytest.mark.parametrize(
    "what, count, kept", [("ready", 1, 0), ("warm", 1, 0), ("block", 3, 0), ("block", 9, 1), ("end", 2, 1)]
)
def test_a_broken_arm_is_recorded_and_the_others_go_on(tmp_path, what, count, kept):
    world = World({"a": 0.01, "b": 0.02, "c": 0.04}, broken={"b": (what, count)})
    timings = world.time(arms("abc"), folder=tmp_path)
    assert timings.errors == {"b": f"b broke at {what}"}
    assert len(timings[1]["a"]) == len(timings[8]["c"]) == 3
    assert len(timings[1]["b"]) == len(timings[8]["b"]) == kept  # whole restarts only
    assert all(len(blocks) == 4 for arm in "abc" for blocks in timings[1][arm])
    assert timings.ratio("c", "a", 1).restarts == 3
    assert (timings.ratio("b", "a", 1) is None) == (kept == 0)
    assert world.events.count(("launch", "b")) == kept + 1  # not tried again
    assert world.events.count(("close", "b")) == kept + 1


def test_when_every_arm_is_broken_it_stops(tmp_path):
    world = World({"a": 0.01}, broken={"a": ("ready", 1)})
    timings = world.time({"a": {}}, folder=tmp_path)
    assert timings.errors and timings.restarts == 1 and timings.latency(1, "a") is None


def test_restarts_go_on_beyond_the_budget_until_they_are_enough(tmp_path):
    world = World({"a": 0.01, "b": 0.01})
    timings = world.time(arms("ab"), folder=tmp_path, restarts=12, budget=0.0, enough=lambda found: found.restarts >= 7)
    assert timings.restarts == 7
    never = World({"a": 0.01, "b": 0.01}).time(arms("ab"), folder=tmp_path, restarts=6, budget=0.0, enough=lambda found: False)
    assert never.restarts == 6


def others(*shares):
    """A look at the cores: in each restart others take such a share of them; after the last, none."""
    looks, state = iter(shares), {"work": 0.0, "total": 0.0, "end": False}

    def look():
        if state["end"]:
            state["work"] += 100 * next(looks, 0.0)
            state["total"] += 100
        state["end"] = not state["end"]
        return Busy(state["work"], state["total"])

    return look


def test_a_disturbed_restart_is_made_again(tmp_path):
    """Three of six are disturbed: six calm ones count, the others are told of and left out."""
    world = World({"a": 0.01, "b": 0.01})
    timings = world.time(arms("ab"), folder=tmp_path, restarts=6, look=others(0.0, 0.5, 0.4, 0.0, 0.3))
    assert timings.restarts == 6 and [round(x, 1) for x in timings.left_out] == [0.5, 0.4, 0.3]
    assert timings.disturbed < 0.01 and all(len(timings[b][a]) == 6 for b in (1, 8) for a in "ab")
    assert sum(event[0] == "launch" for event in world.events) == 2 * 9


def test_where_it_never_gets_calm_the_calmest_count(tmp_path):
    shares = (0.5, 0.2, 0.4, 0.3, 0.6, 0.9)
    timings = World({"a": 0.01}).time(arms("a"), folder=tmp_path, restarts=3, look=others(*shares))
    assert [round(x, 1) for x in timings.others] == [0.2, 0.4, 0.3] and len(timings.left_out) == 3


def test_disturbed_restarts_are_not_made_again_beyond_the_budget(tmp_path):
    timings = World({"a": 0.01}).time(arms("a"), folder=tmp_path, restarts=6, budget=0.0, look=others(*[0.5] * 9))
    assert timings.restarts == 4 and not timings.left_out


def test_the_budget_stops_restarts_but_leaves_four(tmp_path):
    two = arms("ab")
    spent = World({"a": 0.01, "b": 0.01})
    spent.time(two, folder=tmp_path, restarts=1)
    one = spent.now
    for budget, restarts in ((0.0, 4), (5.5 * one, 5), (100 * one, 12)):
        world = World({"a": 0.01, "b": 0.01})
        timings = world.time(two, folder=tmp_path, restarts=12, budget=budget)
        assert (timings.restarts, timings.planned) == (restarts, 12)
        assert restarts == 4 or world.now <= budget


def test_timings_as_plain_data(tmp_path):
    timings = World({"a": 0.01, "b": 0.02}).time(arms("ab"), folder=tmp_path)
    assert Timings.from_plain(json.loads(json.dumps(timings.plain()))) == timings
    latency = timings.latency(1, "b", clock="cpu")
    assert latency.value == pytest.approx(0.01) and latency.unit == "s"
    assert timings.startup["a"] == [1.5] * 3 and timings.peak["a"] == 1000


def test_blocks_call_first_untimed_and_then_as_often_as_told():
    calls = []
    found = block(calls.append, "x", 40)
    assert len(calls) == 44 and found["wall"] > 0 and found["cpu"] >= 0
    calls.clear()
    assert warm(calls.append, "x", 0.0) == 1 and len(calls) == 3


TREES = [
    torch.arange(6).reshape(2, 3),
    (torch.ones(2), torch.zeros(2, 1, dtype=torch.bfloat16)),
    {"ids": torch.ones(2, 3, dtype=torch.int64), "mask": torch.tensor([True, False]), "deep": {"x": (torch.ones(2), None, 3)}},
]


@pytest.mark.parametrize("tree", TREES)
def test_trees_survive_the_file(tree, tmp_path):
    save_tree(tmp_path / "t.safetensors", tree)
    leaves, structure = flatten(tree)
    found, read = flatten(load_tree(tmp_path / "t.safetensors"))
    assert read == structure and unflatten(leaves, structure) is not None
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves, found, strict=True))


def test_a_tree_of_views_is_written_whole(tmp_path):
    base = torch.arange(10.0)
    save_tree(tmp_path / "t.safetensors", (base[:4], base[2:6], base.reshape(2, 5).T))
    a, b, c = load_tree(tmp_path / "t.safetensors")
    assert torch.equal(a, base[:4]) and torch.equal(b, base[2:6]) and torch.equal(c, base.reshape(2, 5).T)


LOAD = """
import os, time, pathlib
def load(folder=None, check=True, threads=None):
    print("a model may print")            # must not reach the protocol
    assert check is False
    log = open(pathlib.Path(folder) / "calls", "a", buffering=1)
    {setup}
    def run(inputs):
        log.write(f"{{time.monotonic()}} {{os.getpid()}} {{len(inputs)}}\\n")
        {body}
        return inputs
    return run
"""


def folder_arm(tmp_path, name, body="time.sleep(0.001)", setup="pass"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "load.py").write_text(LOAD.format(body=body, setup=setup))
    return {"kind": "folder", "path": str(folder)}


def spans(folder):
    """Per process: the times of its calls."""
    found = {}
    for line in (folder / "calls").read_text().splitlines():
        when, pid, _ = line.split()
        found.setdefault(pid, []).append(float(when))
    return found


def test_real_processes_sleep_while_the_other_is_timed(tmp_path):
    """Two restarts with real processes: runs of calls never interleave after loading; faults become reasons."""
    named = {
        "one": folder_arm(tmp_path, "one"),
        "two": folder_arm(tmp_path, "two"),
        "crash": folder_arm(tmp_path, "crash", body="os._exit(7)"),
        "raise": folder_arm(tmp_path, "raise", body="raise RuntimeError('no such kernel')"),
        "missing": {"kind": "folder", "path": str(tmp_path / "nowhere")},
        "kind": {"kind": "quantum"},
    }
    inputs = {1: torch.zeros(1, 2), 3: torch.zeros(3, 2)}
    calm, work = lambda: Busy(0.0, 0.0), tmp_path / "work"
    timings = paired(named, inputs, restarts=2, blocks=3, block_seconds=0.02, folder=work, timeout=60, look=calm)
    assert set(timings.errors) == {"crash", "raise", "missing", "kind"}
    assert "status 7" in timings.errors["crash"]
    assert "no such kernel" in timings.errors["raise"]
    assert "load.py" in timings.errors["missing"] and "quantum" in timings.errors["kind"]
    assert [len(blocks) for blocks in timings[3]["two"]] == [3, 3] and timings.restarts == 2
    assert timings.growth["one"] >= 0 and timings.peak["one"] > 10_000_000 and len(timings.startup["one"]) == 2
    first, second = spans(tmp_path / "one"), spans(tmp_path / "two")
    assert len(first) == len(second) == 2  # fresh processes
    events = sorted(
        [(t, "one") for times in first.values() for t in times] + [(t, "two") for times in second.values() for t in times]
    )
    changes = sum(a[1] != b[1] for a, b in pairwise(events))
    assert changes <= 2 * (3 * 2 * 2 + 2 * 2)  # at most one per turn: restarts × (blocks × batches × arms + warm-ups)


def test_a_hanging_arm_is_killed_with_its_children(tmp_path):
    setup = "import subprocess; (pathlib.Path(folder) / 'child').write_text(str(subprocess.Popen(['sleep', '600']).pid))"
    arm = folder_arm(tmp_path, "hang", body="time.sleep(600)", setup=setup)
    process = Process("hang", arm_spec(arm, write_inputs({1: torch.zeros(1)}, tmp_path)), tmp_path)
    process.ask({"do": "ready"}, 120)
    with pytest.raises(ArmFailed, match=r"no answer within 0\.2 s; killed"):
        process.ask({"do": "block", "batch": 1, "calls": 1}, 0.2)
    assert process.process.returncode == -9
    assert wait_gone(int((tmp_path / "hang" / "child").read_text()))


def wait_gone(pid, seconds=20.0):
    """Whether a process is gone, or a zombie nobody has collected, within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_arms_die_with_a_parent_that_is_killed(tmp_path):
    """SIGKILL of the driver leaves it no time to clean up; the kernel does."""
    script = f"""
import sys, time
from pathlib import Path
from quadriga.measure.process import Process
arm = Process("x", {{"arm": {{"kind": "folder", "path": "{tmp_path}"}}, "inputs": {{}}}}, Path("{tmp_path}"))
arm.ask({{"do": "ready"}}, 60)
print(arm.process.pid, flush=True)
time.sleep(600)
"""
    (tmp_path / "load.py").write_text(LOAD.format(body="pass", setup="pass"))
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=user_environment())
    pid = int(driver.stdout.readline())
    os.kill(pid, 0)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert wait_gone(pid)


def test_arms_have_the_users_environment_and_find_the_same_imports():
    env = user_environment()
    assert not {k for k in set(env) - set(os.environ) if k.startswith(("OMP_", "KMP_", "GOMP_", "MKL_"))}
    assert {p for p in sys.path if p} <= set(env["PYTHONPATH"].split(os.pathsep))


def test_memory_of_a_fresh_process(tmp_path):
    """An arm that keeps 200 MB more than another grows by about that; this process's own peak does not count."""
    assert 0 < resident() <= peak_resident()
    ballast = bytearray(300_000_000)
    del ballast
    small = peak(folder_arm(tmp_path, "small"), {1: torch.zeros(1)})
    large = peak(folder_arm(tmp_path, "large", setup="keep = run_keep = b'x' * 200_000_000"), {1: torch.zeros(1)})
    assert 190_000_000 < large - small < 230_000_000
    assert small < 100_000_000


def test_an_unusable_arm_fails_with_its_reason(tmp_path):
    process = Process("bad", {"arm": {"kind": "folder", "path": str(tmp_path)}, "inputs": {}}, tmp_path)
    with pytest.raises(ArmFailed, match=r"load\.py"):
        process.ask({"do": "ready"}, 60)
    process.close()
    process.close()  # again is harmless


WORKLOAD = """
import torch
from torch import nn
from quadriga.core.workload import Workload
def work():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=g), torch.randint(3, (96,), generator=g)
    model = lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    return Workload(model=model, train=(x[:32], y[:32]), val=(x[32:64], y[32:64]), test=(x[64:], y[64:]), name="tiny")
"""


def test_the_workloads_data_are_not_the_models_memory(tmp_path):
    """What only the measurement has to load is left out, also where it is freed on the way."""
    ballast = "    global kept; kept = b'x' * 150_000_000; gone = b'y' * 150_000_000; del gone\n    g = "
    (tmp_path / "heavy.py").write_text(WORKLOAD.replace("    g = ", ballast))
    reference = f"{tmp_path / 'heavy.py'}:work"
    assert peak({"kind": "eager", "workload": reference}, {1: torch.zeros(1, 6)}, folder=tmp_path) < 100_000_000


def test_an_eager_arm_rebuilds_the_model_with_its_weights(tmp_path):
    """A checkpoint's weights come into the workload's model; the memory, matmul and thread settings are the spec's."""
    (tmp_path / "tiny.py").write_text(WORKLOAD)
    reference = f"{tmp_path / 'tiny.py'}:work"
    model = workloads.load(reference).build(seed=5)
    save_state(tmp_path / "state", model, None, {})
    arm = {"kind": "eager", "workload": reference, "checkpoint": str(tmp_path / "state"), "spec": {"matmul": "medium"}}
    was = torch.get_float32_matmul_precision()
    try:
        found = load_eager({**arm, "recipe": [{"method": "train", "epochs": 1}]})(torch.ones(2, 6))
    finally:
        torch.set_float32_matmul_precision(was)
    assert torch.allclose(found, model(torch.ones(2, 6)), atol=1e-2)
    timings = paired({"eager": arm}, {1: torch.ones(1, 6)}, restarts=1, blocks=1, block_seconds=0.01, folder=tmp_path / "w")
    assert not timings.errors and timings.latency(1, "eager").value > 0
