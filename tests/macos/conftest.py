"""The wheel that `make wheel-macos` built, and what its gate compares it with."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TAG = "cp{}{}".format(*sys.version_info[:2])
TAG = f"{TAG}-{TAG}-macosx_13_0_arm64"


def _missing() -> str:
    tools = [each for each in ("clang-22", "ld64.lld-22", "llvm-nm-22") if not shutil.which(each)]
    if tools:
        return f"no {', '.join(tools)}: apt-get install clang-22 lld-22 llvm-22"
    if not list(ROOT.glob(f"dist/*-{TAG}.whl")):
        return f"no wheel for {TAG} in dist/: make wheel-macos"
    return ""


@pytest.fixture(scope="session")
def wheel_path():
    """Skips where there is no wheel; fails there if MACOS_WHEEL_REQUIRED is set."""
    if problem := _missing():
        (pytest.fail if os.environ.get("MACOS_WHEEL_REQUIRED") else pytest.skip)(problem)
    (path,) = ROOT.glob(f"dist/*-{TAG}.whl")
    return path


@pytest.fixture(scope="session")
def wheel(wheel_path):
    from tools.macos.gate.wheel import read

    return read(wheel_path)


@pytest.fixture
def plugin(wheel, tmp_path):
    """A copy of the wheel's plugin, to spoil."""
    path = tmp_path / "plugin.so"
    path.write_bytes(wheel.members[wheel.plugin])
    return path


@pytest.fixture(scope="session")
def oracles(wheel_path):
    from tools.macos.gate.__main__ import load_oracles

    return load_oracles()
