"""The Metal pipelines that a run makes, which tests/conftest.py counts."""

from __future__ import annotations

import subprocess
import sys

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
