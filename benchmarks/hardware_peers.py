"""What other tools make of the same trained network, by the few lines that their documentation gives: peers of `hardware.py`.

Each ends as a folder with a `load.py` that is called like an artifact's. ONNX Runtime's own quantization and ExecuTorch come
from the environment that runs the benchmark; NNCF has one of its own, made beside the results, since only its result is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quadriga.core.batch import call
from quadriga.core.errors import BadInput
from quadriga.core.workload import Workload
from quadriga.measure.arm import load_folder
from quadriga.measure.ceilings import ceilings
from quadriga.measure.quality import Scores, score
from quadriga.train.checkpoint import load_model
from quadriga.workloads import load

HERE = Path(__file__).resolve().parent
CALIBRATION, BATCH = 256, 32  # examples of train, and how many at a time
SIZES = (1, 64)  # that ExecuTorch's programs are made for
NNCF = ("nncf==3.4.0", "openvino==2026.4.1")


class Peer:
    """A trained network, exported once, and its calibration batches.

    Args:
        workload: of its data.
        model: trained, in eval mode.
        folder: for all that is made.
    """

    def __init__(self, workload: Workload, model: nn.Module, folder: Path) -> None:
        self.workload, self.model, self.folder = workload, model, folder
        chosen = torch.linspace(0, len(workload.calibration_source) - 1, CALIBRATION).long()
        self.batches = [leaves(workload.calibration_source.batch(part).inputs) for part in chosen.split(BATCH)]
        self.sequences = not torch.is_floating_point(self.batches[0][0])

    def onnx(self) -> Path:
        """The float32 file, by PyTorch's own exporter, its batch left open."""
        path = self.folder / "float32" / "model.onnx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            example = leaves(self.workload.inputs(2))
            shapes = tuple({0: torch.export.Dim("batch")} for _ in example)
            program = torch.onnx.export(Plain(self.model, self.workload.inputs(2)), tuple(example), dynamo=True,
                                        dynamic_shapes=(shapes,), verbose=False)  # fmt: skip
            assert program is not None
            program.save(path, external_data=False)
        return path

    def names(self) -> list[str]:
        """Of the file's inputs."""
        import onnxruntime

        return [i.name for i in onnxruntime.InferenceSession(self.onnx(), providers=["CPUExecutionProvider"]).get_inputs()]

    def feeds(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Calibration batches as ONNX Runtime takes them."""
        names = self.names()
        yield from ({n: t.numpy() for n, t in zip(names, batch, strict=True)} for batch in self.batches)


class Plain(nn.Module):
    """A model whose inputs are a flat list of tensors, as exporters like them."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model, self.spec = model, pytree.tree_structure(example)

    def forward(self, *given: Tensor) -> Any:
        """Outputs as the model gives them, a tensor or a tuple."""
        found = call(self.model, pytree.tree_unflatten(list(given), self.spec))
        return found if isinstance(found, Tensor) else tuple(pytree.tree_leaves(found))


def leaves(inputs: Any) -> list[Tensor]:
    """The tensors of an inputs tree."""
    return list(pytree.tree_leaves(inputs))


def ort_float(peer: Peer) -> dict[str, Any]:
    """onnxruntime.InferenceSession on one thread."""
    return {"kind": "onnxruntime", "file": str(peer.onnx())}


def ort_static(peer: Peer) -> dict[str, Any]:
    """quantize_static after quant_pre_process: QDQ, a scale per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = peer.feeds()

        def get_next(self) -> Any:
            return next(self.feeds, None)

    ready, path = peer.folder / "float32/ready.onnx", peer.folder / "ort-static.onnx"
    quant_pre_process(str(peer.onnx()), str(ready))
    quantize_static(str(ready), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return {"kind": "onnxruntime", "file": str(path)}


def ort_dynamic(peer: Peer) -> dict[str, Any]:
    """quantize_dynamic."""
    from onnxruntime.quantization import quantize_dynamic

    path = peer.folder / "ort-dynamic.onnx"
    quantize_dynamic(str(peer.onnx()), str(path))
    return {"kind": "onnxruntime", "file": str(path)}


def openvino_default(peer: Peer) -> dict[str, Any]:
    """OpenVINO as it comes, which computes in bfloat16 where the processor does."""
    return {"kind": "openvino", "file": str(peer.onnx())}


def nncf(peer: Peer) -> dict[str, Any]:
    """nncf.quantize, with the preset for transformers where inputs are tokens; run by OpenVINO."""
    python = peer.folder.parent.parent / "nncf/bin/python"
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
    if subprocess.run([python, "-c", "import nncf"], capture_output=True, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *NNCF], check=True)
    kept, path = peer.folder / "calibration.npz", peer.folder / "nncf.xml"
    arrays = {f"{n:03}-{i}": t.numpy() for n, batch in enumerate(peer.batches) for i, t in enumerate(batch)}
    np.savez(kept, **arrays)  # type: ignore[arg-type]
    command = [python, HERE / "hardware_nncf.py", peer.onnx(), kept, path, "transformer" if peer.sequences else "plain"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"kind": "openvino", "file": str(path)}


def executorch_int8(peer: Peer) -> dict[str, Any]:
    """XNNPACKQuantizer by PT2E, dynamic where inputs are tokens, and XnnpackPartitioner: a program for each batch size."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def int8(module: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
        config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=peer.sequences)
        ready = prepare_pt2e(torch.export.export(module, example).module(), XNNPACKQuantizer().set_global(config))
        size = example[0].shape[0]
        for batch in peer.batches[: 8 if size == 1 else 2]:
            repeated = [t.repeat(-(-size // len(t)), *[1] * (t.dim() - 1))[:size] for t in batch]
            ready(*repeated)
        return convert_pt2e(ready)  # type: ignore[no-any-return]

    return _executorch(peer, "int8", int8)


def executorch_float(peer: Peer) -> dict[str, Any]:
    """XnnpackPartitioner alone."""
    return _executorch(peer, "float32", lambda module, example: module)


def _executorch(peer: Peer, name: str, change: Callable[[nn.Module, tuple[Tensor, ...]], nn.Module]) -> dict[str, Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    files = {}
    for size in SIZES:
        example = tuple(leaves(peer.workload.inputs(size)))
        plain = change(Plain(peer.model, peer.workload.inputs(2)).eval(), example)
        edge = to_edge_transform_and_lower(torch.export.export(plain, example), partitioner=[XnnpackPartitioner()])
        path = peer.folder / f"executorch-{name}-{size}.pte"
        path.write_bytes(edge.to_executorch().buffer)
        files[str(size)] = str(path)
    return {"kind": "executorch", "files": files, "file": files["64"]}


PEERS = {
    "ONNX Runtime float32": ort_float,
    "ONNX Runtime int8 static": ort_static,
    "ONNX Runtime int8 dynamic": ort_dynamic,
    "OpenVINO as it comes": openvino_default,
    "NNCF int8 in OpenVINO": nncf,
    "ExecuTorch float32": executorch_float,
    "ExecuTorch int8": executorch_int8,
}


def make(
    workload: Workload, folder: Path, base: Mapping[str, Any] | None, names: Sequence[str] = tuple(PEERS)
) -> dict[str, dict[str, Any]]:
    """Name → fields of a row: made once, scored on test."""
    assert base is not None
    model = workload.build(0)
    if base["checkpoint"]:
        load_model(Path(base["checkpoint"]), model)
    peer = Peer(workload, model.eval(), folder / "peers")
    return {f"peer: {name}": _made(peer, name, PEERS[name]) for name in names}


def _made(peer: Peer, name: str, function: Callable[[Peer], dict[str, Any]]) -> dict[str, Any]:
    there = peer.folder / name.replace(" ", "-")
    kept = there / "peer.json"
    if not kept.exists():
        there.mkdir(parents=True, exist_ok=True)
        try:
            with torch.no_grad():
                facts = {"threads": 1, **function(peer)}
        except Exception as error:  # a peer that cannot do it is a result
            traceback.print_exc()
            return {
                "arm": None,
                "refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
            }
        (there / "load.py").write_bytes((HERE / "hardware_load.py").read_bytes())
        kept.write_text(json.dumps(facts))
    file = Path(json.loads(kept.read_text())["file"])
    weights = file.stat().st_size + (file.with_suffix(".bin").stat().st_size if file.suffix == ".xml" else 0)
    try:
        scores = scored(peer.workload, there)
    except Exception as error:
        return {"arm": None, "refused": f"{type(error).__name__}: {error}"}
    print(f"[hardware] {name}: {scores.value:.4f}", file=sys.stderr, flush=True)
    steps = " ".join((function.__doc__ or "").split())
    return {"arm": {"kind": "folder", "path": str(there.resolve())}, "bytes": float(weights), "scores": scores, "steps": steps}


def scored(workload: Workload, folder: Path) -> Scores:
    """The test split through a folder's `load.py`."""
    run = load_folder(folder)
    with torch.inference_mode():
        return score(run, workload.test, workload.metric, 256)


def ceilings_on_one_thread() -> dict[str, float]:
    """Type → products per second that this machine reaches with one thread, in FLOP/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, float] = {k: v for k, v in ceilings(1).products.items() if v}
    finally:
        torch.set_num_threads(before)
    return found


def size(folder: Path) -> float:
    """Bytes of an artifact's files that `load.py` reads."""
    from quadriga.runtime import open_built

    return float(open_built(folder).bytes)


def fetched(name: str) -> bool:
    """Whether a workload's pretrained weights and data are here."""
    try:
        load(name)
    except BadInput:
        return False
    return True
