"""Every kernel under each of clang's sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sanitizers
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("sanitizer", "options"),
    [
        # Without optimization, which takes longer than the kernels then run. No kernel hands out
        # the address of a local, and memory of its own for each frame is slow to come by.
        (
            "address",
            {
                "SOFTMETAL_CLANG_FLAGS": "-O0 -fsanitize=undefined",
                "ASAN_OPTIONS": "detect_stack_use_after_return=0",
            },
        ),
        ("thread", {}),
    ],
    ids=["address_and_undefined", "thread"],
)
def test_silent(device, sanitizer, options, monkeypatch):
    import softmetal

    for name, value in options.items():
        monkeypatch.setenv(name, value)
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
