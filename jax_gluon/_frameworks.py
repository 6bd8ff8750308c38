"""Other libraries, which only the modules for them import."""

from __future__ import annotations

import importlib
from typing import Any

#: What one call of a layer may say beside the framework's own arguments.
OF_A_CALL = (
    "bias", "key_value_mask", "query_seq_lengths", "key_value_seq_lengths", "query_offset",
    "query_segment_ids", "key_value_segment_ids", "query_positions", "key_value_positions",
)  # fmt: skip


def framework(module: str, extra: str, needs: str = "") -> Any:
    """A module of another library; else an `ImportError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"jax_gluon.{module.split('.')[-1]} needs {module}: pip install "
            f"'jax-gluon[{extra}]'{needs} ({error})"
        ) from error
