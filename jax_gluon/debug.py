"""What the software Metal device counted: for development."""

from __future__ import annotations

import json
from typing import Any

from jax_gluon import _native


def metal_counters(reset: bool = True) -> list[dict[str, Any]]:
    """Work of each dispatch of the software Metal device since the last reset, oldest first.

    A real GPU counts nothing: the list is empty.

    **Arguments:**

    - `reset`: forget what is returned.

    **Returns:** dicts of `kernel` and, among others, `multiply_accumulates`, `device_bytes_read`,
    `device_bytes_written`, `threadgroup_bytes` (read and written), `barriers`, `exp2` and
    `simd_operations`. Bytes, products and exponentials are counted in processes started with
    `SOFTMETAL_INSTRUMENT=counters`, and are 0 in others.
    """
    dispatches: list[dict[str, Any]] = json.loads(_native.plugin().metal_counters(reset))
    for each in dispatches:
        each["threadgroup_bytes"] = (
            each["threadgroup_bytes_read"] + each["threadgroup_bytes_written"]
        )
        each["barriers"] = each["threadgroup_barriers"]
        each["simd_operations"] = each["simdgroup_operations"]
    return dispatches
