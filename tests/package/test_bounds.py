"""What a run of the suite may take: tests/conftest.py counts pipelines and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*options, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=ROOT,
    )


@pytest.mark.parametrize(("count", "status"), [(150, 0), (151, 1)])
def test_a_run_of_more_than_150_pipelines_fails(tmp_path, count, status):
    made = tmp_path / "pipelines"
    kernels = [f"attention_forward_float_64 0={i:08x} x.none.metallib\n" for i in range(count)]
    # Once more under another instrumentation, and another's kernel: neither is one more.
    kernels += [kernels[0].replace("none", "thread"), "saxpy x.none.metallib\n"]
    made.write_text("".join(kernels), encoding="utf-8")
    finished = run("--collect-only", __file__, SOFTMETAL_PIPELINES=str(made))
    assert finished.returncode == status, finished.stdout + finished.stderr
    assert f"Metal pipelines: {count}, at most 150" in finished.stdout
    assert "(by instrumentation: none " in finished.stdout
    assert "GiB resident, at most 2.50" in finished.stdout
    assert "ERROR: Memory" not in finished.stdout


LARGE = """
import numpy as np

def test_an_array_of_half_a_gibibyte():
    assert np.ones(2**26).all()
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_that_takes_more_memory_than_it_may_fails(tmp_path, workers):
    """In the process that was started, and in a worker of it."""
    test = tmp_path / "test_large.py"
    test.write_text(LARGE, encoding="utf-8")
    options = ["-p", "tests.conftest", "-c", "pyproject.toml", "-n", workers, str(test)]
    finished = run(*options, TESTS_MAX_RESIDENT_GIB="0.5")
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "1 passed" in finished.stdout
    assert "ERROR: Memory of a process: 0." in finished.stdout
    assert "GiB resident, at most 0.50" in finished.stdout
