"""The tests that need an OpenCL device are skipped without one, and fail in CI, which installs one."""

import os

import pytest

from quadriga import runtime


def needed() -> None:
    """Skip the module here, or fail where QUADRIGA_OPENCL=required."""
    state = runtime.probe()["opencl"]
    if not state.ok and os.environ.get("QUADRIGA_OPENCL") == "required":
        pytest.fail(f"no OpenCL: {state.reason}; {state.remedy}")
    if not state.ok:
        pytest.skip(f"no OpenCL: {state.reason}")
