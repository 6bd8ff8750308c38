"""Every kernel under each of clang's sanitizers, on what reaches most of its branches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of the kernels' own tests.
TESTS = {
    "test_shaders_forward.py": ("test_format[int4_group-everything]",),
    "test_shaders_backward.py": ("test_format[int4-everything]",),
    "test_shaders_backward_bias.py": ("test_feature[float32-everything]",),
    "test_shaders_decode.py": ("test_format[int8-64]",),
    "test_shaders_quantize.py": ("test_rotated[64-row]",),
}


@pytest.mark.parametrize("sanitizer", ["address", "thread", "undefined"])
def test_silent(device, sanitizer):
    import softmetal

    environment = softmetal.sanitizer_environment(sanitizer)
    environment["PYTHONPATH"] = os.path.dirname(softmetal.__file__)
    environment["JAX_PLATFORMS"] = "cpu"
    names = [f"{HERE / file}::{name}" for file, tests in TESTS.items() for name in tests]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        env=environment,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    assert f"{len(names)} passed" in finished.stdout
    assert "Sanitizer" not in finished.stdout + finished.stderr
    assert "runtime error" not in finished.stderr
