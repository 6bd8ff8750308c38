"""The software Metal device for the kernels of `shaders/`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "softmetal" / "python"), str(Path(__file__).parent)]

_spec = importlib.util.spec_from_file_location(
    "softmetal_conftest", ROOT / "tests" / "softmetal" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_softmetal = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_softmetal)
if sys.platform != "darwin":
    device = _softmetal.device
else:

    @pytest.fixture(scope="session")
    def device():
        pytest.skip("of the software device alone")
