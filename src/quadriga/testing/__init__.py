"""For authors of methods: tiny workloads, setups in several states, and the contract that every method keeps.

import pytest
from quadriga.testing import CHECKS, check_method

@pytest.mark.parametrize("check", CHECKS)
def test_contract(check):
    check_method(MyMethod, checks=[check])
"""

from quadriga.testing.contract import CHECKS, check_method, starting
from quadriga.testing.own_layers import OWN_LAYERS, own_layers
from quadriga.testing.setups import fingerprint, make_setups
from quadriga.testing.workloads import TINY, tiny_attention, tiny_cnn, tiny_lstm, tiny_mlp, tiny_transformer

__all__ = [
    "CHECKS",
    "OWN_LAYERS",
    "TINY",
    "check_method",
    "fingerprint",
    "make_setups",
    "own_layers",
    "starting",
    "tiny_attention",
    "tiny_cnn",
    "tiny_lstm",
    "tiny_mlp",
    "tiny_transformer",
]
