"""DDP, FSDP2 and tensor parallelism through NCCL, with one rank: the gradients of plain training on the GPU."""

from dataclasses import replace

import pytest
import torch

from quadriga.core.batch import to_device
from quadriga.core.setup import Setup
from quadriga.core.slots import PLAIN, ParallelSpec
from quadriga.parallel import group
from quadriga.parallel.mesh import mesh_of
from quadriga.parallel.tensor import cut_matrices
from quadriga.testing import tiny_transformer
from quadriga.train.run import Run
from quadriga.train.runners import runner_for
from quadriga.workloads.ready.gpt_shakespeare import GPT

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    group.join(request.param)
    yield request.param
    group.leave()


def first_gradients(spec, device):
    task = tiny_transformer()
    setup = Setup.of(task)
    setup = replace(setup, runtime=replace(setup.runtime, device=device, parallel=spec))
    with runner_for(setup, None) as runner:
        run = Run(setup, task.train, runner, 1, 0, lambda: 0.0).opened(None, None)
        batch, _ = run.loader.draw(0, 0, run.size(PLAIN), 0.0)
        runner.forward_backward(batch)
        grads = {n: p.grad for n, p in runner.model.named_parameters() if p.grad is not None}
        return {n: g.detach().cpu() for n, g in runner.whole(grads).items()}


@pytest.mark.parametrize("plan", ["replicate", "shard"])
def test_data_parallel_gradients(plan, device):
    expected = first_gradients(None, device)
    found = first_gradients(ParallelSpec(plan), device)
    assert set(found) == set(expected)
    assert all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)


def test_tensor_parallel_gradients(device):
    torch.manual_seed(0)
    model, tokens = GPT(2, 16, 4).to(device), to_device(torch.arange(64).view(2, 32), device)
    model(tokens).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    cut_matrices(model, mesh_of(ParallelSpec(), device)["tensor"], ParallelSpec(), tokens)
    model(tokens).square().sum().backward()
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-5), name
