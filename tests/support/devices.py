"""Folders of tests that need several devices, which JAX has to be told of before it starts."""

from __future__ import annotations

import os
from pathlib import Path

#: Devices of the tests in a folder.
DEVICES = {"devices": 6, "context_parallel": 8}


def flag(folder: str) -> str:
    """What `XLA_FLAGS` has for the tests of a folder."""
    return f"--xla_force_host_platform_device_count={DEVICES[folder]}"


def left_out(conftest: str) -> list[str]:
    """`collect_ignore_glob` of a folder's conftest: all files, where JAX was not told."""
    folder = Path(conftest).parent.name
    return [] if flag(folder) in os.environ.get("XLA_FLAGS", "").split() else ["test_*.py"]
