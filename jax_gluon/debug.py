"""What ran: the kernels of the last calls; what the software Metal device counted."""

from __future__ import annotations

import json
from typing import Any

import jax

from jax_gluon import _native


def kernels(reset: bool = True) -> list[dict[str, Any]]:
    """The kernels of the last attention calls of this process, oldest first; at most 256.

    **Arguments:**

    - `reset`: forget what is returned.

    **Returns:** dicts of `pass` (`"forward"`, `"backward"`, `"backward_bias"` or `"tangent"`),
    `device` (`"cpu"` or `"metal"`), `kernel` (the name that `explain` gives), `arithmetic` (what
    was multiplied), `variant` (the CPU's instruction set, or the functions of shaders), and the
    sizes `block_k`, `subtile` and `stages`, 0 where the kernel has none.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jnp.ones((1, 40, 2, 64))
    >>> out = jax_gluon.dot_product_attention(x[:, :1], x, x, implementation="cpu")
    >>> run = jax_gluon.debug.kernels()[-1]
    >>> run["pass"], run["kernel"]
    ('forward', 'decode')
    """
    jax.effects_barrier()
    return _native.plugin().kernel_runs(reset)


def metal_counters(reset: bool = True) -> list[dict[str, Any]]:
    """Work of each dispatch of the software Metal device since the last reset, oldest first.

    A real GPU counts nothing: the list is empty.

    **Arguments:**

    - `reset`: forget what is returned.

    **Returns:** dicts of `kernel` and, among others, `multiply_accumulates`, `device_bytes_read`,
    `device_bytes_written`, `threadgroup_bytes` (read and written), `barriers`, `exp2` and
    `simdgroup_operations`. Bytes, products and exponentials are counted in processes started with
    `SOFTMETAL_INSTRUMENT=counters`, and are 0 in others.
    """
    dispatches: list[dict[str, Any]] = json.loads(_native.plugin().metal_counters(reset))
    for each in dispatches:
        each["threadgroup_bytes"] = (
            each["threadgroup_bytes_read"] + each["threadgroup_bytes_written"]
        )
        each["barriers"] = each.pop("threadgroup_barriers")
    return dispatches
