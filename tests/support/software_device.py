"""Builds the software Metal device once, where clang 19 is installed; else says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "clang-19 libclang-rt-19-dev"


def _missing() -> str | None:
    """What the device needs and this machine lacks."""
    if shutil.which(os.environ.get("SOFTMETAL_CLANG", "clang++-19")) is None:
        return f"no clang++-19; on Debian: apt install {PACKAGES}"
    return None


def _build() -> Path:
    """The folder with libsoftmetal.so, rebuilt where a source is newer."""
    folder = ROOT / "build" / "metal"
    clang = os.environ.get("SOFTMETAL_CLANG", "clang++-19")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("cmake", path=path) is None:
        pytest.skip("no cmake")
    finished = subprocess.run(
        ["sh", ROOT / "tools" / "build_softmetal.sh", folder, clang],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def build_folder() -> Path:
    """The device's build folder, for this process and those that it starts.

    Skips the test where the device can't be built; with SOFTMETAL_REQUIRED the test then fails.
    """
    if problem := _missing():
        (pytest.fail if os.environ.get("SOFTMETAL_REQUIRED") else pytest.skip)(problem)
    given = os.environ.get("SOFTMETAL_BUILD_DIR")
    folder = Path(given) if given else _build()
    os.environ["SOFTMETAL_BUILD_DIR"] = str(folder)
    return folder
