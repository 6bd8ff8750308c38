"""The software Metal device, which every test here needs."""

from __future__ import annotations

import pytest

from tests.support import software_device


@pytest.fixture(scope="session", autouse=True)
def device():
    """The device's build folder."""
    return software_device.build_folder()
