"""What `jax.export` has to be told of the plugin's custom calls."""

from __future__ import annotations

import importlib
from typing import Any

from jax_gluon import _native


def export_checks() -> tuple[Any, ...]:
    """`disabled_checks` for `jax.export.export`, which refuses custom calls that it does not know.

    A process that loads what was exported imports `jax_gluon`, of the same version, before it calls
    that on the CPU.

    **Returns:** a `jax.export.DisabledSafetyCheck` for each custom call of the plugin.

    **Raises:** `ImportError` where the plugin can't be loaded.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> from jax import export
    >>> batch, tokens = export.symbolic_shape("batch, tokens")
    >>> x = jax.ShapeDtypeStruct((batch, tokens, 4, 32), jnp.float32)
    >>> attention = jax.jit(jax_gluon.dot_product_attention)
    >>> exported = export.export(attention, disabled_checks=jax_gluon.export_checks())(x, x, x)
    >>> exported.call(*[jnp.ones((3, 50, 4, 32))] * 3).shape
    (3, 50, 4, 32)
    """
    # Imported late: of old releases of JAX it needs a package that they do not ask for.
    export: Any = importlib.import_module("jax.export")
    targets = _native.plugin().registrations()
    return tuple(export.DisabledSafetyCheck.custom_call(target) for target in targets)
