"""Attention in plain XLA, in O(T) memory: for platforms without the plugin, and for float64.

One tile of scores, a block of queries by a chunk of keys, is alive at a time. Tiles that causal,
window or lengths exclude are not visited. Sums are float32, or float64 for float64 operands.

A hidden key contributes nothing, not `0 * NaN`: where an operand holds a number that is not finite,
every tile's products are replaced by several that tell hidden terms from visible ones. Finite
operands pay one more pass over each of them, which is O(T), to find out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon.problem import EMPTY_ROW_LOG_SUM_EXP, AttentionOperands, AttentionProblem

# A tile of 256 x 256 float32 scores is 256 KiB a head, which a core's L2 cache holds beside its
# operands. Smaller ones pay more for each step of XLA's loops; larger ones fall out of the cache
# and visit more keys that causal masking hides.
_QUERY_BLOCK = 256
_KEY_CHUNK = 256
# Many heads share a tile, so that wide devices have enough to do; its rows are cut where their
# scores would take more than 64 MiB of float32, but not below what keeps a matrix product busy.
_TILE_SCORES = 2**24
_LEAST_QUERY_BLOCK = 32
# Blocks are multiples of the longest SIMD register, in float32.
_ALIGNMENT = 16

_State = TypeVar("_State")

_LOG2_E = math.log2(math.e)
# Stands for the logit of a hidden key, and bounds the visible ones (a bias of finfo.min) so that
# the base-2 log-sum-exp stays finite and above that of an empty row.
_LEAST_LOGIT = -2.0e38


def forward(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, V]` in query's dtype, and the base-2 log-sum-exp `[B, T, N]` of each row.

    The log-sum-exp is float32 (float64 for float64 operands) and finite: a row that sees no key
    stores `EMPTY_ROW_LOG_SUM_EXP`, and its output is 0. The online softmax is that of
    FlashAttention-2 (https://arxiv.org/abs/2307.08691).
    """
    B, T, N, _ = operands.query.shape
    _, S, _, V = operands.value.shape
    tiles = _Tiles(problem, operands)
    out = jnp.zeros((B, T, N, V), operands.query.dtype)
    log_sum_exp = jnp.full((B, T, N, 1), EMPTY_ROW_LOG_SUM_EXP, tiles.dtype)
    if 0 in (B, T, S):
        return out, log_sum_exp[..., 0]
    value_is_finite = _all_finite(operands.value)

    def query_block(i: jax.Array, results: tuple[jax.Array, jax.Array]):
        query = tiles.rows(operands.query, i)

        def key_chunk(c: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            weighted, maximum, total = state
            logits, visible, _ = tiles.scores(query, i, c, _QUERIES_FIRST)
            raised = jnp.maximum(maximum, jnp.max(logits, axis=-1, keepdims=True))
            p = _hide(jnp.exp(logits - raised), visible)
            decay = jnp.exp(maximum - raised)
            products = _sum_visible(
                "bkgts,bksv->bkgtv", p, tiles.values(c), visible, value_is_finite
            )
            total = total * decay + jnp.sum(p, axis=-1, keepdims=True)
            return weighted * decay + products, raised, total

        column = jnp.zeros_like(query[..., :1])
        state = (jnp.broadcast_to(column, (*query.shape[:-1], V)), column + _LEAST_LOGIT, column)
        weighted, maximum, total = _loop(*tiles.chunk_range(i), key_chunk, state)
        is_empty = total == 0
        total = jnp.where(is_empty, 1.0, total)
        row = (maximum + jnp.log(total)) * _LOG2_E
        return (
            tiles.write_rows(results[0], i, (weighted / total).astype(operands.query.dtype)),
            tiles.write_rows(results[1], i, jnp.where(is_empty, EMPTY_ROW_LOG_SUM_EXP, row)),
        )

    out, log_sum_exp = _loop(0, tiles.queries.count, query_block, (_to_bits(out), log_sum_exp))
    return _from_bits(out, operands.query.dtype), log_sum_exp[..., 0]


def backward(
    problem: AttentionProblem,
    operands: AttentionOperands,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their dtype, from `forward`'s results.

    `d_out` is the cotangent of `out`, and `d_log_sum_exp` `[B, T, N]` that of the *natural*
    log-sum-exp. P is recomputed tile by tile: `dS = P * (dO V^T - rowsum(dO * O))`.
    """
    query, key, value = operands[:3]
    if 0 in (*query.shape, *key.shape):
        return jnp.zeros_like(query), jnp.zeros_like(key), jnp.zeros_like(value)
    tiles = _Tiles(problem, operands)
    cotangent = _Cotangent(out, log_sum_exp, d_out, d_log_sum_exp)
    query_is_finite, key_is_finite, d_out_is_finite = map(_all_finite, (query, key, d_out))

    def query_block(i: jax.Array, results: tuple[jax.Array, jax.Array, jax.Array]):
        d_query, d_key, d_value = results
        rows = _backward_rows(tiles, cotangent, i)

        def key_chunk(c: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
            d_columns, d_key, d_value = state
            p, d_scores, visible = _backward_tile(tiles, rows, i, c, _KEYS_FIRST)
            d_columns += _sum_visible(
                "bksgt,bksh->bkhgt", d_scores, tiles.keys(c), visible, key_is_finite
            )
            d_key_chunk = _sum_visible(
                "bksgt,bkgth->bksh", d_scores, rows.query, visible, query_is_finite
            )
            d_value_chunk = _sum_visible(
                "bksgt,bkgtv->bksv", p, rows.d_out, visible, d_out_is_finite
            )
            start = tiles.chunks.start(c)
            return (
                d_columns,
                _add_slice(d_key, d_key_chunk, {2: start}),
                _add_slice(d_value, d_value_chunk, {2: start}),
            )

        state = (_keys_first(jnp.zeros_like(rows.query)), d_key, d_value)
        d_columns, d_key, d_value = _loop(*tiles.chunk_range(i), key_chunk, state)
        d_rows = jnp.transpose(problem.scale * d_columns, (0, 1, 3, 4, 2))
        return tiles.write_rows(d_query, i, d_rows.astype(query.dtype)), d_key, d_value

    zeros = (
        _to_bits(jnp.zeros_like(query)),
        jnp.zeros_like(tiles.key, tiles.dtype),
        jnp.zeros_like(tiles.value, tiles.dtype),
    )
    d_query, d_key, d_value = _loop(0, tiles.queries.count, query_block, zeros)
    return (
        _from_bits(d_query, query.dtype),
        _swap_tokens_and_heads((problem.scale * d_key).astype(key.dtype)),
        _swap_tokens_and_heads(d_value.astype(value.dtype)),
    )


def backward_bias(
    problem: AttentionProblem,
    operands: AttentionOperands,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    """Gradient of the bias, of its shape and dtype; the arguments are `backward`'s."""
    bias = operands.bias
    if bias is None:
        raise ValueError("jax_gluon.xla.backward_bias: operands.bias is None; allowed: an array.")
    if 0 in (*operands.query.shape, *operands.key.shape):
        return jnp.zeros_like(bias)
    tiles = _Tiles(problem, operands)
    cotangent = _Cotangent(out, log_sum_exp, d_out, d_log_sum_exp)
    summed = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    # Each element of a bias that is broadcast along neither T nor S belongs to one tile: it is
    # rounded once, and needs no wider copy of the largest array here.
    is_written_once = 2 not in summed and 3 not in summed
    dtype = bias.dtype if is_written_once else np.promote_types(bias.dtype, tiles.dtype)

    def query_block(i: jax.Array, d_bias: jax.Array):
        rows = _backward_rows(tiles, cotangent, i)

        def key_chunk(c: jax.Array, d_bias: jax.Array):
            _, d_scores, _ = _backward_tile(tiles, rows, i, c, _QUERIES_FIRST)
            B, K, G, t, s = d_scores.shape
            tile = jnp.sum(d_scores.reshape(B, K * G, t, s), axis=summed, keepdims=True)
            starts = {2: tiles.queries.start(i), 3: tiles.chunks.start(c)}
            kept = {axis: start for axis, start in starts.items() if axis not in summed}
            return _add_slice(d_bias, tile.astype(dtype), kept)

        return _loop(*tiles.chunk_range(i), key_chunk, d_bias)

    zeros = _to_bits(jnp.zeros(bias.shape, dtype))
    return _from_bits(_loop(0, tiles.queries.count, query_block, zeros), dtype).astype(bias.dtype)


@dataclass(frozen=True)
class _Blocks:
    """An axis in blocks of one size, without padding.

    Where the size does not divide the length, the last block begins early, to end with the axis.
    Positions that the block before it holds too are not `is_new` there, and are hidden.
    """

    length: int
    size: int

    @staticmethod
    def of(length: int, most: int) -> _Blocks:
        """Blocks of about equal size, at most `most` rounded up to the alignment."""
        even = math.ceil(length / math.ceil(length / most))
        return _Blocks(length, min(length, math.ceil(even / _ALIGNMENT) * _ALIGNMENT))

    @property
    def count(self) -> int:
        return math.ceil(self.length / self.size)

    def start(self, index: jax.Array) -> jax.Array:
        return jnp.minimum(index * self.size, self.length - self.size)

    def positions(self, index: jax.Array) -> jax.Array:
        return self.start(index) + jnp.arange(self.size, dtype=jnp.int32)

    def is_new(self, index: jax.Array) -> jax.Array | None:
        if self.length % self.size == 0:
            return None
        return self.positions(index) >= index * self.size


# Axes of a tile. Backward sums over the queries of each key: there a matrix with a row per key is
# the operand that needs no transpose.
_QUERIES_FIRST = "bkgts"
_KEYS_FIRST = "bksgt"


def _arrange(x: jax.Array, order: str) -> jax.Array:
    return x if order == _QUERIES_FIRST else _keys_first(x)


def _keys_first(x: jax.Array) -> jax.Array:
    return jnp.transpose(x, (0, 1, 4, 2, 3))


class _Scores(NamedTuple):
    """Logits of one tile, the least one where hidden; `visible` None: all are.

    `slope` is d logit / d (uncapped logit), where there is a soft cap.
    """

    logits: jax.Array
    visible: jax.Array | None
    slope: jax.Array | None


class _Tiles:
    """The operands, cut into tiles. Query heads are grouped by the kv head they read: N = K * G."""

    def __init__(self, problem: AttentionProblem, operands: AttentionOperands):
        B, T, N, _ = operands.query.shape
        _, S, K, _ = operands.key.shape
        self.problem = problem
        self.groups = (K, N // K)
        self.dtype = np.promote_types(operands.query.dtype, np.float32)
        self.query = operands.query
        self.key = _swap_tokens_and_heads(operands.key)
        self.value = _swap_tokens_and_heads(operands.value)
        self.bias = operands.bias
        self.mask = operands.mask
        self.query_seq_lengths = operands.query_seq_lengths
        self.key_value_seq_lengths = operands.key_value_seq_lengths
        if 0 in (B, T, S):
            return
        self.chunks = _Blocks.of(S, _KEY_CHUNK)
        most_rows = _TILE_SCORES // (B * N * self.chunks.size)
        self.queries = _Blocks.of(T, min(_QUERY_BLOCK, max(_LEAST_QUERY_BLOCK, most_rows)))

    def rows(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """Block i of `[B, T, N, X]` as `[B, K, G, t, X]`."""
        block = _slice(x, self.queries.start(i), self.queries.size, 1)
        B, t, _, X = block.shape
        block = block.reshape(B, t, *self.groups, X)
        return jnp.transpose(block, (0, 2, 3, 1, 4)).astype(self.dtype)

    def write_rows(self, x: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
        """`x`, the bits of `[B, T, N, X]`, with the rows of block i that are new replaced."""
        B, _, N, X = x.shape
        start = self.queries.start(i)
        rows = _to_bits(jnp.transpose(block, (0, 3, 1, 2, 4)).reshape(B, -1, N, X))
        is_new = self.queries.is_new(i)
        if is_new is not None:
            kept = jax.lax.dynamic_slice_in_dim(x, start, self.queries.size, 1)
            rows = jnp.where(is_new[None, :, None, None], rows, kept)
        return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 1)

    def keys(self, c: jax.Array) -> jax.Array:
        """Chunk c of the keys, `[B, K, s, H]`."""
        return self._tokens(self.key, c)

    def values(self, c: jax.Array) -> jax.Array:
        """Chunk c of the values, `[B, K, s, V]`."""
        return self._tokens(self.value, c)

    def _tokens(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return _slice(x, self.chunks.start(c), self.chunks.size, 2).astype(self.dtype)

    def chunk_range(self, i: jax.Array) -> tuple[int | jax.Array, int | jax.Array]:
        """The chunks of keys, begin and end, that any row of query block i may see."""
        begin: int | jax.Array = 0
        end: int | jax.Array = self.chunks.length
        first_row = i * self.queries.size
        end_row = jnp.minimum(first_row + self.queries.size, self.queries.length)
        if self.problem.is_causal:
            end = jnp.minimum(end, end_row)
        if self.problem.local_window is not None:
            left, right = self._window(self.problem.local_window)
            begin = jnp.maximum(first_row - left, 0) // self.chunks.size
            end = jnp.minimum(end, end_row + right)
        if self.key_value_seq_lengths is not None:
            end = jnp.minimum(end, _largest(self.key_value_seq_lengths))
        if self.query_seq_lengths is not None:
            end = jnp.where(first_row < _largest(self.query_seq_lengths), end, 0)
        return begin, (end + self.chunks.size - 1) // self.chunks.size

    def _window(self, window: tuple[int, int]) -> tuple[int, int]:
        # Clipped where more hides nothing, for the sums to fit into 32 bits.
        return min(window[0], self.queries.length), min(window[1], self.chunks.length)

    def scores(self, query: jax.Array, i: jax.Array, c: jax.Array, order: str) -> _Scores:
        """The tile of query block i, `[B, K, G, t, H]`, and chunk c of the keys."""
        products = jnp.einsum(f"bkgth,bksh->{order}", query, self.keys(c))
        logits = self.problem.scale * products
        bias = self._tile(self.bias, i, c)
        if bias is not None:
            logits += _arrange(bias, order).astype(self.dtype)
        slope = None
        if (cap := self.problem.soft_cap) is not None:
            tanh = jnp.tanh(logits / cap)
            logits, slope = cap * tanh, 1.0 - tanh * tanh
        logits = jnp.maximum(logits, _LEAST_LOGIT)
        visible = self._visible(i, c, bias)
        if visible is not None:
            visible = _arrange(visible, order)
            logits = jnp.where(visible, logits, _LEAST_LOGIT)
        return _Scores(logits, visible, slope)

    def _tile(self, x: jax.Array | None, i: jax.Array, c: jax.Array) -> jax.Array | None:
        """The tile of `[b, n, t, s]`, `[b, k, g, t, s]`, of extent 1 where `x` is."""
        if x is None:
            return None
        # Heads are grouped after the cut: XLA would copy all of `x` to group them before.
        for axis, blocks, index in ((2, self.queries, i), (3, self.chunks, c)):
            if x.shape[axis] > 1:
                x = _slice(x, blocks.start(index), blocks.size, axis)
        b, n, t, s = x.shape
        return x.reshape(b, *((1, 1) if n == 1 else self.groups), t, s)

    def _visible(self, i: jax.Array, c: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        row = self.queries.positions(i).reshape(1, 1, 1, -1, 1)
        key = self.chunks.positions(c).reshape(1, 1, 1, 1, -1)
        conditions: list[jax.Array] = []
        if (is_new := self.queries.is_new(i)) is not None:
            conditions.append(is_new.reshape(row.shape))
        if (is_new := self.chunks.is_new(c)) is not None:
            conditions.append(is_new.reshape(key.shape))
        if self.problem.is_causal:
            conditions.append(key <= row)
        if self.problem.local_window is not None:
            left, right = self._window(self.problem.local_window)
            conditions.append((row - left <= key) & (key <= row + right))
        if self.query_seq_lengths is not None:
            conditions.append(row < self.query_seq_lengths.reshape(-1, 1, 1, 1, 1))
        if self.key_value_seq_lengths is not None:
            conditions.append(key < self.key_value_seq_lengths.reshape(-1, 1, 1, 1, 1))
        if (mask := self._tile(self.mask, i, c)) is not None:
            conditions.append(mask)
        if bias is not None and self.problem.soft_cap is None:
            conditions.append(bias != -jnp.inf)
        visible = None
        for condition in conditions:
            visible = condition if visible is None else visible & condition
        return visible


class _Cotangent(NamedTuple):
    """What backward reads beside the operands; see `backward`."""

    out: jax.Array
    log_sum_exp: jax.Array
    d_out: jax.Array
    d_log_sum_exp: jax.Array | None


class _BackwardRows(NamedTuple):
    """One query block, `[B, K, G, t, X]`; X is 1 for the natural log-sum-exp and for `delta`."""

    query: jax.Array
    d_out: jax.Array
    log_sum_exp: jax.Array
    delta: jax.Array


def _backward_rows(tiles: _Tiles, cotangent: _Cotangent, i: jax.Array) -> _BackwardRows:
    d_out = tiles.rows(cotangent.d_out, i)
    delta = jnp.sum(d_out * tiles.rows(cotangent.out, i), axis=-1, keepdims=True)
    if cotangent.d_log_sum_exp is not None:
        delta -= tiles.rows(cotangent.d_log_sum_exp[..., None], i)
    log_sum_exp = tiles.rows(cotangent.log_sum_exp[..., None], i)
    # Nothing is visible to an empty row; 0 keeps its unused exponentials finite.
    is_empty = log_sum_exp == EMPTY_ROW_LOG_SUM_EXP
    natural = jnp.where(is_empty, 0.0, log_sum_exp / _LOG2_E)
    return _BackwardRows(tiles.rows(tiles.query, i), d_out, natural, delta)


def _backward_tile(
    tiles: _Tiles, rows: _BackwardRows, i: jax.Array, c: jax.Array, order: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """P, the gradient of the biased scores, and which of them are visible (None: all)."""
    logits, visible, slope = tiles.scores(rows.query, i, c, order)
    p = _hide(jnp.exp(logits - _arrange(rows.log_sum_exp, order)), visible)
    d_p = jnp.einsum(f"bkgtv,bksv->{order}", rows.d_out, tiles.values(c))
    d_scores = p * (d_p - _arrange(rows.delta, order))
    if slope is not None:
        d_scores *= slope
    return p, _hide(d_scores, visible), visible


def _hide(x: jax.Array, visible: jax.Array | None) -> jax.Array:
    return x if visible is None else jnp.where(visible, x, 0.0)


def _sum_visible(
    subscripts: str,
    weights: jax.Array,
    rows: jax.Array,
    visible: jax.Array | None,
    rows_are_finite: jax.Array,
) -> jax.Array:
    """`einsum(subscripts, weights, rows)` over visible weights; hidden weights are 0."""

    def multiply(weights: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, weights.astype(rows.dtype), rows)

    if visible is None:
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


# XLA's CPU backend widens bfloat16, and moves that from a slice of an array to all of it: once
# before a loop, or for updates in every step. Such arrays are cut as integers, which it leaves
# alone, and the barrier keeps it from making a copy of the integers before the loop.


def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _slice(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    if x.dtype == jnp.bfloat16:
        x, start = cast(Any, jax.lax.optimization_barrier)((x, start))
    bits = jax.lax.dynamic_slice_in_dim(_to_bits(x), start, size, axis)
    return _from_bits(bits, x.dtype)


def _add_slice(x: jax.Array, part: jax.Array, starts: dict[int, jax.Array]) -> jax.Array:
    """`x`, the bits of an array, with `part` added from `starts[axis]` on (0 where it has none)."""
    zero = jnp.zeros((), jnp.int32)
    start = [starts.get(axis, zero) for axis in range(x.ndim)]
    old = _from_bits(jax.lax.dynamic_slice(x, start, part.shape), part.dtype)
    return jax.lax.dynamic_update_slice(x, _to_bits(old + part), start)


def _swap_tokens_and_heads(x: jax.Array) -> jax.Array:
    """From `[B, S, K, H]` to `[B, K, S, H]`, where a head's tokens are one matrix; and back."""
    return jnp.swapaxes(x, 1, 2)


def _loop(
    begin: int | jax.Array, end: int | jax.Array, body: Callable[..., Any], state: _State
) -> _State:
    """`fori_loop` with int32 indices, also under x64; bounds that are ints stay static."""
    bounds = [np.int32(x) if isinstance(x, int) else x for x in (begin, end)]

    def with_int32(index: jax.Array, state: _State) -> _State:
        return body(index.astype(jnp.int32), state)

    return cast(Any, jax.lax.fori_loop)(*bounds, with_int32, state)


def _whole_batch(reduce: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """A reduction to a scalar that also reduces the axes that vmap adds.

    Its result steers a loop or a branch, which stays one for the whole batch.
    """
    reduction: Any = jax.custom_batching.custom_vmap(reduce)

    def rule(axis_size: int, in_batched: list[bool], x: jax.Array):
        del axis_size, in_batched
        return reduction(x), False

    reduction.def_vmap(rule)
    return cast(Callable[[jax.Array], jax.Array], reduction)


@_whole_batch
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


@_whole_batch
def _largest(lengths: jax.Array) -> jax.Array:
    return jnp.max(lengths)
