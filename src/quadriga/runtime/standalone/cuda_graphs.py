"""CUDA graphs of a program's kernels."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.runtime.standalone.folder import RUNTIMES
from quadriga.runtime.standalone.pytorch import channels_last, gpu_of, load_weights, program, torch_settings
from quadriga.runtime.standalone.trees import Leaves, Tree, shaped, single_tensor

RECORDED = 16  # shapes of inputs, for which a recording is kept


def cuda_graphs_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Replay program.py, recorded as a CUDA graph at the first call of each shape of inputs. Calls take turns."""
    torch_settings(entry["session"], threads)
    gpu = gpu_of(entry["session"])
    assert gpu is not None, "cuda_graphs is built for a GPU"
    weights, forward, nhwc = load_weights(folder, entry, gpu), program(folder, entry), entry["session"]["channels_last"]
    call = Replay(lambda leaves: list(forward(None, *weights, *leaves)), gpu, nhwc)

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    return single if single_tensor(entry) else shaped(entry, call)


class Replay:
    """Recordings by the shapes and types of inputs, the last `RECORDED` of them; they share intermediate memory."""

    def __init__(self, run: Leaves, gpu: torch.device, nhwc: bool) -> None:
        self.run, self.gpu, self.nhwc = run, gpu, nhwc
        self.ready: dict[tuple[Any, ...], Recording] = {}
        self.lock, self.last = threading.Lock(), torch.cuda.current_stream(gpu)
        self.place = (gpu, torch.cuda.Stream(gpu), torch.cuda.graph_pool_handle())

    def __call__(self, leaves: list[Tensor]) -> list[Tensor]:
        """Input tensors in either memory → outputs in memory of their own, where the first input lies."""
        home, key = leaves[0].device, tuple((x.shape, x.dtype) for x in leaves)
        with self.lock, torch.no_grad():
            stream = torch.cuda.current_stream(self.gpu)
            if stream != self.last:  # the buffers may still be in use on the other one
                stream.wait_stream(self.last)
                self.last = stream
            recording = self.ready.get(key) or self.record(key, leaves)
            outputs = recording.replay(leaves)
            return [y.clone() if home == self.gpu else y.to(home) for y in outputs]  # the next call writes there

    def record(self, key: tuple[Any, ...], leaves: list[Tensor]) -> Recording:
        """A new recording, in place of the oldest one if there are too many."""
        while len(self.ready) >= RECORDED:
            torch.cuda.synchronize(self.gpu)  # it may be running
            self.ready.pop(next(iter(self.ready)))
        self.ready[key] = made = Recording(self.run, leaves, self.place, self.nhwc)
        return made


class Recording:
    """A program's kernels for inputs of one shape, with buffers for its inputs and outputs.

    Args:
        run: the program.
        leaves: inputs of that shape.
        place: the GPU, the stream to record on, and the memory that recordings share: they are replayed in turn, and nothing is
            left in it from one to the next.
        nhwc: whether buffers of images are channels-last.

    Raises:
        RuntimeError: it reads values back while it runs.
    """

    def __init__(self, run: Leaves, leaves: list[Tensor], place: tuple[Any, Any, Any], nhwc: bool) -> None:
        self.run, self.graph, gpu = run, None, place[0]
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(gpu), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inputs = [channels_last(x.to(gpu, copy=True)) if nhwc else x.to(gpu, copy=True) for x in leaves]
            if all(x.numel() for x in self.inputs):  # of no examples, no kernel would be recorded
                self._warm(*place)
                self._record(*place)

    def _warm(self, gpu: torch.device, side: Any, pool: Any) -> None:
        """Run beside the caller's stream, so that libraries and plans are ready; the last time, reading back is an error."""
        here, mode = torch.cuda.current_stream(gpu), torch.cuda.get_sync_debug_mode()
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                for number in range(3):
                    if number == 2:
                        torch.cuda.set_sync_debug_mode("error")
                    self.run(self.inputs)
        except RuntimeError as error:
            raise RuntimeError(f"no CUDA graph can be recorded: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            here.wait_stream(side)

    def _record(self, gpu: torch.device, side: Any, pool: Any) -> None:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(gpu)
        recording, collects = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"), gc.isenabled()
        gc.disable()  # what it would free, such as another recording, would spoil this one
        try:
            with torch.cuda.stream(here), recording:  # one that fails leaves its own stream behind as the current one
                self.outputs = self.run(self.inputs)
        finally:
            if collects:
                gc.enable()
        self.graph = graph

    def replay(self, leaves: list[Tensor]) -> list[Tensor]:
        """The outputs' buffers, once these inputs have been worked off."""
        for buffer, x in zip(self.inputs, leaves, strict=True):
            buffer.copy_(x, non_blocking=True)
        if self.graph is None:
            return self.run(self.inputs)
        self.graph.replay()
        return self.outputs


RUNTIMES["cuda_graphs"] = cuda_graphs_model
