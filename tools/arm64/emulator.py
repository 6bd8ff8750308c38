"""The cross compiler and the emulator that stand in for an arm64 machine."""

from __future__ import annotations

import os
import shutil
from typing import Any

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"


def command(processor: str) -> list[str]:
    """What runs a program of arm64 as one of qemu's models would."""
    return [EMULATOR, "-cpu", processor]


def require(pytest: Any) -> None:
    """Skips a test where they are not installed; with ARM64_REQUIRED it fails."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        (pytest.fail if os.environ.get("ARM64_REQUIRED") else pytest.skip)(f"no {missing[0]}")
