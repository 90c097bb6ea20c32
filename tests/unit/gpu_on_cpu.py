"""What `torch.cuda` does for streams and graphs, imitated on the CPU, so that the code around it can be tried without a GPU.

A graph keeps the operators that ran while it was recorded, with the tensors that they read and wrote, and runs them again on
these same tensors: what a recording's buffers do to its callers shows here as it would there.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

H100 = {"name": "NVIDIA H100", "capability": "9.0", "memory": 80 * 10**9, "bf16": True, "fp16": True, "tf32": True}
TURING = {"name": "Tesla T4", "capability": "7.5", "memory": 16 * 10**9, "bf16": False, "fp16": True, "tf32": False}


class Graph:
    """Operators with their arguments and results."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Keeps what is called in a graph; an operator that waits for values is an error there, as CUDA has it."""

    def __init__(self, graph, **options):
        super().__init__()
        self.graph, self.options = graph, options

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results


class Stream:
    """Notes whom it waits for."""

    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


class Imitation:
    """Takes the place of what `torch.cuda` has of these names, until `monkeypatch` is undone."""

    def __init__(self, monkeypatch):
        self.now, self.graphs, self.log, self.mode = Stream(), [], [], 0
        names = ("current_stream", "stream", "graph_pool_handle", "synchronize", "device", "set_sync_debug_mode")
        for name in (*names, "get_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.made)
        monkeypatch.setattr(torch.cuda, "graph", Recorder)

    def made(self):
        self.graphs.append(Graph())
        return self.graphs[-1]

    def current_stream(self, device=None):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def graph_pool_handle(self):
        return (0, 1)

    def synchronize(self, device=None):
        self.log.append("synchronize")

    def device(self, device):
        return contextlib.nullcontext()

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode
        self.log.append(f"sync {mode}")
