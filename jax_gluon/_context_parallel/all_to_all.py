"""Every device gets all tokens of a part of the heads, and gives the output back by tokens.

DeepSpeed Ulysses (https://arxiv.org/abs/2309.14509). What stays on a device from forward to
backward has as many bytes as its own tokens of all heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from jax_gluon._context_parallel import wire
from jax_gluon._context_parallel.all_gather import gradients_of_blocks, over_blocks
from jax_gluon._context_parallel.problem import (
    ContextProblem,
    Cotangents,
    Gradients,
    Keys,
    Partial,
    Rows,
)
from jax_gluon._dropout import of_later_heads


def forward(context: ContextProblem, rows: Rows, keys: Keys) -> Partial:
    """Attention of this device's rows over all keys."""
    part = over_blocks(context, *exchanged(context, rows, keys), 0)
    return Partial(*(by_tokens(context, x) for x in part))


def backward(
    context: ContextProblem, rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents
) -> Gradients:
    """Gradients of this device's rows and of its keys."""
    whole, cotangents = jax.tree.map(functools.partial(by_heads, context), (whole, cotangents))
    sums = gradients_of_blocks(context, *exchanged(context, rows, keys), 0, whole, cotangents)
    d_key, d_value = (
        wire.heads_together(x, context.axis_name, context.shards) for x in (sums.key, sums.value)
    )
    return Gradients(by_tokens(context, sums.query), d_key, d_value, None)


def exchanged(context: ContextProblem, rows: Rows, keys: Keys) -> tuple[Rows, Keys]:
    """All rows of this device's heads, and all blocks of their keys."""
    everyone = wire.heads_apart(keys, context.axis_name, context.shards)
    query = wire.heads_apart(rows.query, context.axis_name, context.shards)
    query = jax.tree.map(wire.rows_of, query)

    def of_all(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else wire.rows_of(wire.gathered(x, context.axis_name))

    seeds = rows.dropout_seeds
    if seeds is not None:
        rank = jax.lax.axis_index(context.axis_name)
        seeds = of_later_heads(seeds, rank * (rows.query.shape[2] // context.shards))
    own = rows._replace(
        query=query,
        positions=of_all(rows.positions),
        segment_ids=of_all(rows.segment_ids),
        dropout_seeds=seeds,
    )
    return own, everyone


def by_heads(context: ContextProblem, x: jax.Array) -> jax.Array:
    """From own tokens `[B, T / P, N, ...]` to own heads `[B, T, N / P, ...]`."""

    def move(x: jax.Array) -> jax.Array:
        return wire.rows_of(wire.heads_apart(x, context.axis_name, context.shards))

    return _with_columns(x, move)


def by_tokens(context: ContextProblem, x: jax.Array) -> jax.Array:
    """The inverse of `by_heads`."""

    def back(x: jax.Array) -> jax.Array:
        parts = wire.parts_of(x, context.shards)
        return wire.heads_together(parts, context.axis_name, context.shards)

    return _with_columns(x, back)


def _with_columns(x: jax.Array, move: Any) -> jax.Array:
    """`move` of rank 4, of an array that may lack the last axis."""
    return move(x[..., None])[..., 0] if x.ndim == 3 else move(x)
