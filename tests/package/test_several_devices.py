"""The tests of `tests/devices`, each file in a process that has six devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

FILES = sorted((Path(__file__).parents[1] / "devices").glob("test_*.py"))


@pytest.mark.skipif(not hasattr(jax.lax, "pcast"), reason="this JAX has no Explicit axes")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_six_devices(file):
    flags = "--xla_force_host_platform_device_count=6"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr[-2_000:]
    assert " passed" in finished.stdout
