"""Every device gets all keys and values at once, and sums of gradients are scattered back.

One collective in place of P - 1, where there is memory for all keys and values.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_gluon._context_parallel import blocks, wire
from jax_gluon._context_parallel.merging import merged, unit_of
from jax_gluon._context_parallel.problem import (
    ContextProblem,
    Cotangents,
    Gradients,
    Keys,
    Partial,
    Place,
    Rows,
)


def forward(context: ContextProblem, rows: Rows, keys: Keys) -> Partial:
    """Attention of this device's rows over all keys."""
    everyone = wire.gathered(keys, context.axis_name)
    return over_blocks(context, rows, everyone, rank_of(context))


def backward(
    context: ContextProblem, rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents
) -> Gradients:
    """Gradients of this device's rows, of its keys, and of its rows of the bias."""
    everyone = wire.gathered(keys, context.axis_name)
    sums = gradients_of_blocks(context, rows, everyone, rank_of(context), whole, cotangents)

    def own(x: jax.Array) -> jax.Array:
        return cast(Any, jax.lax).psum_scatter(x, context.axis_name)

    return sums._replace(key=own(sums.key), value=own(sums.value))


def rank_of(context: ContextProblem) -> jax.Array:
    return jax.lax.axis_index(context.axis_name)


def over_blocks(context: ContextProblem, rows: Rows, everyone: Keys, shard: Any) -> Partial:
    """Attention of the rows of `shard` over all blocks."""
    unit = unit_of(context.problem)
    result = None
    for k in range(context.shards):
        block = wire.block(everyone, k)
        part = blocks.attend(context, rows, block, Place(shard, k), _seen(context, shard, k))
        result = part if result is None else merged(result, part, unit)
    assert result is not None
    return result


def gradients_of_blocks(
    context: ContextProblem,
    rows: Rows,
    everyone: Keys,
    shard: Any,
    whole: Partial,
    cotangents: Cotangents,
) -> Gradients:
    """Gradients of rows, and of all blocks, with a leading axis of them."""
    d_query = d_bias = None
    d_keys: list[jax.Array] = []
    d_values: list[jax.Array] = []
    for k in range(context.shards):
        block = wire.block(everyone, k)
        seen = _seen(context, shard, k)
        part = blocks.differentiate(context, rows, block, Place(shard, k), seen, whole, cotangents)
        d_query = part.query if d_query is None else d_query + part.query
        d_bias = blocks.added_columns(rows.bias, d_bias, part.bias, k, block)
        d_keys.append(part.key)
        d_values.append(part.value)
    assert d_query is not None
    return Gradients(d_query, jnp.stack(d_keys), jnp.stack(d_values), d_bias)


def _seen(context: ContextProblem, shard: Any, k: int) -> Any:
    """Whether the rows may see block k; all rows may, if any shard of them does."""
    seers = [row[k] for row in context.sight.blocks()]
    if isinstance(shard, int):
        return any(seers)
    if all(seers) or not any(seers):
        return all(seers)
    return jnp.asarray(seers)[shard]
