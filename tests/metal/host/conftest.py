"""Metal by way of the plugin: the software device, or on a Mac its own."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def _metal(request):
    if sys.platform != "darwin":
        request.getfixturevalue("device")
    plugin = pytest.importorskip("jax_gluon._plugin")
    name, why = plugin.metal_device()
    assert name, why
    assert name == "Software Metal" or sys.platform == "darwin"
