"""Which tokens of a device can be seen, by what says it of whole sequences."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_gluon._context_parallel.blocks import row_positions
from jax_gluon._context_parallel.problem import ContextProblem, Keys, Rows
from jax_gluon._context_parallel.token_layouts import positions
from jax_gluon._visible_tokens import visible_by_logits


def visible_rows(context: ContextProblem, rows: Rows) -> jax.Array | None:
    """Bool `[B, T]`; None: all."""
    if rows.lengths is None:
        return None
    rank = jax.lax.axis_index(context.axis_name)
    return row_positions(context, rank, context.sight.tokens[0])[None, :] < rows.lengths[:, None]


def visible_keys(context: ContextProblem, rows: Rows, keys: Keys) -> jax.Array | None:
    """Bool `[B, S]`, of the keys that any row of any device may see; None: all."""
    sight = context.sight
    T, S = sight.tokens
    conditions = [keys.mask]
    if rows.key_value_lengths is not None:
        conditions.append(_key_positions(context)[None, :] < rows.key_value_lengths[:, None])
    reach = sight.reach()[1]
    if sight.is_known and reach is not None and T * sight.shards + reach < S * sight.shards:
        conditions.append((_key_positions(context) < T * sight.shards + reach)[None, :])
    conditions.append(_by_logits(context, rows, S))
    seen = None
    for condition in conditions:
        if condition is not None:
            seen = condition if seen is None else seen & condition
    B = rows.query.shape[0]
    return None if seen is None else jnp.broadcast_to(seen, (B, S))


def _by_logits(context: ContextProblem, rows: Rows, size: int) -> jax.Array | None:
    # A device's bias and mask are of its rows alone, also where they are the same for all of these.
    over = _names(context.axis_name)
    seen = visible_by_logits(context.problem, rows.bias, rows.mask, over)
    if seen is None or seen.shape[1] == 1:
        return seen
    rank = jax.lax.axis_index(context.axis_name)
    return jax.lax.dynamic_slice_in_dim(seen, rank * size, size, 1)


def _names(axis: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], axis) if isinstance(axis, tuple) else (axis,)


def _key_positions(context: ContextProblem) -> jax.Array:
    sight = context.sight
    rank = jax.lax.axis_index(context.axis_name)
    return positions(sight.layout, rank, sight.shards, sight.tokens[1])
