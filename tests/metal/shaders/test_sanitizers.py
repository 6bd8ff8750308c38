"""Every kernel under each of clang's sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("sanitizer", ["address", "thread", "undefined"])
def test_silent(device, sanitizer):
    import softmetal

    environment = softmetal.sanitizer_environment(sanitizer)
    environment["PYTHONPATH"] = os.path.dirname(softmetal.__file__)
    environment["JAX_PLATFORMS"] = "cpu"
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.metal.every_kernel"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert "Sanitizer" not in finished.stdout + finished.stderr
    assert "runtime error" not in finished.stderr
