"""The engine of a cluster on an imitated one: who gets which order, what is tried again, what is not, and how many live."""

from __future__ import annotations

import pytest

from quadriga.core.errors import BadInput
from quadriga.core.trial import Status
from quadriga.engine.base import Order
from quadriga.engine.cluster import Died, Failed, Machine
from quadriga.engine.opening import Where, open_engine
from quadriga.engine.ray import GRACE, RETRIES, Ray
from quadriga.measure.machine import facts
from quadriga.testing import tiny_mlp

A, B, C = (Machine(n, f"host-{n}", 2, names=(n, f"host-{n}", f"10.0.0.{i}")) for i, n in enumerate("abc"))
DONE = {"status": "complete", "values": {}}


class Imitated:
    """A cluster in which a call ends when the test says how; workers are numbers."""

    def __init__(self, *machines, here="a", answers=None):
        self.alive, self.own, self.answers = list(machines), here, answers or {}
        self.clock, self.ended, self.calls = 0.0, {}, {}  # call → how it ended; call → (worker, name, given)
        self.where, self.dead, self.rooms, self.closed = {}, [], {}, False
        self.ready = lambda worker: True

    def machines(self):
        return list(self.alive)

    def here(self):
        return self.own

    def look(self, machines, folder, mark, text):
        usual = {"sees": True, "facts": facts(), "version": __import__("quadriga").__version__}
        return [self.answers.get(m.id, usual) for m in machines]

    def start(self, spec, machine, *, gpus=0.0, firm=True):
        self.where[worker := len(self.where)] = machine.id
        return worker

    def group(self, spec, ranks, *, gpus=0.0):
        room = f"room-{len(self.rooms)}"
        self.rooms[room] = True
        return room, [self.start(spec, Machine(room, room, 0)) for _ in range(ranks)]

    def call(self, worker, name, *given):
        ref = f"{name}-{len(self.calls)}"
        self.calls[ref] = (worker, name, given)
        if name == "ready" and self.ready(worker):
            self.ended[ref] = 1
        if name == "meeting_place":
            self.ended[ref] = ("10.0.0.9", 4711)
        return ref

    def wait(self, refs, timeout):
        found = [r for r in refs if r in self.ended][:1]
        self.clock += 0.0 if found else timeout
        return found

    def result(self, ref, timeout=None):
        if isinstance(self.ended[ref], Exception):
            raise self.ended[ref]
        return self.ended[ref]

    def kill(self, workers, room=None):
        self.dead += workers
        if room is not None:
            del self.rooms[room]

    def close(self):
        self.closed = True

    def running(self):
        """Task → the call, worker and rank that are at it."""
        left = {r: c for r, c in self.calls.items() if c[1] == "do" and r not in self.ended and c[0] not in self.dead}
        return [(given[1]["name"], ref, worker, given[2]) for ref, (worker, _, given) in left.items()]

    def end(self, name, how=DONE):
        """Let all who are at an order end so."""
        found = [ref for each, ref, _, _ in self.running() if each == name]
        assert found, f"nobody is at {name}"
        for ref in found:
            self.ended[ref] = how


def made(tmp_path, *machines, cluster=None, **options):
    cluster = cluster or Imitated(*(machines or (A, B)))
    return Ray(cluster, "w", tmp_path, 0, clock=lambda: cluster.clock, **options), cluster


def order(number, task="train", ranks=1, limit=1e6):
    return Order(number, task, {"name": f"order-{number}"}, limit, ranks)


def names(cluster):
    return sorted(name for name, *_ in cluster.running())


def test_orders_go_to_idle_workers_and_results_come_back(tmp_path):
    engine, cluster = made(tmp_path)
    assert engine.resources().workers == 4 and dict(engine.resources().machines) == {"host-a": 2, "host-b": 2}
    for number in range(6):
        engine.submit(order(number))
    assert engine.wait(0.1) is None and len(cluster.running()) == 4, "two wait for a worker"
    cluster.end("order-1")
    assert engine.wait(0.1) == (1, DONE)
    assert names(cluster) == ["order-0", "order-2", "order-3", "order-4"], "the worker is not idle while the driver thinks"


def test_what_is_timed_runs_on_the_target_alone(tmp_path):
    """Trainings take the other machine first; four timings are two at once on the target, and two wait."""
    engine, cluster = made(tmp_path)
    engine.wait(0.1)  # all are ready
    engine.submit(order(0))
    for number in range(1, 5):
        engine.submit(order(number, "cost"))
    engine.wait(0.1)
    places = {name: cluster.where[worker] for name, _, worker, _ in cluster.running()}
    assert places == {"order-0": "b", "order-1": "a", "order-2": "a"}
    other, there = made(tmp_path, target="host-b")
    other.wait(0.1)
    other.submit(order(1, "cost"))
    other.wait(0.1)
    assert there.where[there.running()[0][2]] == "b" and not other.resources().here and engine.resources().here


def test_live_workers_are_capped(tmp_path):
    engine, cluster = made(tmp_path, A, B, C, live=3)
    for number in range(9):
        engine.submit(order(number))
    engine.wait(0.1)
    assert len(cluster.running()) == 3 and len(cluster.where) == 3
    assert [cluster.where[w] for w in (0, 1)] == ["a", "a"], "the target has workers in any case"


def test_an_order_whose_worker_died_is_tried_again_and_not_for_ever(tmp_path):
    engine, cluster = made(tmp_path)
    engine.submit(order(7))
    for _ in range(RETRIES):
        assert engine.wait(0.1) is None
        cluster.end("order-7", Died("the worker is gone"))
        assert engine.wait(0.1) is None and names(cluster) == ["order-7"], "it is under way again"
    cluster.end("order-7", Died("again"))
    number, result = engine.wait(0.1)
    assert (
        number == 7 and result["status"] == Status.LOST and "died 3 times" in result["reason"] and "again" in result["reason"]
    )
    assert len(cluster.dead) == 3 and sum(len(p.workers) for p in engine.places) == 4, "each was replaced"


def test_an_error_of_the_work_is_not_tried_again(tmp_path):
    engine, cluster = made(tmp_path)
    engine.submit(order(3))
    engine.wait(0.1)
    cluster.end("order-3", Failed("KeyError: 'x'"))
    assert engine.wait(0.1) == (3, {"status": Status.FAILED, "reason": "KeyError: 'x'"}) and not cluster.running()


def test_a_time_limit_counts_from_the_beginning_of_the_work(tmp_path):
    cluster = Imitated(A)
    cluster.ready = lambda worker: cluster.clock >= 100
    engine, _ = made(tmp_path, cluster=cluster)
    engine.submit(order(1, limit=5.0))
    assert engine.wait(50.0) is None and not cluster.running(), "its worker is still starting"
    for ref, (_, name, _) in cluster.calls.items():
        if name == "ready":
            cluster.ended[ref] = 1
    number, result = engine.wait(20.0)
    assert number == 1 and result["status"] == Status.TIMED_OUT and "5 s" in result["reason"] and 54 < cluster.clock < 60


def test_ranks_are_placed_together_and_are_tried_again_together(tmp_path):
    """Room is made by ending idle workers; if one rank dies all do; the next life meets anew; one result comes back."""
    engine, cluster = made(tmp_path)
    engine.submit(order(1))
    engine.wait(0.1)
    engine.submit(order(2, ranks=3))
    engine.submit(order(3))
    engine.wait(0.1)
    ranks = [rank for name, _, _, rank in cluster.running() if name == "order-2"]
    assert [r["RANK"] for r in ranks] == ["0", "1", "2"] and {r["WORLD_SIZE"] for r in ranks} == {"3"}
    assert {(r["MASTER_ADDR"], r["MASTER_PORT"], r["LOCAL_RANK"]) for r in ranks} == {("10.0.0.9", "4711", "0")}
    assert sum(len(p.workers) for p in engine.places) == 4, "no more than may live"
    first = [worker for name, _, worker, _ in cluster.running() if name == "order-2"]
    ref = next(ref for name, ref, _, rank in cluster.running() if name == "order-2" and rank["RANK"] == "1")
    cluster.ended[ref] = Died("the machine is gone")
    engine.wait(0.1)
    again = [worker for name, _, worker, _ in cluster.running() if name == "order-2"]
    assert len(again) == 3 and not set(first) & set(again) and set(first) <= set(cluster.dead) and len(cluster.rooms) == 1
    for name, ref, _, rank in cluster.running():
        if name == "order-2":
            cluster.ended[ref] = {**DONE, "rank": rank["RANK"]}
    assert engine.wait(0.1) == (2, {**DONE, "rank": "0"}) and not cluster.rooms
    engine.wait(0.1)
    assert names(cluster) == ["order-1", "order-3"] and sum(len(p.workers) for p in engine.places) == 4


def test_a_trial_is_trained_by_as_many_ranks_as_are_asked_for(tmp_path):
    """Trainings alone; two of two ranks fill four workers, and count as two at once."""
    engine, cluster = made(tmp_path, ranks=2)
    for number in range(3):
        engine.submit(order(number))
    engine.submit(order(3, "cost"))
    engine.wait(0.1)
    assert names(cluster) == ["order-0", "order-0", "order-1", "order-1"] and engine.resources().workers == 2
    cluster.end("order-0")
    assert engine.wait(0.1) == (0, DONE)
    engine.wait(0.1)
    assert names(cluster) == ["order-1", "order-1", "order-2", "order-2"], "what was asked for earlier goes first"
    with pytest.raises(BadInput, match="5 ranks are wanted, and 4 workers"):
        made(tmp_path, ranks=5)


@pytest.mark.parametrize("heard", ["error first", "death first"])
def test_a_rank_s_death_explains_the_errors_of_the_others(tmp_path, heard):
    """Whose connection broke raises an error of its own, which may come before the death of the other is known."""
    engine, cluster = made(tmp_path)
    engine.submit(order(1, ranks=3))
    engine.wait(0.1)
    ranks = {rank["RANK"]: ref for _, ref, _, rank in cluster.running()}
    how = [("0", Failed("RuntimeError: connection closed by peer")), ("2", Died("the worker is gone"))]
    for rank, end in how if heard == "error first" else how[::-1]:
        cluster.ended[ranks[rank]] = end
        assert engine.wait(GRACE / 2) is None
    assert names(cluster) == ["order-1"] * 3 and len(cluster.rooms) == 1, "all are at it again"
    cluster.end("order-1")
    assert engine.wait(0.1) == (1, DONE)


def test_a_rank_s_error_without_a_death_is_the_work_s_own(tmp_path):
    """The others wait for it in vain, and are ended after the grace; nothing is tried again."""
    engine, cluster = made(tmp_path)
    engine.submit(order(1, ranks=2))
    engine.wait(0.1)
    ref = next(ref for _, ref, _, rank in cluster.running() if rank["RANK"] == "1")
    cluster.ended[ref] = Failed("KeyError: 'x'")
    assert engine.wait(GRACE - 5) is None
    assert engine.wait(20.0) == (1, {"status": Status.FAILED, "reason": "KeyError: 'x'"}) and not cluster.rooms
    engine.submit(order(2, ranks=2))
    engine.wait(0.1)
    cluster.end("order-2", Failed("ValueError: both"))
    assert engine.wait(0.1) == (2, {"status": Status.FAILED, "reason": "ValueError: both"})


def test_a_group_waits_for_room_and_is_not_overtaken(tmp_path):
    engine, cluster = made(tmp_path)
    for number in range(4):
        engine.submit(order(number))
    engine.wait(0.1)
    engine.submit(order(4, ranks=4))
    for number in range(5, 9):
        engine.submit(order(number))
    for number in range(4):
        cluster.end(f"order-{number}")
        assert engine.wait(0.1) == (number, DONE)
        engine.wait(0.1)
        assert names(cluster) == ([f"order-{n}" for n in range(number + 1, 4)] or ["order-4"] * 4)
    engine.submit(order(9, ranks=5))
    number, result = engine.wait(0.1)
    assert number == 9 and result["status"] == Status.REFUSED and "5 ranks" in result["reason"]


def test_orders_are_given_up(tmp_path):
    engine, cluster = made(tmp_path, A)
    for number in range(4):
        engine.submit(order(number))
    engine.wait(0.1)
    engine.cancel(0)
    engine.cancel(2)
    engine.wait(0.1)
    assert names(cluster) == ["order-1", "order-3"] and len(cluster.dead) == 1
    engine.submit(order(5))
    engine.cancel()
    cluster.end("order-1")
    assert engine.wait(0.1) == (1, DONE) and engine.wait(0.1) is None and names(cluster) == ["order-3"]
    engine.renew()
    assert not cluster.running() and engine.wait(0.1) is None and len(engine.places) == 2
    engine.close()
    assert cluster.closed and not engine.places and len(cluster.dead) == len(cluster.where)


def test_machines_that_cannot_be_used_are_named(tmp_path):
    usual = {"sees": True, "facts": facts(), "version": __import__("quadriga").__version__}
    for answer, words in [
        ({**usual, "sees": False}, "host-b does not see"),
        ({**usual, "version": "0.0.1"}, "has Quadriga 0.0.1"),
        ({**usual, "facts": {**facts(), "torch": "1.0"}}, "has torch 1.0"),
        ("No module named 'quadriga'", "cannot run Quadriga: No module"),
    ]:
        with pytest.raises(BadInput, match=words):
            made(tmp_path, cluster=Imitated(A, B, answers={"b": answer}))
    with pytest.raises(BadInput, match='no machine "host-x"'):
        made(tmp_path, target="host-x")
    with pytest.raises(BadInput, match="no core to give away on host-d"):
        made(tmp_path, cluster=Imitated(Machine("d", "host-d", 0, names=("d",)), A, here="d"))
    assert not list(tmp_path.iterdir()), "what machines were shown is gone"


def test_machines_come_and_go(tmp_path):
    """A new one that does not see the folder is left out with a note; one that leaves takes nothing with it but its workers."""
    cluster = Imitated(A, B, answers={"c": {"sees": False, "facts": facts(), "version": __import__("quadriga").__version__}})
    engine, _ = made(tmp_path, cluster=cluster)
    cluster.alive = [A, B, C]
    engine.wait(11.0)
    engine.wait(11.0)
    assert "host-c joined and is not used" in engine.machines.notes[0] and dict(engine.resources().machines) == {
        "host-a": 2,
        "host-b": 2,
    }
    for number in range(3):
        engine.submit(order(number))
    engine.wait(0.1)
    cluster.alive = [A]
    for _, ref, worker, _ in cluster.running():
        if cluster.where[worker] == "b":
            cluster.ended[ref] = Died("the machine is gone")
    engine.wait(0.1)
    engine.wait(0.1)
    assert dict(engine.resources().machines) == {"host-a": 2} and {cluster.where[w] for _, _, w, _ in cluster.running()} == {
        "a"
    }
    cluster.alive = [B]
    with pytest.raises(BadInput, match="host-a, on which latency is measured, has left"):
        engine.wait(30.0)


def test_only_machines_like_the_target_where_costs_are_compared(tmp_path):
    other = {"sees": True, "facts": {**facts(), "processor": "another"}, "version": __import__("quadriga").__version__}
    cluster = Imitated(A, B, answers={"b": other})
    engine, _ = made(tmp_path, cluster=cluster, alike=True)
    assert dict(engine.resources().machines) == {"host-a": 2}
    assert dict(made(tmp_path, cluster=Imitated(A, B, answers={"b": other}))[0].resources().machines) == {
        "host-a": 2,
        "host-b": 2,
    }


def test_a_machine_where_nothing_starts_is_left_out(tmp_path):
    cluster = Imitated(A, B)
    cluster.ready = lambda worker: cluster.where[worker] == "a"
    engine, _ = made(tmp_path, cluster=cluster)
    for _ in range(4):
        for ref, (worker, name, _) in list(cluster.calls.items()):
            if name == "ready" and cluster.where[worker] == "b" and ref not in cluster.ended:
                cluster.ended[ref] = Failed("ImportError: torch")
        engine.wait(0.1)
    assert dict(engine.resources().machines) == {"host-a": 2} and "ImportError: torch" in engine.machines.notes[-1]


def test_a_worker_that_never_has_the_workload_is_ended(tmp_path):
    """Its machine gets no more than three; what was given to it goes on elsewhere."""
    cluster = Imitated(A, B)
    cluster.ready = lambda worker: cluster.where[worker] == "a"
    engine, _ = made(tmp_path, cluster=cluster, loading=50.0)
    for _ in range(4):
        engine.wait(60.0)
    on_b = {worker for worker, where in cluster.where.items() if where == "b"}
    assert on_b <= set(cluster.dead) and len(on_b) <= 4 and "not loaded within 50 s" in engine.machines.notes[-1]
    assert dict(engine.resources().machines) == {"host-a": 2}


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(BadInput, match='did you mean "ray"'):
        Where("rey")
    with pytest.raises(BadInput, match="settings of the engine ray"):
        Where("local", target="x")
    with pytest.raises(BadInput, match="gpus and ranks: settings of the engine ray"):
        Where("local", ranks=2, gpus=1)
    with pytest.raises(BadInput, match="live is 0"):
        Where("ray", live=0)
    with pytest.raises(BadInput, match="live object"):
        open_engine(tiny_mlp(), tmp_path, 0, Where("ray"))
    assert Where("ray", live=3).changed() == {"engine": "ray", "live": 3} and not Where().changed()
