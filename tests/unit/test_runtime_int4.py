"""4-bit weights: bounds, packing, and every runtime computes with the very weights that the file holds."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from quadriga import runtime
from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.metric import accuracy
from quadriga.core.setup import Context
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.methods.hardware.quantize_int4 import QuantizeInt4
from quadriga.runtime._int4 import int4, pack
from quadriga.runtime.standalone import unpack4
from quadriga.testing import tiny_cnn
from quadriga.testing.setups import trained_setup


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize(("columns", "groups"), [(96, 3), (32, 1), (33, 1), (7, 1)])
def test_errors_are_bounded_and_packing_loses_nothing(columns, groups):
    weight = torch.randn(5, columns)
    weight[2] = 0.0
    q, scale = int4(weight, 32)
    assert scale.shape == (5, groups) and q.abs().max() <= 7
    found = unpack4(pack(q), scale, [5, columns])
    blocks, there = (t.reshape(5, groups, -1) for t in (weight, found))
    assert ((there - blocks).abs() <= blocks.abs().amax(2, keepdim=True) / 5 + 1e-6).all()
    assert pack(q).numel() == 5 * ((columns + 1) // 2)
    plain = (blocks.abs().amax(2, keepdim=True) / 7).clamp_min(1e-9)
    nearest = (blocks / plain).round() * plain
    assert (there - blocks).square().sum() <= (nearest - blocks).square().sum() * (1 + 1e-5)  # no worse than without clipping


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(40, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 10)

    def forward(self, ids):
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean(1))


def context():
    ids = torch.randint(40, (8, 12))
    return Context(ids[:2], (Batch(ids, torch.zeros(8, dtype=torch.long), torch.arange(8)),), accuracy)


@pytest.mark.parametrize("keep", [(), ("up",)], ids=str)
@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_every_runtime_computes_with_the_weights_of_the_file(name, keep, tmp_path):
    model, given = Net().eval(), context()
    spec = RuntimeSpec(name, threads=1, quant=QuantSpec(4, "none", keep_float=keep))
    built = runtime.build(model, spec, given, tmp_path / "four")
    plain = runtime.build(model, RuntimeSpec(name, threads=1), given, tmp_path / "float")
    with torch.no_grad():
        for layer in [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in keep]:
            q, scale = int4(layer.weight, 32)
            layer.weight.copy_(unpack4(pack(q), scale, list(layer.weight.shape)))
        for part in (model.table, model.conv):
            peak = part.weight.abs().flatten(1).amax(1).view(-1, *[1] * (part.weight.dim() - 1))
            part.weight.copy_((part.weight / (peak / 127)).round() * (peak / 127))
        expected = model(given.example)
    torch.testing.assert_close(built.run()(given.example), expected, rtol=1e-4, atol=1e-5)
    count = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    four = sum(n for name, n in count.items() if name.rpartition(".")[0] in {"up", "down", "head"} - set(keep))
    eight = count["table.weight"] + count["conv.weight"]
    saved = 4 * (four + eight) - four * (0.5 + 4 / 32) - eight * 1.05  # a scale for 32 inputs; one for 64 or more
    assert built.bytes < plain.bytes - 0.97 * saved


def test_the_onnx_file_holds_four_bits(tmp_path):
    runtime.build(Net().eval(), RuntimeSpec("onnxruntime", quant=QuantSpec(4, "none")), context(), tmp_path)
    tensors = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    kinds = {name: t.data_type for name, t in tensors.items() if name.endswith(".q")}
    assert sorted(kinds.values()) == sorted([onnx.TensorProto.INT4] * 3 + [onnx.TensorProto.INT8] * 2)
    assert sum(t.ByteSize() for name, t in tensors.items() if kinds.get(name) == onnx.TensorProto.INT4) < 1.1 * 12928 / 2


def test_what_is_refused():
    with pytest.raises(BadInput, match=r"quantize_int4\.group is 0"):
        QuantizeInt4(group=0)
    setup = trained_setup(tiny_cnn)
    with pytest.raises(BadInput, match='no layer "fc9"'):
        QuantizeInt4(keep_float=("fc9",))(setup)
    with pytest.raises(NotApplicable, match="no linear layer"):
        QuantizeInt4(keep_float=("fc1", "fc2"))(setup)
    after = QuantizeInt4(group=64)(setup)
    assert after.runtime.quant == QuantSpec(4, "none", group=64) and "FLOAT_WEIGHTS" not in after.traits
    assert setup.runtime.quant is None
