"""is_plain: what computes something else than its class in torch.nn is told from what does not."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from quadriga.core.errors import NotApplicable
from quadriga.core.plain import is_plain, plain_kind
from quadriga.core.slots import ParallelSpec
from quadriga.parallel.replicate import with_synced_norms
from quadriga.testing.own_layers import NormAct


class Standardized(nn.Conv2d):
    """Its weight has mean 0, by the method that `forward` calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Made(nn.Linear):
    """A weight that is computed when it is asked for."""

    @property
    def weight(self):
        return self.given * 2

    @weight.setter
    def weight(self, value):
        self.given = value


class Named(nn.Conv2d):
    """Another constructor, and nothing else."""

    def __init__(self, width):
        super().__init__(width, width, 1)
        self.width = width


def test_a_subclass_without_a_forward_of_its_own_is_plain():
    assert plain_kind(Named(2), nn.Linear, nn.Conv2d) is nn.Conv2d
    attention = nn.MultiheadAttention(4, 2)
    assert plain_kind(attention.out_proj, nn.Linear) is nn.Linear and not is_plain(attention.out_proj, nn.Conv2d)


def test_whatever_changes_what_is_computed_is_not_plain():
    hook, pre, patched = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    hook.register_forward_hook(lambda module, args, output: -output)
    pre.register_forward_pre_hook(lambda module, args: (-args[0],))
    patched.forward = lambda x: x
    masked = prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)
    others = (hook, pre, patched, masked, parametrizations.weight_norm(nn.Linear(2, 2)), Standardized(1, 1, 1), Made(2, 2))
    assert not [m for m in others if is_plain(m, nn.Linear, nn.Conv2d)]
    with torch.no_grad():  # and each of them does compute something else
        assert all(is_plain(m, type(m)) for m in (nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2)))


def test_a_norm_with_an_activation_is_not_synchronized_without_it():
    """PyTorch's conversion makes a plain norm of every subclass."""
    spec, device = ParallelSpec(options={"sync_batchnorm": True}), torch.device("cuda")
    model = with_synced_norms(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), spec, device)
    assert type(model[1]) is nn.SyncBatchNorm
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(NormAct(2))) is nn.SyncBatchNorm
    with pytest.raises(NotApplicable, match=r"1 \(NormAct\) computes more than a batch normalization"):
        with_synced_norms(nn.Sequential(nn.Conv2d(1, 2, 1), NormAct(2)), spec, device)
