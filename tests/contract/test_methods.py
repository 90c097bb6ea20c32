"""Every registered method keeps the contract."""

from functools import cache

import pytest
import torch

from quadriga import methods
from quadriga.testing import CHECKS, check_method, make_setups, starting
from quadriga.testing.contract import applied
from quadriga.testing.workloads import MORE, TINY

torch.set_num_threads(1)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", methods.available())
def test_contract(name, check):
    method, setups = start(name)
    check_method(method, setups, checks=[check])


@cache
def start(name):
    """A method where its search starts, and the setups to try it on: also those of MORE where it takes none of TINY."""
    for setups in (make_setups(), make_setups(TINY | MORE)):
        method = starting(methods.available()[name], setups)
        if any(True for _ in applied(method, setups)):
            break
    return method, setups
