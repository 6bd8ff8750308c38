"""The software Metal device, on which the kernels of `shaders/` and their host code run."""

from __future__ import annotations

import sys

import pytest

from tests.support import software_device


@pytest.fixture(scope="session", autouse=sys.platform != "darwin")
def device():
    """The device's build folder."""
    if sys.platform == "darwin":
        pytest.skip("of the software device alone")
    return software_device.build_folder()
