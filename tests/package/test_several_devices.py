"""Tests that need several devices, each file in a process that has as many."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.support.devices import DEVICES, flag

TESTS = Path(__file__).resolve().parents[1]
FILES = [file for folder in DEVICES for file in sorted((TESTS / folder).glob("test_*.py"))]


@pytest.mark.skipif(not hasattr(jax.lax, "pcast"), reason="this JAX has no Explicit axes")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_several_devices(file):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag(file.parent.name)}"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-20_000:] + finished.stderr[-2_000:]
    assert " passed" in finished.stdout
