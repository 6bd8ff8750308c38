"""Attention in plain XLA, in O(T) memory: for platforms without the plugin, and for float64.

One tile of scores, a block of queries by a chunk of keys, is alive at a time. Tiles that causal,
window or lengths exclude are not visited. Sums are float32, or float64 for float64 operands.

A hidden key contributes nothing, not `0 * NaN`: where an operand holds a number that is not finite,
every tile's products are replaced by several that tell hidden terms from visible ones. Finite
operands pay one more pass over each of them, which is O(T), to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_gluon._dimensions import is_static, number
from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    MIN_LOGIT,
    AttentionProblem,
    FloatOperands,
)
from jax_gluon._quantization.codes import from_bits, to_bits
from jax_gluon._xla.tiles import (
    KEYS_FIRST,
    QUERIES_FIRST,
    Tiles,
    Tiling,
    add_slice,
    all_finite,
    arrange,
    keys_first,
    swap_tokens_and_heads,
)
from jax_gluon._xla.visible import hide, sum_visible

_State = TypeVar("_State")


def forward(
    problem: AttentionProblem,
    operands: FloatOperands,
    dtype: DTypeLike | None = None,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output `[B, T, N, V]` of `dtype` (None: query's), and two parts of each row's log-sum-exp.

    Those are the maximum of its logits, the sink among them, and the natural logarithm of the sum
    of their exponentials relative to it, `[B, T, N]`, float32 (float64 for float64 operands) and
    finite: a row that sees no key stores 0 and `EMPTY_ROW_LOG_SUM_EXP`, and its output is 0. The
    online softmax is that of FlashAttention-2 (https://arxiv.org/abs/2307.08691).
    """
    B, T, N, _ = operands.query.shape
    _, S, _, V = operands.value.shape
    tiles = Tiles(problem, operands, tiling=tiling)
    # Like the query: in `shard_map`, the loop's state varies as the operands do.
    dtype = operands.query.dtype if dtype is None else dtype
    out = jnp.zeros_like(operands.query, dtype, (B, T, N, V))
    row_maximum = jnp.zeros_like(out, tiles.dtype, (B, T, N, 1))
    log_sum = jnp.full_like(row_maximum, EMPTY_ROW_LOG_SUM_EXP)
    if 0 in (B, T, S):
        return out, row_maximum[..., 0], log_sum[..., 0]
    value_is_finite = _finite(tiling, operands.value)

    def query_block(i: jax.Array, results: tuple[jax.Array, jax.Array, jax.Array]):
        query = tiles.rows(operands.query, i, tiles.multiplied)

        def key_chunk(c: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            weighted, maximum, total = state
            logits, visible, _ = tiles.scores(query, i, c, QUERIES_FIRST)
            raised = jnp.maximum(maximum, jnp.max(logits, axis=-1, keepdims=True))
            p = hide(jnp.exp(logits - raised), visible)
            decay = jnp.exp(maximum - raised)
            total = total * decay + jnp.sum(p, axis=-1, keepdims=True)
            if (kept := tiles.kept(i, c)) is not None:
                p = jnp.where(kept, p, 0.0) / (1.0 - problem.dropout_rate)
                visible = kept if visible is None else visible & kept
            products = sum_visible(
                "bkgts,bksv->bkgtv", p, tiles.values(c), visible, value_is_finite
            )
            return weighted * decay + products, raised, total

        column = jnp.zeros_like(query[..., :1], tiles.dtype)
        state = (jnp.broadcast_to(column, (*query.shape[:-1], V)), column + MIN_LOGIT, column)
        weighted, maximum, total = _loop(*tiles.chunk_range(i), key_chunk, state)
        is_empty = total == 0
        total = jnp.where(is_empty, 1.0, total)
        total, maximum, log_total = _with_sinks(tiles.sinks, total, maximum)
        log_total = jnp.where(is_empty, EMPTY_ROW_LOG_SUM_EXP, log_total)
        return (
            tiles.write_rows(results[0], i, (weighted / total).astype(dtype)),
            tiles.write_rows(results[1], i, jnp.where(is_empty, 0.0, maximum)),
            tiles.write_rows(results[2], i, log_total),
        )

    results = (to_bits(out), row_maximum, log_sum)
    out, row_maximum, log_sum = _loop(0, number(tiles.queries.count), query_block, results)
    return from_bits(out, dtype), row_maximum[..., 0], log_sum[..., 0]


def backward(
    problem: AttentionProblem,
    operands: FloatOperands,
    out: jax.Array,
    row_maximum: jax.Array,
    log_sum: jax.Array,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in the output's dtype, from `forward`'s results.

    `d_out` is the cotangent of `out`, and `d_log_sum_exp` `[B, T, N]` that of the *natural*
    log-sum-exp. P is recomputed tile by tile: `dS = P * (dO V^T - rowsum(dO * O))`. Where `out` was
    rounded, rowsum is taken of P and dO V^T instead, in a sweep before that of the gradients: rows
    of dS sum to 0. What the sweep makes of a block of rows is kept, unless that is too large.
    """
    query, key, value = operands[:3]
    if 0 in (*query.shape, *key.shape):
        d_query, d_key, d_value = (jnp.zeros_like(x, out.dtype) for x in (query, key, value))
        return d_query, d_key, d_value
    tiles = Tiles(problem, operands, tiling=tiling)
    cotangent = _Cotangent(out, row_maximum, log_sum, d_out, d_log_sum_exp)
    kept_rows = _kept_rows(query, key, tiling)
    keeps_rows = _finds_means(tiles, out) and kept_rows > 0
    if keeps_rows:
        tiles = Tiles(problem, operands, kept_rows, tiling)
    query_is_finite, key_is_finite, d_out_is_finite = (
        _finite(tiling, x) for x in (query, key, d_out)
    )

    def query_block(i: jax.Array, results: tuple[jax.Array, jax.Array, jax.Array, _Kept]):
        d_query, d_key, d_value, kept = results
        rows, kept = _backward_rows(tiles, cotangent, i, kept)

        def key_chunk(c: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            d_columns, d_key, d_value = state
            tile = kept.chunk(c) if kept else _probabilities(tiles, rows, i, c, KEYS_FIRST)
            p, d_scores, visible = _backward_tile(rows, tile, KEYS_FIRST)
            p = _dropped(tiles, tile, p)
            d_columns += sum_visible(
                "bksgt,bksh->bkhgt", d_scores, tiles.keys(c), visible, key_is_finite
            )
            d_key_chunk = sum_visible(
                "bksgt,bkgth->bksh", d_scores, rows.query, visible, query_is_finite
            )
            d_value_chunk = sum_visible(
                "bksgt,bkgtv->bksv", p, rows.d_out, visible, d_out_is_finite
            )
            start = tiles.chunks.start(c)
            return (
                d_columns,
                add_slice(d_key, d_key_chunk, {2: start}),
                add_slice(d_value, d_value_chunk, {2: start}),
            )

        state = (keys_first(jnp.zeros_like(rows.query, tiles.dtype)), d_key, d_value)
        d_columns, d_key, d_value = _loop(*tiles.chunk_range(i), key_chunk, state)
        d_rows = jnp.transpose(problem.scale * d_columns, (0, 1, 3, 4, 2))
        return tiles.write_rows(d_query, i, d_rows.astype(out.dtype)), d_key, d_value, kept

    results = (
        to_bits(jnp.zeros_like(query, out.dtype)),
        jnp.zeros_like(tiles.key, tiles.dtype),
        jnp.zeros_like(tiles.value, tiles.dtype),
        _room(tiles, cotangent) if keeps_rows else None,
    )
    d_query, d_key, d_value, _ = _loop(0, number(tiles.queries.count), query_block, results)
    return (
        from_bits(d_query, out.dtype),
        swap_tokens_and_heads((problem.scale * d_key).astype(out.dtype)),
        swap_tokens_and_heads(d_value.astype(out.dtype)),
    )


def backward_bias(
    problem: AttentionProblem,
    operands: FloatOperands,
    out: jax.Array,
    row_maximum: jax.Array,
    log_sum: jax.Array,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    """Gradient of the bias, of its shape and dtype; the arguments are `backward`'s."""
    bias = operands.bias
    if bias is None:
        raise ValueError("jax_gluon.xla.backward_bias: operands.bias is None; allowed: an array.")
    if 0 in (*operands.query.shape, *operands.key.shape):
        return jnp.zeros_like(bias)
    tiles = Tiles(problem, operands)
    cotangent = _Cotangent(out, row_maximum, log_sum, d_out, d_log_sum_exp)
    summed = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    # Each element of a bias that is broadcast along neither T nor S belongs to one tile: it is
    # rounded once, and needs no wider copy of the largest array here.
    is_written_once = 2 not in summed and 3 not in summed
    dtype = bias.dtype if is_written_once else np.promote_types(bias.dtype, tiles.dtype)

    def query_block(i: jax.Array, d_bias: jax.Array):
        rows, _ = _backward_rows(tiles, cotangent, i, None)

        def key_chunk(c: jax.Array, d_bias: jax.Array):
            tile = _probabilities(tiles, rows, i, c, QUERIES_FIRST)
            _, d_scores, _ = _backward_tile(rows, tile, QUERIES_FIRST)
            B, K, G, t, s = d_scores.shape
            tile = jnp.sum(d_scores.reshape(B, K * G, t, s), axis=summed, keepdims=True)
            starts = {2: tiles.queries.start(i), 3: tiles.chunks.start(c)}
            kept = {axis: start for axis, start in starts.items() if axis not in summed}
            return add_slice(d_bias, tile.astype(dtype), kept)

        return _loop(*tiles.chunk_range(i), key_chunk, d_bias)

    zeros = to_bits(jnp.zeros_like(bias, dtype))
    return from_bits(_loop(0, number(tiles.queries.count), query_block, zeros), dtype).astype(
        bias.dtype
    )


def _with_sinks(
    sinks: jax.Array | None, total: jax.Array, maximum: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What rows are divided by, and the parts of their log-sum-exp, of sums relative to a maximum.

    The sink is added once, to the sums of all keys.
    """
    if sinks is None:
        return total, maximum, jnp.log(total)
    divisor = total + jnp.exp(sinks - maximum)
    is_larger = sinks > maximum
    of_sink = jnp.log1p(total * jnp.exp(jnp.where(is_larger, maximum - sinks, 0.0)))
    log_total = jnp.where(is_larger, of_sink, jnp.log(divisor))
    return divisor, jnp.where(is_larger, sinks, maximum), log_total


class _Cotangent(NamedTuple):
    """What backward reads beside the operands; see `backward`."""

    out: jax.Array
    row_maximum: jax.Array
    log_sum: jax.Array
    d_out: jax.Array
    d_log_sum_exp: jax.Array | None


class _BackwardRows(NamedTuple):
    """One query block, `[B, K, G, t, X]`; X is 1 but for `query` and `d_out`.

    `is_seen`: which rows are not empty; None where nothing is visible to those that are.
    """

    query: jax.Array
    d_out: jax.Array
    maximum: jax.Array
    log_sum: jax.Array
    delta: jax.Array
    is_seen: jax.Array | None


class _Probabilities(NamedTuple):
    """P of a tile and its gradient; which are visible (None: all), the soft cap's slope.

    The gradient is dO V^T, of what dropout keeps (`kept`; None: all) divided by what it leaves.
    """

    p: jax.Array
    d_p: jax.Array
    visible: jax.Array | None
    slope: jax.Array | None
    kept: jax.Array | None

    def chunk(self, c: jax.Array) -> _Probabilities:
        """One of those of all chunks of keys, whose axis leads."""

        def index(x: jax.Array) -> jax.Array:
            return cast(Any, jax.lax.dynamic_index_in_dim)(x, c, keepdims=False)

        return jax.tree.map(index, self)

    def with_chunk(self, c: jax.Array, tile: _Probabilities) -> _Probabilities:
        """Those of all chunks with one replaced."""

        def update(x: jax.Array, part: jax.Array) -> jax.Array:
            return cast(Any, jax.lax.dynamic_update_index_in_dim)(x, part, c, 0)

        return jax.tree.map(update, self, tile)


# Those of all chunks of keys, for a block of rows: a leading axis. None where they are not kept.
_Kept = _Probabilities | None
# Elements of P that are kept, at most: 64 MiB of float32. Rows of a block that is kept, at most,
# which take the memory of a few operands, and at least, so that products are of matrices.
_MAX_KEPT, _MAX_KEPT_ROWS, _MIN_KEPT_ROWS = 2**24, 64, 16


def _kept_rows(query: jax.Array, key: jax.Array, tiling: Tiling | None) -> int:
    """Rows of a block whose P and dP are kept; 0 where there is no room."""
    B, _, N, _ = query.shape
    if not is_static(B, key.shape[1]):
        return 0
    most, most_rows = (
        (_MAX_KEPT, _MAX_KEPT_ROWS) if tiling is None else (tiling.kept, tiling.kept_rows)
    )
    rows = most // (B * N * key.shape[1])
    return min(rows, most_rows) if rows >= _MIN_KEPT_ROWS else 0


def _finite(tiling: Tiling | None, x: jax.Array) -> jax.Array | None:
    """Whether no element is NaN or infinite; None where that is known."""
    return None if tiling is not None and tiling.is_plain else all_finite(x)


def _room(tiles: Tiles, cotangent: _Cotangent) -> _Probabilities:
    """Room for what the sweep before that of the gradients makes of a block of rows."""
    first = jnp.zeros((), jnp.int32)

    def tile() -> _Probabilities:
        rows = _saved_rows(tiles, cotangent, first)
        return _probabilities(tiles, rows, first, first, KEYS_FIRST)

    def room(x: jax.Array) -> jax.Array:
        # Like the query: in `shard_map`, a loop's state varies as the operands do.
        return jnp.zeros_like(tiles.query, x.dtype, (tiles.chunks.count, *x.shape))

    return jax.tree.map(room, cast(Any, jax.eval_shape)(tile))


def _saved_rows(tiles: Tiles, cotangent: _Cotangent, i: jax.Array) -> _BackwardRows:
    """A query block as forward left it: without delta, which is zeros."""
    maximum = tiles.rows(cotangent.row_maximum[..., None], i)
    log_sum = tiles.rows(cotangent.log_sum[..., None], i)
    is_empty = log_sum == EMPTY_ROW_LOG_SUM_EXP
    # 0 keeps the unused exponentials of an empty row finite.
    log_sum = jnp.where(is_empty, 0.0, log_sum)
    query, d_out = (tiles.rows(x, i, tiles.multiplied) for x in (tiles.query, cotangent.d_out))
    # Who asked for a part of the keys may have hidden rows when the parts were merged.
    is_seen = ~is_empty if tiles.problem.is_partial else None
    return _BackwardRows(query, d_out, maximum, log_sum, jnp.zeros_like(log_sum), is_seen)


def _finds_means(tiles: Tiles, out: jax.Array) -> bool:
    """Whether D takes a sweep of its own, since the output was rounded."""
    return out.dtype != tiles.dtype and not tiles.problem.is_partial


def _backward_rows(
    tiles: Tiles, cotangent: _Cotangent, i: jax.Array, kept: _Kept
) -> tuple[_BackwardRows, _Kept]:
    """A query block; P and its gradient, for all keys, where there is room for them."""
    rows = _saved_rows(tiles, cotangent, i)
    if tiles.problem.is_partial:
        delta = jnp.zeros_like(rows.delta)
    elif not _finds_means(tiles, cotangent.out):
        delta = jnp.sum(rows.d_out * tiles.rows(cotangent.out, i), axis=-1, keepdims=True)
    else:
        delta, kept = _mean_d_probability(tiles, rows, i, kept)
    if cotangent.d_log_sum_exp is not None:
        delta -= tiles.rows(cotangent.d_log_sum_exp[..., None], i)
    return rows._replace(delta=delta), kept


def _mean_d_probability(
    tiles: Tiles, rows: _BackwardRows, i: jax.Array, kept: _Kept
) -> tuple[jax.Array, _Kept]:
    """Each row's mean of dO V^T, weighted by P: what `rowsum(dO * O)` is for an exact O.

    The sink is a key whose value is 0: it is among the weights.
    """

    def key_chunk(c: jax.Array, state: tuple[jax.Array, jax.Array, _Kept]):
        weighted, total, kept = state
        tile = _probabilities(tiles, rows, i, c, KEYS_FIRST)
        weighted += jnp.sum(hide(tile.p * tile.d_p, tile.visible), axis=2, keepdims=True)
        total += jnp.sum(tile.p, axis=2, keepdims=True)
        if kept is not None:
            kept = kept.with_chunk(c, tile)
        return weighted, total, kept

    zero = keys_first(jnp.zeros_like(rows.maximum))
    first = zero
    if tiles.sinks is not None:
        first = keys_first(jnp.exp((tiles.sinks - rows.maximum) - rows.log_sum))
    weighted, total, kept = _loop(*tiles.chunk_range(i), key_chunk, (zero, first, kept))
    mean = weighted / jnp.where(total == 0, 1.0, total)
    return jnp.transpose(mean, (0, 1, 3, 4, 2)), kept


def _probabilities(
    tiles: Tiles, rows: _BackwardRows, i: jax.Array, c: jax.Array, order: str
) -> _Probabilities:
    logits, visible, slope = tiles.scores(rows.query, i, c, order)
    if rows.is_seen is not None:
        is_seen = arrange(rows.is_seen, order)
        visible = is_seen if visible is None else visible & is_seen
    # In this order: the logarithm of the sum would vanish in a large maximum.
    below_maximum = logits - arrange(rows.maximum, order)
    p = hide(jnp.exp(below_maximum - arrange(rows.log_sum, order)), visible)
    d_p = tiles.products(f"bkgtv,bksv->{order}", rows.d_out, tiles.values(c))
    kept = tiles.kept(i, c)
    if kept is not None:
        kept = arrange(kept, order)
        d_p = jnp.where(kept, d_p, 0.0) / (1.0 - tiles.problem.dropout_rate)
    return _Probabilities(p, d_p, visible, slope, kept)


def _dropped(tiles: Tiles, tile: _Probabilities, p: jax.Array) -> jax.Array:
    """P as value meets it."""
    if tile.kept is None:
        return p
    return jnp.where(tile.kept, p, 0.0) / (1.0 - tiles.problem.dropout_rate)


def _backward_tile(
    rows: _BackwardRows, tile: _Probabilities, order: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """P, the gradient of the biased scores, and which of them are visible (None: all)."""
    d_scores = tile.p * (tile.d_p - arrange(rows.delta, order))
    if tile.slope is not None:
        d_scores *= tile.slope
    return tile.p, hide(d_scores, tile.visible), tile.visible


def _loop(
    begin: int | jax.Array, end: int | jax.Array, body: Callable[..., Any], state: _State
) -> _State:
    """`fori_loop` with int32 indices, also under x64; bounds that are ints stay static."""
    bounds = [np.int32(x) if isinstance(x, int) else x for x in (begin, end)]

    def with_int32(index: jax.Array, state: _State) -> _State:
        return body(jnp.asarray(index, jnp.int32), state)  # an int under disable_jit

    return cast(Any, jax.lax.fori_loop)(*bounds, with_int32, state)
