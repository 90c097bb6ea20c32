"""Sizes, operations, the roofline and the machine's facts, against formulas."""

import getpass
import json
import os
import platform

import pytest
import torch
from torch import nn

from quadriga.core.errors import BadInput
from quadriga.core.roofline import REST
from quadriga.measure.ceilings import Ceilings
from quadriga.measure.flops import flops
from quadriga.measure.machine import facts
from quadriga.measure.roofline import profile
from quadriga.measure.size import file_bytes, parameters, weight_bytes

torch.set_num_threads(1)


def lenet():
    """The mission's network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


LENET = 2 * (28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10)


def test_the_missions_network():
    model = lenet()
    assert parameters(model) == 61_706
    assert weight_bytes(model) == 4 * 61_706
    assert flops(model, torch.randn(1, 1, 32, 32)) == LENET


def test_tied_weights_count_once_and_views_of_them_too():
    embed, head = nn.Embedding(50, 8), nn.Linear(8, 50)
    head.weight = embed.weight
    model = nn.ModuleList([embed, head])
    assert parameters(model) == 450 and weight_bytes(model) == 1800
    head.weight = nn.Parameter(embed.weight.data)  # another object, the same memory
    assert parameters(model) == 450


def test_buffers_count_as_bytes_not_as_parameters():
    model = nn.BatchNorm1d(10)
    assert parameters(model) == 20
    assert weight_bytes(model) == 4 * 40 + 8


def test_file_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"x" * 5)
    assert file_bytes([tmp_path / "a"]) == 10
    assert file_bytes([tmp_path, tmp_path / "a"]) == 15
    with pytest.raises(BadInput, match="does not exist"):
        file_bytes([tmp_path / "c"])


def test_flops_scale_with_the_batch_and_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 4))
    model[1].eval()
    x = torch.randn(3, 6)
    assert flops(model, x) == 2 * (30 + 20)
    assert flops(model, x, batch=None) == 3 * flops(model, x) and flops(model, x, batch=7) == 7 * flops(model, x)
    assert [m.training for m in model] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted(kind, gates):
    """PyTorch's own table gives 0 for an LSTM on the CPU."""
    layer = kind(8, 16, num_layers=2, batch_first=True)
    assert flops(layer, torch.randn(1, 5, 8)) == 5 * 2 * gates * 16 * ((8 + 16) + (16 + 16))


def test_attention_is_counted_in_spite_of_fused_kernels():
    """Also in eval mode, where nn.TransformerEncoderLayer's fast path would hide all of it."""
    s, d, f = 5, 16, 64
    layer = nn.TransformerEncoderLayer(d, 2, f, batch_first=True)
    assert flops(layer, torch.randn(3, s, d)) == 2 * s * d * (4 * d + 2 * f) + 4 * s * s * d


def test_flops_of_dict_inputs():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, scale):
            return {"logits": self.linear(x) * scale}

    assert flops(Keyed(), {"x": torch.randn(2, 4), "scale": torch.ones(2, 1)}) == 24


def test_profile_accounts_for_all_parameters_and_operations():
    model = lenet()
    rows = profile(model, torch.randn(4, 1, 32, 32), repeats=3, ceiling=Ceilings(1e11, 1e10))
    assert sum(row["parameters"] for row in rows) == 61_706
    assert sum(row["flops"] for row in rows) == 4 * LENET
    named = {row["layer"]: row for row in rows}
    assert set(named) == {str(i) for i in range(10)} | {REST}
    assert named["0"]["bytes"] == 4 * (4 * 32 * 32 + 4 * 6 * 28 * 28 + 156)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds, reverse=True)
    json.dumps(rows, allow_nan=False)


def test_profile_stops_after_three_passes_when_its_time_is_over():
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counted(4, 4)
    profile(model, torch.randn(1, 4), repeats=1000, seconds=0.0, ceiling=Ceilings(1.0, 1.0))
    assert model.calls == 1 + 2 + 3 + 1  # counted, warm, timed, and FLOPs again


def test_profile_places_layers_under_the_roof():
    """With slow arithmetic everything with products is bound by it; fraction = time at the ceiling / measured time."""
    rows = profile(lenet(), torch.randn(1, 1, 32, 32), repeats=3, ceiling=Ceilings(1.0, 1e30))
    for row in rows:
        if row["flops"] and row["bytes"]:
            assert row["bound"] == "compute"
            assert row["fraction"] == pytest.approx(row["flops"] / row["seconds"])


def test_profile_counts_a_shared_layer_at_each_call_and_removes_its_hooks():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return self.linear(self.linear(x) @ torch.ones(6, 6)) * self.scale

    model = Twice().train()
    rows = {row["layer"]: row for row in profile(model, torch.randn(2, 6), repeats=2, ceiling=Ceilings(1e9, 1e9))}
    assert rows["linear"]["flops"] == 2 * (2 * 2 * 36) and rows["linear"]["parameters"] == 42
    assert rows[REST]["flops"] == 2 * 2 * 36 and rows[REST]["parameters"] == 6
    assert model.training and not model.linear._forward_hooks and not model.linear._forward_pre_hooks


def test_profile_of_a_model_that_fails_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        profile(model, torch.randn(1, 4), ceiling=Ceilings(1.0, 1.0))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model)
    assert flops(model[0], torch.randn(1, 4)) == 32  # no counter stayed in force


def test_facts_name_no_host_user_or_folder():
    text = json.dumps(facts())
    assert facts()["cores"] >= 1 and facts()["torch"] == torch.__version__ and facts()["threads"] == torch.get_num_threads()
    for secret in (platform.node(), os.getcwd(), os.path.expanduser("~")):
        assert len(secret) < 4 or secret not in text
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in text
