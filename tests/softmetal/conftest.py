"""Builds the software Metal device once, where clang 19 is installed; else says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "plugin" / "softmetal"
PACKAGES = "clang-19 libclang-rt-19-dev"


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(SOURCE / "python"))


def missing() -> str | None:
    """What the device needs and this machine lacks."""
    if shutil.which(os.environ.get("SOFTMETAL_CLANG", "clang++-19")) is None:
        return f"no clang++-19; on Debian: apt install {PACKAGES}"
    return None


def build() -> Path:
    """The folder with libsoftmetal.so, rebuilt where a source is newer."""
    folder = ROOT / "build" / "softmetal"
    folder.mkdir(parents=True, exist_ok=True)
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    lock = folder / "lock"
    with lock.open("w") as held:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX)  # workers of pytest-xdist build one after another
        for command in (
            [
                cmake,
                *("-S", SOURCE, "-B", folder, "-DSOFTMETAL_WERROR=ON"),
                f"-DCMAKE_CXX_COMPILER={os.environ.get('SOFTMETAL_CLANG', 'clang++-19')}",
            ],
            [cmake, "--build", folder],
        ):
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
            assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


@pytest.fixture(scope="session", autouse=True)
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device's build folder, with an empty cache of compiled kernels."""
    problem = missing()
    if problem:
        (pytest.fail if os.environ.get("SOFTMETAL_REQUIRED") else pytest.skip)(problem)
    given = os.environ.get("SOFTMETAL_BUILD_DIR")
    folder = Path(given) if given else build()
    os.environ["SOFTMETAL_BUILD_DIR"] = str(folder)
    os.environ["SOFTMETAL_CACHE_DIR"] = str(tmp_path_factory.mktemp("softmetal-cache"))
    return folder
