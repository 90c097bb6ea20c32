"""One token with a key-value cache gives what the whole window gives, in eager PyTorch and in a runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from quadriga import runtime
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.workloads.ready.gpt_shakespeare import GPT

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from finished import PAST, Decode, decoding, prefill


@pytest.fixture
def gpt():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return GPT(layers=2, width=32, heads=2).eval()


def test_a_step_with_the_cache_is_the_last_position_of_the_window(gpt):
    tokens = torch.randint(256, (3, PAST + 1))
    keys, values = prefill(gpt, tokens[:, :PAST])
    with torch.no_grad():
        logits, grown, _ = Decode(gpt)(tokens[:, PAST:], keys, values)
        torch.testing.assert_close(logits, gpt(tokens)[:, PAST:], rtol=1e-4, atol=1e-5)
    assert grown.shape == (3, 2, 2, PAST + 1, 16)
    torch.testing.assert_close(grown, prefill(gpt, tokens)[0])


def test_it_runs_in_onnxruntime_at_any_batch(gpt, tmp_path, monkeypatch):
    monkeypatch.setenv("QUADRIGA_DATA", "shipped")
    workload = decoding(gpt, rows=8)
    context = Setup.of(workload).context
    run = runtime.build(workload.build(0).eval(), RuntimeSpec("onnxruntime", threads=1), context, tmp_path).run()
    for count in (1, 2, 5):
        given = workload.inputs(count)
        with torch.no_grad():
            expected = workload.build(0)(*given)
        for found, wanted in zip(run(given), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
