"""Attention over parts of the keys, put together exactly: section 3.1 of FlashAttention-2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_gluon._context_parallel.problem import Partial
from jax_gluon._lowering import on_platform
from jax_gluon._problem import EMPTY_ROW_LOG_SUM_EXP, AttentionProblem, log_sum_exp

_EMPTY = EMPTY_ROW_LOG_SUM_EXP


def unit_of(problem: AttentionProblem) -> jax.Array:
    """The natural logarithm of the base that parts of a log-sum-exp are in."""
    return on_platform(
        problem.implementation,
        lambda: jnp.float32(math.log(2.0)),
        lambda: jnp.float32(1.0),
    )


def merged(a: Partial, b: Partial, unit: jax.Array) -> Partial:
    """Over the keys of both, which have none in common.

    A row that sees none in one part is as in the other. The maximum and the logarithm of the sum
    stay apart: their sum would lose the logarithm beside a large maximum.
    """
    dtype = a.log_sum.dtype
    unit = unit.astype(dtype)
    empty = jnp.asarray(_EMPTY, dtype)
    a_is_empty, b_is_empty = a.log_sum == empty, b.log_sum == empty
    larger = jnp.maximum(a.maximum, b.maximum)
    maximum = jnp.where(a_is_empty, b.maximum, jnp.where(b_is_empty, a.maximum, larger))

    def weight(x: Partial, is_empty: jax.Array) -> jax.Array:
        exponent = ((x.maximum - maximum) + x.log_sum) * unit
        return jnp.where(is_empty, 0.0, jnp.exp(jnp.where(is_empty, 0.0, exponent)))

    # Sums are relative to the larger maximum, so that they are neither 0 nor infinite.
    of_a, of_b = weight(a, a_is_empty), weight(b, b_is_empty)
    total = of_a + of_b
    are_empty = a_is_empty & b_is_empty
    safe = jnp.where(are_empty, 1.0, total)
    out = _times(a.out, of_a / safe) + _times(b.out, of_b / safe)
    log_sum = jnp.where(are_empty, empty, jnp.log(safe) / unit)
    return Partial(out, maximum, log_sum)


def _times(out: jax.Array, weight: jax.Array) -> jax.Array:
    return out * weight[..., None].astype(out.dtype)


def hidden(x: Partial, is_seen: jax.Array) -> Partial:
    """`x` with rows of which nothing counts, where `is_seen` (bool `[B, T]`) is False."""
    rows = is_seen[:, :, None]
    return Partial(
        jnp.where(rows[..., None], x.out, 0.0),
        jnp.where(rows, x.maximum, 0.0),
        jnp.where(rows, x.log_sum, jnp.asarray(_EMPTY, x.log_sum.dtype)),
    )


def with_sinks(x: Partial, sinks: jax.Array | None, unit: jax.Array) -> Partial:
    """`x` with a logit `[1, N]` more in each row's denominator; rows that see no key stay empty."""
    if sinks is None:
        return x
    dtype = x.log_sum.dtype
    shape = x.log_sum.shape
    is_one = sinks > -jnp.inf
    logit = jnp.where(is_one, sinks, 0.0).astype(dtype)[:, None] / unit.astype(dtype)
    zero = jnp.zeros_like(x.log_sum)
    none = jnp.asarray(_EMPTY, dtype)
    log_sum = jnp.where(jnp.broadcast_to(is_one[:, None], shape), zero, none)
    sink = Partial(jnp.zeros_like(x.out), jnp.broadcast_to(logit, shape), log_sum)
    is_empty = x.log_sum == none
    both = merged(x, sink, unit)
    return Partial(
        jnp.where(is_empty[..., None], x.out, both.out),
        jnp.where(is_empty, x.maximum, both.maximum),
        jnp.where(is_empty, x.log_sum, both.log_sum),
    )


def natural(x: Partial, sinks: jax.Array | None, unit: jax.Array) -> jax.Array:
    """The natural log-sum-exp, finite where a row sees no key; that of such a row is its sink."""
    return log_sum_exp(x.maximum, x.log_sum, sinks, unit)
