"""Normalization: which modules do it, and running statistics taken anew for weights that no training step has seen."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from quadriga.core.batch import Batch, call, keeping_mode

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def reestimate(model: nn.Module, batches: Iterable[Batch], limit: int = 50) -> int:
    """Set running means and variances to those over some training batches, each of equal weight.

    Averaged weights (EMA, SWA, schedule-free) are not those that the running statistics were collected with. Nothing is done
    for a model without such statistics.

    Args:
        model: on the batches' device; its mode is kept.
        batches: training examples, untransformed.
        limit: of batches.

    Returns:
        the number of batches that were used.

    Source: Izmailov et al. 2018, arXiv:1803.05407, section 3.2.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats and m.running_mean is not None]
    if not norms:
        return 0
    momenta, used = [m.momentum for m in norms], 0
    with keeping_mode(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
        for batch in islice(batches, limit):
            call(model, batch.inputs)
            used += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return used
