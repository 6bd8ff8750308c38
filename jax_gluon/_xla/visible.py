"""Hidden terms of sums: absent, instead of 0 times what may be no number."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp


def hide(x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """`x` where it is visible (None: everywhere), else 0."""
    return x if visible is None else jnp.where(visible, x, 0.0)


def sum_visible(
    subscripts: str,
    weights: jax.Array,
    rows: jax.Array,
    visible: jax.Array | None,
    rows_are_finite: jax.Array | None,
) -> jax.Array:
    """`einsum(subscripts, weights, rows)` over visible weights; hidden weights are 0.

    The sum is of weights' dtype. `rows_are_finite`: None where they are known to be.
    """

    def multiply(weights: jax.Array, rows: jax.Array) -> jax.Array:
        of_rows = weights.astype(rows.dtype)
        return jnp.einsum(subscripts, of_rows, rows, preferred_element_type=weights.dtype)

    if visible is None or rows_are_finite is None:
        return multiply(weights, rows)
    everywhere = jnp.broadcast_to(visible, weights.shape)

    def ieee_sum() -> jax.Array:
        """The IEEE sum of the visible terms: a hidden one is absent instead of `0 * x`."""
        finite = multiply(weights, jnp.where(jnp.isfinite(rows), rows, 0.0))
        # Terms are counted by products too: infinite ones with their signs and without, and all
        # that are not finite. NaN and 0 times infinity are what the last has more.
        infinity = jnp.where(jnp.isinf(rows), jnp.sign(rows), 0.0)
        sign = jnp.sign(weights)
        balance, infinite = multiply(sign, infinity), multiply(jnp.abs(sign), jnp.abs(infinity))
        not_finite = multiply(
            everywhere.astype(rows.dtype), (~jnp.isfinite(rows)).astype(rows.dtype)
        )
        is_nan = (not_finite > infinite) | (jnp.abs(balance) < infinite)
        limit = jnp.where(is_nan, jnp.nan, jnp.sign(balance) * jnp.inf)
        return jnp.where(not_finite > 0, limit, finite)

    return cast(Any, jax.lax.cond)(rows_are_finite, lambda: multiply(weights, rows), ieee_sum)
