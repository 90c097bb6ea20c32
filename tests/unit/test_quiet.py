"""Tracing a network that cannot be traced raises, and prints nothing."""

import pytest
import torch
from torch import nn

from quadriga.core.axes.trace import trace
from quadriga.core.errors import NotApplicable


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        return self.fc(2 * x if x.sum() > 0 else x)


def test_a_failing_trace_is_silent(capfd):
    with pytest.raises(NotApplicable, match=r"cannot be traced at test_quiet.py:\d+"):
        trace(Branch(), torch.randn(4, 6))
    assert capfd.readouterr() == ("", "")
