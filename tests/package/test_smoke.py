"""The script that every supported JAX release has to pass.

`make smoke` runs it, with XLA's own settings.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("smoke.py")


def test_smoke_script_fails_on_a_wrong_result():
    """Attention scaled by 1 + 1e-4 is far outside the bounds."""
    program = (
        "import jax_gluon; right = jax_gluon.dot_product_attention\n"
        "jax_gluon.dot_product_attention = lambda *a, **k: right(*a, **k) * 1.0001\n"
        f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert finished.returncode != 0
    assert "relative L2 error" in finished.stderr
