"""Every device gets all tokens of a part of the heads, and gives the output back by tokens.

DeepSpeed Ulysses (https://arxiv.org/abs/2309.14509). What stays on a device from forward to
backward has as many bytes as its own tokens of all heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from jax_gluon._context_parallel import blocks, wire
from jax_gluon._context_parallel.all_gather import gradients_of_blocks, over_blocks
from jax_gluon._context_parallel.pieces import is_plain
from jax_gluon._context_parallel.problem import (
    ContextProblem,
    Cotangents,
    Gradients,
    Keys,
    Partial,
    Rows,
)
from jax_gluon._context_parallel.token_layouts import reorder_tokens, restore_tokens
from jax_gluon._dropout import of_later_heads


def forward(context: ContextProblem, rows: Rows, keys: Keys) -> Partial:
    """Attention of this device's rows over all keys."""

    def in_sequence(rows: Rows, everyone: Keys) -> Partial:
        part = blocks.attend_all(context, *_in_sequence(context, rows, everyone))
        return jax.tree.map(functools.partial(_of_shards, context), part)

    def by_blocks(rows: Rows, everyone: Keys) -> Partial:
        return over_blocks(context, rows, everyone, 0)

    rows, everyone = exchanged(context, rows, keys)
    if is_plain(context, rows, keys):
        part = blocks.of_tokens(context, in_sequence, by_blocks, rows, everyone)
    else:
        part = by_blocks(rows, everyone)
    return Partial(*(by_tokens(context, x) for x in part))


def backward(
    context: ContextProblem, rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents
) -> Gradients:
    """Gradients of this device's rows and of its keys."""
    whole, cotangents = jax.tree.map(functools.partial(by_heads, context), (whole, cotangents))

    def in_sequence(
        rows: Rows, everyone: Keys, whole: Partial, cotangents: Cotangents
    ) -> Gradients:
        rows, keys = _in_sequence(context, rows, everyone)
        of_rows = jax.tree.map(functools.partial(_restored, context), (whole, cotangents))
        part = blocks.differentiate_all(context, rows, keys, *of_rows)
        d_query, d_key, d_value = (_of_shards(context, x) for x in part[:3])
        shards = context.shards
        return Gradients(
            d_query, wire.parts_of(d_key, shards), wire.parts_of(d_value, shards), None
        )

    def by_blocks(rows: Rows, everyone: Keys, whole: Partial, cotangents: Cotangents) -> Gradients:
        return gradients_of_blocks(context, rows, everyone, 0, whole, cotangents)

    rows, everyone = exchanged(context, rows, keys)
    if is_plain(context, rows, keys):
        sums = blocks.of_tokens(context, in_sequence, by_blocks, rows, everyone, whole, cotangents)
    else:
        sums = by_blocks(rows, everyone, whole, cotangents)
    d_key, d_value = (
        wire.heads_together(x, context.axis_name, context.shards) for x in (sums.key, sums.value)
    )
    return Gradients(by_tokens(context, sums.query), d_key, d_value, None)


def _in_sequence(context: ContextProblem, rows: Rows, everyone: Keys) -> tuple[Rows, Keys]:
    """All rows, and all keys, as floats in the order of the sequence."""
    # Codes of each device have a center of their own.
    rows, everyone = jax.vmap(blocks.as_floats, (None, 0), (None, 0))(rows, everyone)
    key, value = (wire.rows_of(x) for x in (everyone.key, everyone.value))
    keys = Keys(_restored(context, key), _restored(context, value))
    return rows._replace(query=_restored(context, rows.query)), keys


def _restored(context: ContextProblem, x: jax.Array) -> jax.Array:
    """`[B, P * tokens, ...]`, of shard after shard, in the order of the sequence."""
    layout = context.sight.layout
    if layout == "given":
        return x
    return restore_tokens(x, context.shards, layout)


def _of_shards(context: ContextProblem, x: jax.Array) -> jax.Array:
    """The inverse of `_restored`."""
    layout = context.sight.layout
    if layout == "given":
        return x
    return reorder_tokens(x, context.shards, layout)


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
