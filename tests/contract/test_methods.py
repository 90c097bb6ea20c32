"""Every registered method keeps the contract."""

from functools import cache

import pytest
import torch

from quadriga import methods
from quadriga.testing import CHECKS, check_method, make_setups, starting

torch.set_num_threads(1)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", methods.available())
def test_contract(name, check):
    check_method(start(name), checks=[check])


@cache
def start(name):
    return starting(methods.available()[name], make_setups())
