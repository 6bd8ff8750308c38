"""Masks as blocks: which are empty, which are full, and the bits of the others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jax_gluon._errors import Checker
from jax_gluon._typing import Array, Bool, Int32, UInt8

_Index = Int32[Array, "..."]
#: `(batch, head, query index, key index)`, int32 arrays that broadcast, to whether the key is seen.
MaskMod = Callable[[_Index, _Index, _Index, _Index], Any]

_Result = TypeVar("_Result")

# Numbers of the index; those from the last on are of tiles.
_EMPTY, _FULL, FIRST_TILE = 0, 1, 2
# Of a block: whole bands and tiles of what the kernels skip by.
_BLOCK_STEP = 16
# Elements of the predicate that are evaluated at once, where one strip is not more.
_ELEMENTS = 2**20


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("index", "tiles"),
    meta_fields=("query_length", "key_value_length"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Which keys each row sees, in blocks of rows and keys; made by `jax_gluon.block_mask`.

    A pytree, for `jit`, `vmap`, `scan` and to be kept from step to step; the `mask` of every
    function of attention.

    - `index`: int32 `[b, n, T / block, S / block]`, rounded up; b and n are 1 where all entries or
      heads share the mask. 0: no row of the block sees any of its keys; 1: each sees all; else 2 +
      the number of a tile.
    - `tiles`: uint8 `[1, P, block, block / 8]`, a bit for each row and key, the first key in the
      lowest bit of a byte; 1 is visible.
    - `query_length`, `key_value_length`: T and S.
    """

    index: Int32[Array, "b n row_blocks key_blocks"]
    tiles: UInt8[Array, "1 P block block//8"]
    query_length: int
    key_value_length: int

    @property
    def block_size(self) -> int:
        """Rows and keys of a block."""
        return self.tiles.shape[-2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the mask that it stands for, `[b, n, T, S]`."""
        b, n = self.index.shape[-4:-2]
        return b, n, self.query_length, self.key_value_length

    def to_dense(self) -> Bool[Array, "b n T S"]:
        """The mask, bool `[b, n, T, S]`."""
        rows, keys = (jnp.arange(x, dtype=jnp.int32) for x in self.shape[2:])
        return self.part(rows, keys)

    def part(self, rows: Int32[Array, " t"], keys: Int32[Array, " s"]) -> Bool[Array, "b n t s"]:
        """What those rows see of those keys, int32 `[t]` and `[s]`: bool `[b, n, t, s]`."""
        size = self.block_size
        number = self.index[:, :, (rows // size)[:, None], (keys // size)[None, :]]
        tile = jnp.maximum(number - FIRST_TILE, 0)
        byte = self.tiles[0, tile, (rows % size)[:, None], (keys % size // 8)[None, :]]
        bit = (byte >> (keys % 8).astype(jnp.uint8)) & 1
        return jnp.where(number < FIRST_TILE, number == _FULL, bit == 1)


def block_mask(
    mask_mod: MaskMod,
    query_length: int,
    key_value_length: int,
    *,
    batch: int | None = None,
    heads: int | None = None,
    block_size: int = 128,
) -> BlockMask:
    """The mask that a predicate describes, in blocks; the `mask` of every function of attention.

    Attention skips empty blocks, and tests no element of full ones. Make it once, and use it for
    all layers and steps.

    **Arguments:**

    - `mask_mod`: a function of batch index, query head, query index and key index, int32 arrays
      that broadcast against each other, of jax.numpy's operations alone: whether the key is seen, a
      bool array that broadcasts to their shape. It is traced, may read arrays at these indices, and
      is not told which elements are asked for when.
    - `query_length`, `key_value_length`: T and S.
    - `batch`, `heads`: B and N, the heads of the query; None where the predicate is the same for
      all of them, whose index it then gets as 0.
    - `block_size`: rows and keys of a block, a multiple of 16. A smaller one follows the predicate
      more closely; the index has `(T / block_size) * (S / block_size)` numbers.

    The predicate is evaluated twice, block by block: the memory is that of a strip of `block_size`
    rows, and of the bits of blocks that are neither empty nor full. How many these are is not known
    inside `jax.jit` and other transformations, where there is room for all blocks: an eighth of a
    bool array's bytes. Make the mask outside, and pass it in, to have no more than it needs.

    **Returns:** a `BlockMask`.

    **Raises:** `TypeError` where the predicate returns no booleans; `ValueError` where their shape
    does not broadcast to that of the indices, and for sizes that can't be.

    >>> import jax, jax_gluon
    >>> mask = jax_gluon.block_mask(lambda b, h, i, j: (j <= i) & (i - j < 300), 1024, 1024)
    >>> mask.index.shape, mask.tiles.shape
    ((1, 1, 8, 8), (1, 19, 128, 16))
    >>> x = jax.random.normal(jax.random.key(0), (2, 1024, 8, 64))
    >>> jax_gluon.dot_product_attention(x, x, x, mask=mask).shape
    (2, 1024, 8, 64)
    """
    check = Checker("block_mask")
    if not callable(mask_mod):
        allowed = "a function of batch, head, query index and key index"
        check.type_error("mask_mod", f"a {type(mask_mod).__name__}", allowed)
    lengths = (query_length, key_value_length)
    for name, x in zip(("query_length", "key_value_length"), lengths, strict=True):
        check.integer(name, x, 1, "an int of at least 1")
    for name, x in (("batch", batch), ("heads", heads)):
        if x is not None:
            check.integer(name, x, 1, "None, or an int of at least 1")
    allowed = f"a multiple of {_BLOCK_STEP}"
    check.integer("block_size", block_size, _BLOCK_STEP, allowed)
    if block_size % _BLOCK_STEP:
        check.value_error("block_size", f"{block_size}", allowed)
    blocks = _Blocks(check, mask_mod, (batch or 1, heads or 1), lengths, block_size)
    # Functions made here: a predicate may read what has changed since it was last compiled.
    index, count = _jitted(lambda: blocks.index())
    most = math.prod(index.shape) if isinstance(count, Tracer) else max(int(count), 1)
    tiles = _jitted(lambda: blocks.tiles(index, most))
    return BlockMask(index, tiles, query_length, key_value_length)


def fitting(check: Checker, mask: BlockMask, whole: tuple[int, ...]) -> jax.Array | BlockMask:
    """The mask of a call of extents `[B, N, T, S]`, where it can be one."""
    if mask.shape[2:] != whole[2:] or any(
        extent not in (1, full) for extent, full in zip(mask.shape[:2], whole, strict=False)
    ):
        allowed = f"one of [B, N, T, S] = {list(whole)}, where B and N may be 1"
        check.value_error("mask", f"a BlockMask of {list(mask.shape)}", allowed)
    # Of one row it says which keys can be seen at all, as an array does.
    return mask.to_dense() if whole[2] == 1 else mask


def _jitted(function: Callable[[], _Result]) -> _Result:
    return cast(_Result, cast(Any, jax.jit)(function)())


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    """A predicate, and the blocks that it is evaluated in."""

    check: Checker
    mask_mod: MaskMod
    leading: tuple[int, int]
    lengths: tuple[int, int]
    size: int

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Entries, heads, and blocks of rows and of keys."""
        rows, keys = (math.ceil(x / self.size) for x in self.lengths)
        return (*self.leading, rows, keys)

    def index(self) -> tuple[jax.Array, jax.Array]:
        """The index, and how many tiles it has."""
        kinds = self._in_chunks(self._kinds, math.prod(self.counts[:3]), self._padded(1))
        is_tile = kinds.reshape(-1) == FIRST_TILE
        number = FIRST_TILE - 1 + jnp.cumsum(is_tile, dtype=jnp.int32)
        index = jnp.where(is_tile, number, kinds.reshape(-1)).reshape(self.counts)
        return index, jnp.sum(is_tile, dtype=jnp.int32)

    def tiles(self, index: jax.Array, count: int) -> jax.Array:
        """The bits of the first `count` tiles."""
        (at,) = jnp.nonzero(index.reshape(-1) >= FIRST_TILE, size=count, fill_value=0)
        at = at.astype(jnp.int32)

        def bits(number: jax.Array) -> jax.Array:
            block = at[jnp.minimum(number, count - 1)]
            columns = self.counts[3]
            keys = (block % columns * self.size)[:, None] + jnp.arange(self.size, dtype=jnp.int32)
            seen, is_real = self._evaluate(block // columns, keys)
            return jnp.packbits(seen & is_real, axis=-1, bitorder="little")

        return self._in_chunks(bits, count, self.size)[None]

    def _kinds(self, strip: jax.Array) -> jax.Array:
        """Of each block of strips of rows `[c]`: empty, full, or `FIRST_TILE`, `[c, columns]`."""
        keys = jnp.arange(self._padded(1), dtype=jnp.int32)[None, :]
        seen, is_real = self._evaluate(strip, keys)
        blocks = (len(strip), self.size, -1, self.size)
        is_any = jnp.any((seen & is_real).reshape(blocks), axis=(1, 3))
        is_all = jnp.all((seen | ~is_real).reshape(blocks), axis=(1, 3))
        return jnp.where(is_all, _FULL, jnp.where(is_any, FIRST_TILE, _EMPTY)).astype(jnp.int32)

    def _padded(self, axis: int) -> int:
        return self.counts[2 + axis] * self.size

    def _in_chunks(
        self, function: Callable[[jax.Array], jax.Array], count: int, width: int
    ) -> jax.Array:
        """`function` of int32 `[c]`, of all numbers below `count`, some at a time."""
        chunk = max(min(_ELEMENTS // (self.size * width), count), 1)
        numbers = jnp.arange(math.ceil(count / chunk) * chunk, dtype=jnp.int32)
        results: jax.Array = cast(Any, jax.lax.map)(function, numbers.reshape(-1, chunk))
        return results.reshape(-1, *results.shape[2:])[:count]

    def _evaluate(self, strip: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The predicate at strips of rows `[c]` and keys `[c or 1, s]`, and what is no padding.

        Indices past the last are the last: a predicate may read arrays at them.
        """
        _, N, count, _ = self.counts
        strip = jnp.minimum(strip, math.prod(self.counts[:3]) - 1)
        rows = (strip % count * self.size)[:, None] + jnp.arange(self.size, dtype=jnp.int32)
        T, S = self.lengths
        seen = self.mask_mod(
            (strip // (N * count))[:, None, None],
            (strip // count % N)[:, None, None],
            jnp.minimum(rows, T - 1)[:, :, None],
            jnp.minimum(keys, S - 1)[:, None, :],
        )
        shape = (*rows.shape, keys.shape[-1])
        return self._checked(seen, shape), (rows < T)[:, :, None] & (keys < S)[:, None, :]

    def _checked(self, seen: Any, shape: tuple[int, ...]) -> jax.Array:
        """What the predicate returned, of that shape."""
        array = self.check.array("mask_mod(...)", seen)
        if array.dtype != jnp.bool_:
            found = f"of dtype {array.dtype.name}"
            self.check.type_error("mask_mod(...)", found, "bool (True: visible)")
        fits = array.ndim <= len(shape) and all(
            extent in (1, full)
            for extent, full in zip(array.shape[::-1], shape[::-1], strict=False)
        )
        if not fits:
            allowed = f"a shape that broadcasts to that of the indices, here {list(shape)}"
            self.check.value_error("mask_mod(...)", f"of shape {list(array.shape)}", allowed)
        return jnp.broadcast_to(array, shape)
