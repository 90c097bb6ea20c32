"""Finished models for a GPU, tried without one: programs, recordings on an imitated GPU, transfer, clocks, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_on_cpu import Imitation, Stream
from torch import nn

from quadriga import runtime
from quadriga.core import cuda
from quadriga.core.batch import Batch, evaluating
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.products import products_kept
from quadriga.core.setup import Context
from quadriga.core.slots import RuntimeSpec
from quadriga.engine.timing import in_turn
from quadriga.measure import arm
from quadriga.measure.timings import Timings
from quadriga.runtime import _program, cudagraphs, standalone
from quadriga.runtime._capture import capture
from quadriga.testing import tiny_cnn, tiny_mlp
from quadriga.testing.setups import trained_setup
from quadriga.train.transfer import Transfer

NONE = cuda.Found((), "13.0", "", "there is no NVIDIA GPU", "check the driver")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "found", lambda: NONE)


# programs


class Placed(nn.Module):
    """Makes tensors on the CPU, in the ways that models do."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.table(tokens) + torch.arange(tokens.shape[1])[:, None] + torch.zeros(8, device="cpu")
        return self.out(x + torch.full((1,), 2.0).to("cpu")).mean(1)


class Chooses(nn.Module):
    """Goes by its values."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Counts(nn.Module):
    """How much it computes goes by its values."""

    def forward(self, x):
        return x[x > 0].sum() + x


def taken_of(model, inputs):
    context = Context(inputs[:2], (Batch(inputs, None, torch.arange(len(inputs))),), accuracy)
    with evaluating(model):
        return capture(model, context)


def test_a_program_makes_its_tensors_where_it_is_meant_to_run():
    """Moved to the device "meta" no tensor of the CPU is met, which PyTorch would refuse."""
    taken = taken_of(Placed().eval(), torch.randint(20, (8, 5)))
    moved = _program.on_device(taken.program.graph_module, "meta")
    names, found = _program.program_weights(taken)
    weights = [None if n is None else found[n].to("meta") for n in names]
    assert moved(*weights, torch.zeros(4, 5, dtype=torch.int64, device="meta"))[0].device.type == "meta"
    here = [n for part in (taken.program.graph_module, moved) for n in part.graph.nodes if "device" in n.kwargs]
    assert {str(n.kwargs["device"]) for n in here} == {"cpu", "meta"}  # the original is left alone


def test_what_is_written_says_its_device(tmp_path):
    taken = taken_of(Placed().eval(), torch.randint(20, (8, 5)))
    entry = cudagraphs.write(taken, RuntimeSpec("cuda_graphs", device="cuda"), tmp_path, [1])
    text = (tmp_path / "program.py").read_text()
    assert entry["session"]["device"] == "cuda" and "device(type='cuda')" in text and "'cpu'" not in text
    assert entry["tolerance"] == 1e-4
    assert _program.write_program(taken, RuntimeSpec(device="cuda", matmul="high"), tmp_path)["tolerance"] == 1e-2


@pytest.mark.parametrize(("model", "words"), [(Chooses(), "cond goes by values"), (Counts(), "aten.index.Tensor waits for")])
def test_what_cannot_be_recorded_is_refused_when_it_is_built(model, words, tmp_path):
    taken = taken_of(model, torch.randn(8, 4))
    with pytest.raises(NotApplicable, match=f"no CUDA graph can be recorded: {words}"):
        cudagraphs.write(taken, RuntimeSpec("cuda_graphs", device="cuda"), tmp_path, [1])


@pytest.mark.parametrize("name", ["eager", "inductor", "cuda_graphs"])
def test_building_for_an_absent_gpu_is_refused(name, without_gpu, tmp_path):
    setup = trained_setup(tiny_mlp)
    with pytest.raises(NotApplicable, match=r"there is no NVIDIA GPU \(check the driver\)"):
        runtime.build(setup.model, RuntimeSpec(name, device="cuda"), setup.context, tmp_path)


def test_an_unknown_device_is_bad_input(tmp_path):
    setup = trained_setup(tiny_mlp)
    with pytest.raises(BadInput, match='no device "tpu"'):
        runtime.build(setup.model, RuntimeSpec(device="tpu"), setup.context, tmp_path)


@pytest.mark.parametrize("name", ["eager", "inductor", "cuda_graphs"])
def test_an_artifact_for_a_gpu_says_so_where_there_is_none(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    entry = written(tiny_mlp().build(0).eval(), torch.randn(8, 10), tmp_path, name, device="cuda")
    with products_kept(), pytest.raises(RuntimeError, match=r"runs on an NVIDIA GPU, and this PyTorch .*nvidia-smi"):
        standalone.RUNTIMES[name](tmp_path, entry, 1)
    with products_kept(), pytest.raises(RuntimeError, match="runs on an NVIDIA GPU"):
        runtime.prepare(tiny_mlp().build(0), RuntimeSpec(device="cuda"))


def written(model, inputs, folder, name="cuda_graphs", device="cpu", **fields):
    """A folder as `build` would write it, and its entry."""
    taken = taken_of(model, inputs)
    entry = {"batches": [1], "inputs": taken.inputs, "names": taken.names, "outputs": taken.outputs, "rank": taken.rank}
    return entry | _program.write_program(taken, RuntimeSpec(name, device=device, **fields), folder)


# recordings, on an imitated GPU


class Pair(nn.Module):
    """Two inputs, two outputs, of which one is an input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, a, b):
        return torch.relu(self.inner(a)) * b, a


@pytest.fixture
def imitated(monkeypatch):
    monkeypatch.setattr(standalone.cuda_graphs, "gpu_of", lambda session: torch.device("cpu"))
    return Imitation(monkeypatch)


@pytest.mark.parametrize("nhwc", [False, True])
def test_a_recording_gives_the_models_values_in_memory_of_their_own(nhwc, imitated, tmp_path):
    workload = tiny_cnn()
    model, inputs = workload.build(0).eval(), workload.val.batch(torch.arange(16)).inputs
    run = standalone.cuda_graphs.cuda_graphs_model(tmp_path, written(model, inputs, tmp_path, channels_last=nhwc), 1)
    kept = []
    with torch.no_grad():
        for size in (1, 2, 16, 2, 1):
            kept.append((run(inputs[:size]), model(inputs[:size])))
            kept.append((run(inputs[-size:]), model(inputs[-size:])))
    for found, expected in kept:  # after all calls: none wrote into another's outputs
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [g.replays for g in imitated.graphs] == [4, 4, 2]
    assert imitated.log.count("sync error") == 3 and imitated.mode == 0


def test_several_inputs_and_outputs_and_no_examples(imitated, tmp_path):
    model, leaves = Pair().eval(), (torch.randn(6, 4), torch.randn(6, 4))
    context = Context(tuple(x[:2] for x in leaves), (Batch(leaves, None, torch.arange(6)),), accuracy)
    taken = capture(model, context)
    entry = {"batches": [1], "inputs": taken.inputs, "names": taken.names, "outputs": taken.outputs, "rank": taken.rank}
    entry |= _program.write_program(taken, RuntimeSpec("cuda_graphs"), tmp_path)
    run = standalone.cuda_graphs.cuda_graphs_model(tmp_path, entry, 1)
    with torch.inference_mode():  # the buffers have to outlive it
        first = run(leaves)
    again = run(tuple(2 * x for x in leaves))
    torch.testing.assert_close(first, model(*leaves))
    torch.testing.assert_close(again, model(*(2 * x for x in leaves)))
    nothing = run(tuple(x[:0] for x in leaves))
    assert [y.shape for y in nothing] == [(0, 4), (0, 4)] and len(imitated.graphs) == 1


def test_the_oldest_recording_makes_room_and_another_stream_waits(imitated, tmp_path, monkeypatch):
    monkeypatch.setattr(standalone.cuda_graphs, "RECORDED", 2)
    model, inputs = tiny_mlp().build(0).eval(), torch.randn(8, 10)
    run = standalone.cuda_graphs.cuda_graphs_model(tmp_path, written(model, inputs, tmp_path), 1)
    for size in (1, 2, 3, 1):
        torch.testing.assert_close(run(inputs[:size]), model(inputs[:size]).detach())
    assert len(imitated.graphs) == 4 and imitated.log.count("synchronize") == 2
    before, other = imitated.now, Stream()
    with imitated.stream(other):
        run(inputs[:1])
        run(inputs[:1])
    assert other.waited == [before]


def test_reading_values_back_is_an_error_that_names_it(imitated, monkeypatch):
    def reading(leaves):
        if imitated.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return [leaves[0] * leaves[0].sum().item()]

    with pytest.raises(RuntimeError, match="no CUDA graph can be recorded: called a synchronizing"):
        standalone.cuda_graphs.Recording(reading, [torch.ones(2)], (torch.device("cpu"), Stream(), None), False)
    assert imitated.mode == 0 and not imitated.graphs


def test_nothing_is_collected_while_kernels_are_recorded(imitated):
    """What the collector frees may belong to another recording, and would end this one."""
    seen = []

    def run(leaves):
        seen.append(gc.isenabled())
        if len(seen) == 8:
            raise MemoryError
        return [leaves[0] + 1]

    place = (torch.device("cpu"), Stream(), None)
    assert standalone.cuda_graphs.Recording(run, [torch.ones(2)], place, False).replay([torch.zeros(2)])[0].tolist() == [1, 1]
    with pytest.raises(MemoryError):
        standalone.cuda_graphs.Recording(run, [torch.ones(2)], place, False)
    assert seen == [True, True, True, False] * 2 and gc.isenabled()


# transfer


def test_a_batch_is_pinned_copied_aside_and_waited_for(monkeypatch):
    """What moves is pinned and belongs to both streams, which the computation waits for; what is there stays."""
    imitated, pinned, recorded = Imitation(monkeypatch), [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda t: t.dtype is torch.float64)
    real = torch.Tensor.to

    def to(t, device, non_blocking=False):
        assert non_blocking and imitated.now is transfer.stream
        return real(t, device)

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: recorded.append((t, stream)))
    transfer, here = Transfer(torch.device("meta")), imitated.now
    there = torch.ones(2, device="meta")
    batch = Batch({"x": torch.ones(2, 3), "y": (there,)}, torch.ones(2, dtype=torch.float64), torch.arange(2), augmented=True)
    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = transfer(batch)
    monkeypatch.setattr(torch.Tensor, "to", real)
    assert [t.dtype for t in pinned] == [torch.float32, torch.int64]  # the target was pinned by the feed
    assert here.waited == [transfer.stream] and {stream for _, stream in recorded} == {here} and len(recorded) == 3
    assert moved.inputs["y"][0] is there and moved.target.device.type == "meta" and moved.augmented and moved.weight is None
    all_there = moved
    assert transfer(all_there) is all_there and len(here.waited) == 1


# clocks


class OnGPU:
    """Stands for a tensor whose values come later."""

    is_cuda, device = True, "cuda:0"


def test_every_clock_waits_for_outputs_on_a_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    cuda.settle({"a": (torch.ones(1), [OnGPU()]), "b": None})
    assert waited == ["cuda:0"]
    cuda.settle(torch.ones(1))
    cuda.synchronize("cpu")
    assert len(waited) == 1
    ticks = iter(range(100))
    in_turn([OnGPU], rounds=3, rest=0, clock=lambda: next(ticks))  # a tick is a second: one call is a block
    assert len(waited) == 1 + 2 + 3
    arm.block(lambda x: OnGPU(), None, 20)
    assert len(waited) == 6 + 2  # before the clock starts and before it stops
    arm.warm(lambda x: OnGPU(), None, 0.0)
    assert len(waited) == 8 + 3


def test_memory_on_the_gpu_is_the_arms_too(monkeypatch):
    assert cuda.peak_allocated() == 0 or torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 77)
    server = arm.Server.__new__(arm.Server)
    server.base, server.startup = 10**15, 0.5
    facts = server.answer({"do": "end"})
    assert (facts["growth"], facts["device"]) == (77, 77)
    timings = Timings.empty([1], ["a"], 1)
    timings.add("a", {}, facts)
    assert timings.device == {"a": 77} and Timings.from_plain(timings.plain()) == timings
