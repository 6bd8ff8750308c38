"""The number of Metal pipelines that the suite makes is bounded: tests/conftest.py counts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("count", "status"), [(150, 0), (151, 1)])
def test_a_run_of_more_than_150_fails(tmp_path, count, status):
    made = tmp_path / "pipelines"
    kernels = [f"attention_forward_float_64 0={i:08x} x.none.metallib\n" for i in range(count)]
    # Once more under another instrumentation, and another's kernel: neither is one more.
    kernels += [kernels[0].replace("none", "thread"), "saxpy x.none.metallib\n"]
    made.write_text("".join(kernels), encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "--collect-only"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/package/test_build.py"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SOFTMETAL_PIPELINES": str(made)},
        cwd=ROOT,
    )
    assert finished.returncode == status, finished.stdout + finished.stderr
    assert f"Metal pipelines: {count}, at most 150" in finished.stdout
    assert "(by instrumentation: none " in finished.stdout


PROGRAM = """
import jax, jax_gluon
x = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
jax_gluon.dot_product_attention(x, x, x, implementation="metal")
"""


def test_host_and_kernels_alone_are_counted_alike(device, tmp_path, monkeypatch):
    """A pipeline that a program's Metal makes, and the same from Python, are the same."""
    monkeypatch.setenv("SOFTMETAL_PIPELINES", str(tmp_path / "host"))
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
    # The variable is read once in a process.
    alone = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import numpy as np\n"
        "from tests.support.metal import encoder\n"
        "x = np.ones((1, 4, 1, 8), np.float32)\n"
        "encoder.forward(encoder.Problem(x, x, x))\n"
    )
    monkeypatch.setenv("SOFTMETAL_PIPELINES", str(tmp_path / "alone"))
    subprocess.run([sys.executable, "-c", alone], check=True)
    host, alone = (
        [line.rsplit(" ", 1)[0] for line in (tmp_path / name).read_text("utf-8").splitlines()]
        for name in ("host", "alone")
    )
    assert host == alone == ["attention_forward_float_64 0=00000000 1=00000000 2=00000000"]
