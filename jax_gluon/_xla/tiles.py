"""The problem of `jax_gluon.xla`, cut into tiles: blocks of queries by chunks of keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_gluon import _dropout as dropout
from jax_gluon._block_mask import BlockMask
from jax_gluon._dimensions import ceil_div, is_static, max_extent, min_extent, number
from jax_gluon._problem import MIN_LOGIT, AttentionProblem, FloatOperands
from jax_gluon._quantization.codes import from_bits, to_bits
from jax_gluon._visible_tokens import lowered, mask_as_segments

# A tile of 256 x 256 float32 scores is 256 KiB a head, which a core's L2 cache holds beside its
# operands. Smaller ones pay more for each step of XLA's loops; larger ones fall out of the cache
# and visit more keys that causal masking hides.
_QUERY_BLOCK = 256
_KEY_CHUNK = 256
# Many heads share a tile, so that wide devices have enough to do; its rows are cut where their
# scores would take more than 64 MiB of float32, but not below what keeps a matrix product busy.
_TILE_SCORES = 2**24
_MIN_QUERY_BLOCK = 32
# Blocks are multiples of the longest SIMD register, in float32.
_ALIGNMENT = 16
# Offsets and windows as far as this reach past any sequence, and their sums fit into 32 bits.
_FAR = 2**29


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles, and what is multiplied.

    `rows` and `keys` are those of a tile, at most; `scores` its elements, `kept` the elements of P
    that backward keeps of a block of at most `kept_rows` rows. `is_plain`: 16-bit operands are
    multiplied as they are, and all are finite.
    """

    rows: int
    keys: int
    scores: int
    kept: int
    kept_rows: int
    is_plain: bool = False


@dataclass(frozen=True)
class Blocks:
    """An axis in blocks of one size, without padding.

    Where the size does not divide the length, the last block begins early, to end with the axis.
    Positions that the block before it holds too are not `is_new` there, and are hidden.
    """

    length: int
    size: int

    @staticmethod
    def of(length: int, most: int) -> Blocks:
        """Blocks of about equal size, at most `most` rounded up to the alignment."""
        if not is_static(length, most):
            return Blocks(length, min_extent(length, most))
        even = math.ceil(length / math.ceil(length / most))
        return Blocks(length, min(length, math.ceil(even / _ALIGNMENT) * _ALIGNMENT))

    @property
    def count(self) -> int:
        """How many blocks the axis has."""
        return ceil_div(self.length, self.size)

    def start(self, index: jax.Array) -> jax.Array:
        """The first position of a block."""
        return jnp.minimum(index * number(self.size), number(self.length - self.size))

    def positions(self, index: jax.Array) -> jax.Array:
        """The positions in a block, int32 `[size]`."""
        return self.start(index) + jnp.arange(self.size, dtype=jnp.int32)

    def is_new(self, index: jax.Array) -> jax.Array | None:
        """Which positions no earlier block has, bool `[size]`; None: all."""
        if self.length % self.size == 0:
            return None
        return self.positions(index) >= index * number(self.size)


# Axes of a tile. Backward sums over the queries of each key: there a matrix with a row per key is
# the operand that needs no transpose.
QUERIES_FIRST = "bkgts"
KEYS_FIRST = "bksgt"


def arrange(x: jax.Array, order: str) -> jax.Array:
    """What is in `QUERIES_FIRST` order, in `order`."""
    return x if order == QUERIES_FIRST else keys_first(x)


def keys_first(x: jax.Array) -> jax.Array:
    """From `QUERIES_FIRST` order to `KEYS_FIRST`; any extents."""
    return jnp.transpose(x, (0, 1, 4, 2, 3))


class Scores(NamedTuple):
    """Logits of one tile, the least one where hidden; `visible` None: all are.

    A logit of -inf hides its key, which a soft cap prevents.
    `slope` is d logit / d (uncapped logit), where there is a soft cap.
    """

    logits: jax.Array
    visible: jax.Array | None
    slope: jax.Array | None


class Tiles:
    """The operands, cut into tiles. Query heads are grouped by the kv head they read: N = K * G.

    `most_rows` bounds the rows of a block of queries. `tiling`: None is that of a CPU.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        operands: FloatOperands,
        most_rows: int | None = None,
        tiling: Tiling | None = None,
    ):
        tiling = tiling or Tiling(_QUERY_BLOCK, _KEY_CHUNK, _TILE_SCORES, 0, 0)
        B, T, N, _ = operands.query.shape
        _, S, K, _ = operands.key.shape
        self.problem = problem
        self.groups = (K, N // K)
        self.dtype = np.promote_types(operands.query.dtype, np.float32)
        self.multiplied = operands.query.dtype if tiling.is_plain else self.dtype
        self.query = operands.query
        self.key = swap_tokens_and_heads(operands.key)
        self.value = swap_tokens_and_heads(operands.value)
        self.bias = operands.bias
        self.mask = operands.mask
        self.query_seq_lengths = operands.query_seq_lengths
        self.key_value_seq_lengths = operands.key_value_seq_lengths
        self.query_offset = operands.query_offset
        self.segment_ids = mask_as_segments(operands).segment_ids
        self.positions = operands.positions
        self.dropout_seeds = operands.dropout_seeds
        self.sinks = None
        if operands.sinks is not None:
            self.sinks = operands.sinks.astype(self.dtype).reshape(1, *self.groups, 1, 1)
        if 0 in (B, T, S):
            return
        keys = tiling.keys
        if tiling.is_plain and not problem.is_causal and is_static(B, T):
            keys = max(keys, tiling.scores // (B * N * min(T, tiling.rows)))
        self.chunks = Blocks.of(S, keys)
        fit = max_extent(_MIN_QUERY_BLOCK, tiling.scores // (B * N * self.chunks.size))
        self.queries = Blocks.of(T, min_extent(fit, min(tiling.rows, most_rows or tiling.rows)))
        self._chunks_of_blocks = self._find_chunks_of_blocks()

    def _find_chunks_of_blocks(self) -> tuple[jax.Array, jax.Array] | None:
        """The first chunk that each query block sees and past the last: None where all may be.

        By segments, positions and blocks of a mask; by the least and largest number of a block
        and a chunk, which may show more than there is.
        """

        def ranges(x: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
            index = jnp.arange(blocks.count, dtype=jnp.int32)
            cut = x[:, jax.vmap(blocks.positions)(index)]
            return jnp.min(cut, axis=-1), jnp.max(cut, axis=-1)

        def both(of_query: jax.Array, of_key: jax.Array) -> list[jax.Array]:
            least, largest = ranges(of_query, self.queries)
            first, last = ranges(of_key, self.chunks)
            return [least[:, :, None], largest[:, :, None], first[:, None, :], last[:, None, :]]

        conditions: list[jax.Array] = []
        if self.segment_ids is not None:
            least, largest, first, last = both(*self.segment_ids)
            conditions.append((first <= largest) & (least <= last))
        if self.positions is not None:
            least, largest, first, last = both(*self.positions)
            if self.problem.is_causal:
                conditions.append(first <= largest)
            if self.problem.local_window is not None:
                left, right = self.problem.local_window
                conditions.append(
                    (lowered(least, left) <= last) & (lowered(first, right) <= largest)
                )
        if isinstance(self.mask, BlockMask):
            seen = jnp.any(self.mask.index > 0, axis=(0, 1))
            for axis, blocks in enumerate((self.queries, self.chunks)):
                index = jnp.arange(blocks.count, dtype=jnp.int32)
                block = jax.vmap(blocks.positions)(index) // self.mask.block_size
                seen = jnp.any(jnp.take(seen, block, axis), axis=axis + 1)
            conditions.append(seen[None])
        if not conditions:
            return None
        seen = jnp.any(functools.reduce(jnp.logical_and, conditions), axis=0)
        chunk = jnp.arange(self.chunks.count, dtype=jnp.int32)
        return (
            jnp.min(jnp.where(seen, chunk, number(self.chunks.count)), axis=1),
            jnp.max(jnp.where(seen, chunk + 1, 0), axis=1),
        )

    def rows(self, x: jax.Array, i: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Block i of `[B, T, N, X]` as `[B, K, G, t, X]`, of `dtype` or that of sums."""
        block = _slice(x, self.queries.start(i), self.queries.size, 1)
        B, t, _, X = block.shape
        block = block.reshape(B, t, *self.groups, X)
        return jnp.transpose(block, (0, 2, 3, 1, 4)).astype(dtype or self.dtype)

    def write_rows(self, x: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
        """`x`, the bits of `[B, T, N, X]`, with the rows of block i that are new replaced."""
        B, _, N, X = x.shape
        start = self.queries.start(i)
        rows = to_bits(jnp.transpose(block, (0, 3, 1, 2, 4)).reshape(B, -1, N, X))
        is_new = self.queries.is_new(i)
        if is_new is not None:
            kept = jax.lax.dynamic_slice_in_dim(x, start, self.queries.size, 1)
            rows = jnp.where(is_new[None, :, None, None], rows, kept)
        return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 1)

    def keys(self, c: jax.Array) -> jax.Array:
        """Chunk c of the keys, `[B, K, s, H]`."""
        return self.tokens(self.key, c)

    def values(self, c: jax.Array) -> jax.Array:
        """Chunk c of the values, `[B, K, s, V]`."""
        return self.tokens(self.value, c)

    def tokens(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Chunk c of `[B, K, S, X]`."""
        return _slice(x, self.chunks.start(c), self.chunks.size, 2).astype(self.multiplied)

    def chunk_range(self, i: jax.Array) -> tuple[int | jax.Array, int | jax.Array]:
        """The chunks of keys, begin and end, that any row of query block i may see."""
        begin: int | jax.Array = 0
        rows, keys = number(self.queries.size), number(self.chunks.size)
        end: int | jax.Array = number(self.chunks.length)
        first_row = i * rows
        end_row = jnp.minimum(first_row + rows, number(self.queries.length))
        first_position, end_position = first_row, end_row
        if (offset := self._offset()) is not None:
            first_position -= _largest(-offset)
            end_position += _largest(offset)
        stands_at_index = self.positions is None
        if self.problem.is_causal and stands_at_index:
            end = jnp.minimum(end, end_position)
        if self.problem.local_window is not None and stands_at_index:
            left, right = self._window(self.problem.local_window)
            begin = jnp.maximum(first_position - left, 0) // keys
            end = jnp.minimum(end, end_position + right)
        if self.key_value_seq_lengths is not None:
            end = jnp.minimum(end, _largest(self.key_value_seq_lengths))
        if self.query_seq_lengths is not None:
            end = jnp.where(first_row < _largest(self.query_seq_lengths), end, 0)
        end = (jnp.maximum(end, 0) + keys - 1) // keys
        if self._chunks_of_blocks is not None:
            first, last = (x[i] for x in self._chunks_of_blocks)
            begin = jnp.maximum(begin, -_largest(-first))
            end = jnp.minimum(end, _largest(last))
        return begin, end

    # Clipped where more changes nothing, for sums to fit into 32 bits.

    def _window(self, window: tuple[int, int]) -> tuple[int, int]:
        if self.positions is not None:
            return window
        most = self.queries.length + self.chunks.length
        if self.query_offset is not None or not is_static(most):
            most = _FAR
        return min(window[0], most), min(window[1], most)

    def _offset(self) -> jax.Array | None:
        return None if self.query_offset is None else jnp.clip(self.query_offset, -_FAR, _FAR)

    def products(self, subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`einsum`, of sums as wide as they are meant to be."""
        return jnp.einsum(subscripts, x, y, preferred_element_type=self.dtype)

    def scores(self, query: jax.Array, i: jax.Array, c: jax.Array, order: str) -> Scores:
        """The tile of query block i, `[B, K, G, t, H]`, and chunk c of the keys."""
        products = self.products(f"bkgth,bksh->{order}", query, self.keys(c))
        logits = self.problem.scale * products
        bias = self.tile(self.bias, i, c)
        if bias is not None:
            bias = bias.astype(self.dtype)
            logits += arrange(bias, order)
        visible = self._visible(i, c, bias)
        if visible is not None:
            visible = arrange(visible, order)
        slope = None
        if (cap := self.problem.soft_cap) is not None:
            tanh = jnp.tanh(logits / cap)
            logits, slope = cap * tanh, 1.0 - tanh * tanh
        else:
            is_finite = ~(logits < MIN_LOGIT)  # NaN is visible
            visible = is_finite if visible is None else visible & is_finite
        if visible is not None:
            logits = jnp.where(visible, logits, MIN_LOGIT)
        return Scores(logits, visible, slope)

    def tile(self, x: jax.Array | None, i: jax.Array, c: jax.Array) -> jax.Array | None:
        """The tile of `[b, n, t, s]`, `[b, k, g, t, s]`, of extent 1 where `x` is."""
        if x is None:
            return None
        # Heads are grouped after the cut: XLA would copy all of `x` to group them before.
        for axis, blocks, index in ((2, self.queries, i), (3, self.chunks, c)):
            if x.shape[axis] != 1:
                x = _slice(x, blocks.start(index), blocks.size, axis)
        b, n, t, s = x.shape
        return x.reshape(b, *((1, 1) if n == 1 else self.groups), t, s)

    def kept(self, i: jax.Array, c: jax.Array) -> jax.Array | None:
        """Which probabilities of a tile dropout keeps, `[B, K, G, t, s]`; None: all."""
        if self.dropout_seeds is None:
            return None
        first_key, keys = self.chunks.start(c), self.chunks.size
        rows, heads = self.queries.positions(i), self.groups[0] * self.groups[1]
        x = dropout.kept(
            self.dropout_seeds, heads, rows, first_key, keys, self.problem.dropout_rate
        )
        return x.reshape(x.shape[0], *self.groups, *x.shape[2:])

    def _of_tile(
        self, x: tuple[jax.Array, jax.Array], i: jax.Array, c: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Numbers of the tile's rows `[B, 1, 1, t, 1]` and keys `[B, 1, 1, 1, s]`."""
        of_rows = _slice(x[0], self.queries.start(i), self.queries.size, 1)
        of_keys = _slice(x[1], self.chunks.start(c), self.chunks.size, 1)
        return of_rows[:, None, None, :, None], of_keys[:, None, None, None, :]

    def _visible(self, i: jax.Array, c: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        row = self.queries.positions(i).reshape(1, 1, 1, -1, 1)
        key = self.chunks.positions(c).reshape(1, 1, 1, 1, -1)
        conditions: list[jax.Array] = []
        if (is_new := self.queries.is_new(i)) is not None:
            conditions.append(is_new.reshape(row.shape))
        if (is_new := self.chunks.is_new(c)) is not None:
            conditions.append(is_new.reshape(key.shape))
        position = row
        if (offset := self._offset()) is not None:
            position += offset.reshape(-1, 1, 1, 1, 1)
        if self.segment_ids is not None:
            of_row, of_key = self._of_tile(self.segment_ids, i, c)
            conditions.append(of_row == of_key)
        if self.positions is not None:
            position, key_position = self._of_tile(self.positions, i, c)
        else:
            key_position = key
        if self.problem.is_causal:
            conditions.append(key_position <= position)
        if self.problem.local_window is not None:
            left, right = self._window(self.problem.local_window)
            conditions.append(lowered(position, left) <= key_position)
            conditions.append(lowered(key_position, right) <= position)
        if self.query_seq_lengths is not None:
            conditions.append(row < self.query_seq_lengths.reshape(-1, 1, 1, 1, 1))
        if self.key_value_seq_lengths is not None:
            conditions.append(key < self.key_value_seq_lengths.reshape(-1, 1, 1, 1, 1))
        if isinstance(self.mask, BlockMask):
            part = self.mask.part(row.ravel(), key.ravel())
            b, n, t, s = part.shape
            conditions.append(part.reshape(b, *((1, 1) if n == 1 else self.groups), t, s))
        elif (mask := self.tile(self.mask, i, c)) is not None:
            conditions.append(mask)
        if bias is not None and self.problem.soft_cap is None:
            conditions.append(~(bias < MIN_LOGIT))  # NaN is visible
        visible = None
        for condition in conditions:
            visible = condition if visible is None else visible & condition
        return visible


# The barrier keeps XLA from making a copy of the integers before a loop.
def _slice(x: jax.Array, start: jax.Array, size: int, axis: int) -> jax.Array:
    if x.dtype == jnp.bfloat16:
        x, start = cast(Any, jax.lax.optimization_barrier)((x, start))
    bits = jax.lax.dynamic_slice_in_dim(to_bits(x), start, size, axis)
    return from_bits(bits, x.dtype)


def add_slice(x: jax.Array, part: jax.Array, starts: dict[int, jax.Array]) -> jax.Array:
    """`x`, the bits of an array, with `part` added from `starts[axis]` on (0 where it has none)."""
    zero = jnp.zeros((), jnp.int32)
    start = [starts.get(axis, zero) for axis in range(x.ndim)]
    old = from_bits(jax.lax.dynamic_slice(x, start, part.shape), part.dtype)
    return jax.lax.dynamic_update_slice(x, to_bits(old + part), start)


def swap_tokens_and_heads(x: jax.Array) -> jax.Array:
    """From `[B, S, K, H]` to `[B, K, S, H]`, where a head's tokens are one matrix; and back."""
    return jnp.swapaxes(x, 1, 2)


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
def all_finite(x: jax.Array) -> jax.Array:
    """Whether no element is NaN or infinite."""
    return jnp.all(jnp.isfinite(x))


@_whole_batch
def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(x)
