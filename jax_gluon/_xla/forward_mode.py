"""The tangent of attention in plain XLA, in O(T) memory, which JAX itself can differentiate.

With P from forward's log-sum-exp, `dS` the tangent of the logits and `m = rowsum(P * dS)`, that of
the log-sum-exp: `dO = (P * dS) V + P dV - m O`. Loops have as many steps whatever the numbers are,
and each step is under `jax.checkpoint`: reverse mode keeps no tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    AttentionProblem,
    FloatOperands,
    Residuals,
    Tangents,
)
from jax_gluon._xla.tiles import QUERIES_FIRST, Tiles, all_finite, swap_tokens_and_heads
from jax_gluon._xla.visible import hide, sum_visible


class _Sums(NamedTuple):
    """Of a block of rows over keys: `[B, K, G, t, V]` and `[B, K, G, t, 1]`.

    `out` is the output, where forward's was rounded.
    """

    weighted: jax.Array
    mean: jax.Array
    out: jax.Array | None

    def add(self, other: _Sums) -> _Sums:
        return jax.tree.map(jnp.add, self, other)


def tangent(
    problem: AttentionProblem, residuals: Residuals, tangents: Tangents
) -> tuple[jax.Array, jax.Array]:
    """Tangents of the output `[B, T, N, V]` and of the natural log-sum-exp `[B, T, N]`.

    `residuals` are of float operands. `tangents` are those of query, key, value, bias and sinks;
    None: zero. They are computed, and returned, in float32, or float64 for float64 operands.
    """
    operands = cast(FloatOperands, residuals.operands)
    tiles = Tiles(problem, operands)
    count = tiles.queries.count

    def block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _block(tiles, residuals, tangents, i)

    index = jnp.arange(count, dtype=jnp.int32)
    blocks = cast(Any, jax.lax.map)(_recomputed(block), index)
    d_out, d_log_sum_exp = (_join(tiles, x) for x in blocks)
    return d_out, d_log_sum_exp[..., 0]


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    # Loops keep XLA from sharing what is computed twice.
    return cast(Any, jax.checkpoint)(function, prevent_cse=False)


def _join(tiles: Tiles, blocks: jax.Array) -> jax.Array:
    """Blocks of rows `[count, B, K, G, t, X]` as `[B, T, N, X]`."""
    _, B, _, _, t, X = blocks.shape
    T = tiles.queries.length
    rows = jnp.transpose(blocks, (1, 0, 4, 2, 3, 5)).reshape(B, -1, *tiles.groups, X)
    # The last block begins early: its first rows are of the block before it.
    begin = rows.shape[1] - t
    repeated = rows.shape[1] - T
    whole = jnp.concatenate([rows[:, :begin], rows[:, begin + repeated :]], axis=1)
    return whole.reshape(B, T, -1, X)


def _block(
    tiles: Tiles, residuals: Residuals, tangents: Tangents, i: jax.Array
) -> tuple[jax.Array, jax.Array]:
    operands = cast(FloatOperands, residuals.operands)
    query = tiles.rows(operands.query, i)
    maximum = tiles.rows(residuals.row_maximum[..., None], i)
    log_sum = tiles.rows(residuals.log_sum[..., None], i)
    is_empty = log_sum == EMPTY_ROW_LOG_SUM_EXP
    log_sum = jnp.where(is_empty, 0.0, log_sum)
    is_rounded = residuals.out.dtype != tiles.dtype
    d_query = None if tangents.query is None else tiles.rows(tangents.query, i)
    d_key, d_value = (
        None if x is None else swap_tokens_and_heads(x) for x in (tangents.key, tangents.value)
    )
    # Whether to count terms steers a branch: no derivative passes.
    finite = {
        name: all_finite(jax.lax.stop_gradient(x))
        for name, x in (("value", operands.value), ("d_value", tangents.value))
        if x is not None
    }

    def tile(c: jax.Array) -> _Sums:
        logits, visible, slope = tiles.scores(query, i, c, QUERIES_FIRST)
        p = hide(jnp.exp((logits - maximum) - log_sum), visible)
        d_logits = jnp.zeros_like(logits)
        if d_query is not None:
            d_logits += jnp.einsum("bkgth,bksh->bkgts", d_query, tiles.keys(c))
        if d_key is not None:
            d_logits += jnp.einsum("bkgth,bksh->bkgts", query, tiles.tokens(d_key, c))
        d_logits *= tiles.problem.scale
        if (d_bias := tiles.tile(tangents.bias, i, c)) is not None:
            d_logits += d_bias.astype(tiles.dtype)
        if slope is not None:
            d_logits *= slope
        p_d_logits = p * hide(d_logits, visible)
        mean = jnp.sum(p_d_logits, axis=-1, keepdims=True)
        if (kept := tiles.kept(i, c)) is not None:
            left = 1.0 - tiles.problem.dropout_rate
            p, p_d_logits = (jnp.where(kept, x, 0.0) / left for x in (p, p_d_logits))
            visible = kept if visible is None else visible & kept

        def multiply(weights: jax.Array, rows: jax.Array, name: str) -> jax.Array:
            return sum_visible("bkgts,bksv->bkgtv", weights, rows, visible, finite[name])

        value = tiles.values(c)
        weighted = multiply(p_d_logits, value, "value")
        if d_value is not None:
            weighted += multiply(p, tiles.tokens(d_value, c), "d_value")
        return _Sums(weighted, mean, multiply(p, value, "value") if is_rounded else None)

    column = jnp.zeros_like(query[..., :1])
    row = jnp.broadcast_to(column, (*query.shape[:-1], operands.value.shape[-1]))
    zero = _Sums(row, column, row if is_rounded else None)
    begin, end = tiles.chunk_range(i)

    @_recomputed
    def visible_tile(c: jax.Array) -> _Sums:
        is_visited = (begin <= c) & (c < end)
        return cast(Any, jax.lax.cond)(is_visited, lambda: tile(c), lambda: zero)

    def step(sums: _Sums, c: jax.Array) -> tuple[_Sums, None]:
        return sums.add(visible_tile(c)), None

    chunks = jnp.arange(tiles.chunks.count, dtype=jnp.int32)
    sums, _ = cast(Any, jax.lax.scan)(step, zero, chunks)
    d_log_sum_exp = sums.mean
    if tangents.sinks is not None and tiles.sinks is not None:
        d_sinks = tangents.sinks.astype(tiles.dtype).reshape(1, *tiles.groups, 1, 1)
        p = jnp.exp((tiles.sinks - maximum) - log_sum)
        # The parts of an empty row do not know of the sink.
        p = jnp.where(is_empty, (tiles.sinks > -jnp.inf).astype(tiles.dtype), p)
        d_log_sum_exp += jnp.where(p == 0, 0.0, p * d_sinks)
    out = sums.out if is_rounded else tiles.rows(residuals.out, i)
    # The output of a row that sees no key is 0.
    return jnp.where(is_empty, 0.0, sums.weighted - d_log_sum_exp * out), d_log_sum_exp
