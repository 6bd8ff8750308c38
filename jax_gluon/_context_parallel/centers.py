"""Backward without what all keys share, where the output was made of rounded probabilities.

D is taken from that output, so rows of dS do not sum quite to what they should; what keys share
would multiply the rest, and may be far larger than what tells them apart. Softmax does not see it:
it goes from the keys' centers into the rows' log-sum-exp, and its part of dQ is known exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jax_gluon._context_parallel.merging import unit_of
from jax_gluon._context_parallel.problem import ContextProblem, Keys, Partial, Rows
from jax_gluon._problem import EMPTY_ROW_LOG_SUM_EXP, compute_dtype
from jax_gluon._quantization.codes import unrotated
from jax_gluon._quantization.formats import QuantizedTensor


class Uncentered(NamedTuple):
    """Keys and whole rows as blocks are to have them, and what dQ of these lacks, or None."""

    keys: Keys
    whole: Partial
    d_query: jax.Array | None


def without_common_center(
    context: ContextProblem, rows: Rows, keys: Keys, whole: Partial, row_sums: jax.Array
) -> Uncentered:
    """Without the mean of all devices' centers; `row_sums` `[B, T, N]` are those of dS."""
    key, problem = keys.key, context.problem
    if not isinstance(key, QuantizedTensor) or key.center is None or problem.soft_cap is not None:
        return Uncentered(keys, whole, None)
    wide = compute_dtype(rows.query.dtype)
    common: jax.Array = cast(Any, jax.lax).pmean(key.center, context.axis_name)
    query: Any = rows.query
    query = query.dequantize(wide) if isinstance(query, QuantizedTensor) else query.astype(wide)
    of_rows = unrotated(common) if key.spec.rotate else common
    of_rows = jnp.repeat(of_rows, query.shape[2] // of_rows.shape[2], axis=2).astype(wide)
    shift = problem.scale * jnp.sum(query * of_rows, axis=-1).astype(whole.maximum.dtype)
    shift = shift / unit_of(problem).astype(shift.dtype)
    is_empty = whole.log_sum == jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, whole.log_sum.dtype)
    sums = jnp.where(is_empty, 0.0, row_sums)[..., None].astype(wide)
    return Uncentered(
        keys._replace(key=replace(key, center=key.center - common)),
        whole._replace(maximum=jnp.where(is_empty, 0.0, whole.maximum - shift)),
        problem.scale * sums * of_rows,
    )
