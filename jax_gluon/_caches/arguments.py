"""The arguments of caches, checked."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_gluon._errors import Checker
from jax_gluon._quantization.formats import (
    PRESETS,
    AttentionQuantization,
    QuantizedTensor,
    QuantSpec,
    preset,
)

_GRANULARITIES = ("row", "group", "block", "channel_block")
_INT32_MAX = int(np.iinfo(np.int32).max)


def size_of(check: Checker, name: str, x: Any) -> int:
    """An extent."""
    return check.integer(name, x, 1, "an int of at least 1")


def specs_of(
    check: Checker, quantization: Any, head_dim: int, value_dim: int
) -> tuple[QuantSpec | None, QuantSpec, QuantSpec]:
    """How queries, keys and values are quantized."""
    names = ", ".join(f'"{name}"' for name in PRESETS)
    allowed = f"{names}, an AttentionQuantization with key and value"
    if not isinstance(quantization, str | AttentionQuantization):
        found = f"a {type(quantization).__name__}"
        check.type_error("quantization", found, allowed)
    if isinstance(quantization, str) and quantization not in PRESETS:
        check.value_error("quantization", f'"{quantization}"', allowed)
    both = preset(quantization) or AttentionQuantization()

    def spec_of(name: str, argument: str, width: int) -> QuantSpec:
        spec: QuantSpec | None = getattr(both, name)
        if spec is None:
            check.value_error("quantization", f"without {name}", allowed)
        if spec.granularity not in _GRANULARITIES:
            found = f'of granularity "{spec.granularity}" for {name}'
            granularities = ", ".join(_GRANULARITIES)
            check.value_error("quantization", found,
                f"{granularities} (a scale over all tokens can't be appended to)",
            )  # fmt: skip
        if spec.bits == 4 and width % 2:
            check.value_error(argument, f"{width}", "an even one, which 4 bits need")
        return spec

    query: QuantSpec | None = both.query
    if query is not None and query.bits == 4 and head_dim % 2:
        check.value_error("head_dim", f"{head_dim}", "an even one, which 4 bits need")
    return query, spec_of("key", "head_dim", head_dim), spec_of("value", "value_dim", value_dim)


def tokens_of(check: Checker, name: str, x: Any, cached: QuantizedTensor, batch: int) -> jax.Array:
    """Keys or values to append."""
    if isinstance(x, QuantizedTensor):
        check.type_error(name, "a QuantizedTensor", "a float array")
    array = check.float_array(name, x)
    K, H = cached.shape[-2:]
    if array.ndim != 4 or array.shape[1] < 1 or array.shape != (batch, array.shape[1], K, H):
        allowed = f"[{batch}, T, {K}, {H}] with T at least 1"
        check.value_error(name, f"of shape {list(array.shape)}", allowed)
    return array


def rows_of(check: Checker, rows: Any, batch: int) -> jax.Array:
    """Numbers of entries of the batch, int32 `[n]`; those that are at hand are looked at."""
    array = check.int32("rows", rows)
    if array.ndim != 1 or array.shape[0] < 1:
        allowed = "of rank 1 with at least one entry"
        check.value_error("rows", f"of shape {list(array.shape)}", allowed)
    row_within(check, "rows", array, batch)
    return array


def row_within(check: Checker, name: str, x: Any, batch: int) -> None:
    """Raises where a number that is at hand is that of no entry."""
    if isinstance(x, Tracer):
        return
    low, high = int(np.min(np.asarray(x))), int(np.max(np.asarray(x)))
    if low < 0 or high >= batch:
        found = f"{low}" if low == high else f"from {low} to {high}"
        check.value_error(name, found, f"0 to {batch - 1}, entries of the batch")


def mask_of_rows(check: Checker, rows: Any, batch: int) -> jax.Array:
    """Which entries are meant: bool `[B]`, of such, of one number or of several."""
    array = check.array("rows", rows)
    if array.dtype == jnp.bool_:
        if array.shape != (batch,):
            allowed = f"bool [{batch}], or numbers of entries"
            check.value_error("rows", f"of shape {list(array.shape)}", allowed)
        return array
    numbers = rows_of(check, rows if array.ndim else [rows], batch)
    return jnp.zeros((batch,), jnp.bool_).at[of_entry(numbers, batch)].set(True, mode="drop")


def of_entry(numbers: jax.Array, batch: int) -> jax.Array:
    """The numbers, with those below 0 past the last entry: JAX counts them from the end."""
    return jnp.where(numbers < 0, batch, numbers)


def rewound_of(check: Checker, tokens: Any, batch: int, limit: int) -> jax.Array:
    """How many tokens each entry is to forget: int32 `[B]` in `[0, limit]`."""
    array = check.int32("tokens", tokens)
    if array.shape not in ((), (batch,)):
        allowed = f"an int, or shape [{batch}]"
        check.value_error("tokens", f"of shape {list(array.shape)}", allowed)
    if not isinstance(array, cast(Any, Tracer)):
        low, high = int(np.min(np.asarray(array))), int(np.max(np.asarray(array)))
        if low < 0 or high > limit:
            found = f"{low}" if low == high else f"from {low} to {high}"
            check.value_error("tokens", found, f"0 to {limit}, for which this cache keeps enough")
    return jnp.broadcast_to(jnp.clip(array, 0, limit), (batch,))
