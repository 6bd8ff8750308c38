"""The script that every supported JAX release has to pass, under the one installed here.

It has XLA's own settings, not those with which the other tests compile quickly.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("smoke.py")


def run_smoke(prelude: str = "") -> "subprocess.CompletedProcess[str]":
    program = f"{prelude}\nimport runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        },
    )


def test_smoke_script_passes_in_a_fresh_process():
    finished = run_smoke()
    assert finished.returncode == 0, finished.stderr
    assert "is right under jax" in finished.stdout


def test_smoke_script_fails_on_a_wrong_result():
    """Attention scaled by 1 + 1e-4 is far outside the bounds."""
    wrong = (
        "import jax_gluon; right = jax_gluon.dot_product_attention\n"
        "jax_gluon.dot_product_attention = lambda *a, **k: right(*a, **k) * 1.0001"
    )
    finished = run_smoke(wrong)
    assert finished.returncode != 0
    assert "relative L2 error" in finished.stderr
