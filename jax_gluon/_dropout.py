"""Dropout of probabilities: the bits that say which are kept, for every implementation.

They come from a counter-based generator, so they depend on the key and on where a probability
stands, and on nothing that a kernel, a device or a sharding chooses. Backward makes them again.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._errors import Checker
from jax_gluon._typing import Array, Bool, Key, UInt32

# Of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); seven
# rounds are the fewest that pass BigCrush there.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
# The counter of key j is 8 * (j // 64) + j % 8: what it gives are 16 bits for each of eight keys.
_TILE, _LANES = 64, 8
_RANGE = 1 << 16


def threshold_of(rate: float) -> int:
    """Numbers of 16 bits below this are dropped: the rate to within 2^-17, and less than all."""
    return min(round(rate * _RANGE), _RANGE - 1)


def seeds_of(rng: jax.Array, batch: int, is_broadcast: bool) -> jax.Array:
    """int32 `[B, 7]`: key (two), batch index, first head, a head's step, first row, first key.

    All are indices, which the bits are of. That of the first key is one for all entries. With
    `is_broadcast` all heads of all entries drop alike.
    """
    key = jax.lax.bitcast_convert_type(jax.random.bits(rng, (2,), jnp.uint32), jnp.int32)
    index = jnp.arange(batch, dtype=jnp.int32)[:, None]
    first_head = jnp.zeros_like(index)
    if is_broadcast:
        index = jnp.zeros_like(index)
    step = jnp.full_like(index, 0 if is_broadcast else 1)
    key, tokens = jnp.broadcast_to(key, (batch, 2)), jnp.zeros((batch, 2), jnp.int32)
    return jnp.concatenate([key, index, first_head, step, tokens], axis=1)


def of_later_heads(seeds: jax.Array, first: jax.Array) -> jax.Array:
    """The seeds of a call whose head 0 is the head `first` (int32) of the call that they are of."""
    return seeds.at[:, 3].add(first * seeds[:, 4])


def of_later_tokens(seeds: jax.Array, row: Any, key: Any) -> jax.Array:
    """The seeds of a call whose row 0 and key 0 are these of the call that they are of."""
    first = [jnp.full_like(seeds[:, :1], x) for x in (row, key)]
    return jnp.concatenate([seeds[:, :5], seeds[:, 5:] + jnp.concatenate(first, axis=1)], axis=1)


def of_later_entries(seeds: jax.Array, first: jax.Array) -> jax.Array:
    """The seeds of a call whose entry 0 is the entry `first` (int32) of the call they are of.

    A head's step is 0 where all entries drop alike.
    """
    return seeds.at[:, 2].add(first * seeds[:, 4])


def kept(
    seeds: jax.Array, heads: int, rows: jax.Array, first_key: jax.Array, keys: int, rate: float
) -> jax.Array:
    """Which are kept of `rows` (int32 `[t]`) and `keys` keys: bool `[B, N, t, s]`."""
    first_key = first_key + seeds[0, 6]
    first_tile = first_key // _TILE
    tiles = (keys + _TILE - 1) // _TILE + 1
    lane = jnp.arange(tiles * _LANES, dtype=jnp.uint32)
    seeds = jax.lax.bitcast_convert_type(seeds, jnp.uint32)[:, :, None, None, None]
    shape = (seeds.shape[0], heads, rows.shape[0], tiles * _LANES)
    head = seeds[:, 3] + jnp.arange(heads, dtype=jnp.uint32)[:, None, None] * seeds[:, 4]
    counter = [
        first_tile.astype(jnp.uint32) * np.uint32(_LANES) + lane,
        rows.astype(jnp.uint32)[:, None] + seeds[:, 5],
        head,
        seeds[:, 2],
    ]
    words = _philox([jnp.broadcast_to(x, shape) for x in counter], (seeds[:, 0], seeds[:, 1]))
    halves = [half for word in words for half in (word & np.uint32(0xFFFF), word >> np.uint32(16))]
    bits = jnp.stack([x.reshape(*shape[:3], tiles, _LANES) for x in halves], axis=-2)
    bits = bits.reshape(*shape[:3], tiles * _TILE)
    start = first_key - first_tile * _TILE
    bits = jax.lax.dynamic_slice_in_dim(bits, start, keys, 3)
    return bits >= np.uint32(threshold_of(rate))


def _philox(x: list[jax.Array], key: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = (
            _product(c, y) for c, y in zip(_MULTIPLIERS, (x[0], x[2]), strict=True)
        )
        x = [high1 ^ x[1] ^ key[0], low1, high0 ^ x[3] ^ key[1], low0]
        key = (key[0] + np.uint32(_INCREMENTS[0]), key[1] + np.uint32(_INCREMENTS[1]))
    return x


def _product(constant: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The high and the low 32 bits of a product, from those of halves."""
    half = np.uint32(0xFFFF)
    shift = np.uint32(16)
    a_low, a_high = np.uint32(constant & 0xFFFF), np.uint32(constant >> 16)
    b_low, b_high = x & half, x >> shift
    middle = a_high * b_low + ((a_low * b_low) >> shift)
    other = a_low * b_high + (middle & half)
    return a_high * b_high + (middle >> shift) + (other >> shift), np.uint32(constant) * x


def dropout_mask(
    key: Key[Array, ""] | UInt32[Array, " words"],
    shape: tuple[int, int, int, int],
    rate: float,
    *,
    broadcast: bool = False,
) -> Bool[Array, "B N T S"]:
    """Which probabilities `dot_product_attention(..., dropout_rng=key, dropout_rate=rate)` keeps.

    Each is kept by itself, with probability `1 - rate` to within 2^-17, and is then divided by
    `1 - rate`. The bits are those of Philox4x32-7 (Salmon et al., SC 2011) of the key, and of the
    indices of batch entry, head, query and key.

    **Arguments:**

    - `key`: of `jax.random`.
    - `shape`: `(B, N, T, S)`.
    - `rate`: a number in `[0, 1)`.
    - `broadcast`: whether all heads of all batch entries drop alike (`broadcast_dropout`).

    **Returns:** bool, of that shape: True where kept.

    **Raises:** `ValueError` or `TypeError` for a rate or a shape that is none.

    >>> import jax, jax_gluon
    >>> mask = jax_gluon.dropout_mask(jax.random.key(0), (2, 4, 128, 128), 0.25)
    >>> mask.shape, bool(abs(mask.mean() - 0.75) < 0.01)
    ((2, 4, 128, 128), True)
    """
    check = Checker("dropout_mask")
    given = cast(Any, shape)
    if not isinstance(given, tuple) or len(shape) != 4:
        check.value_error("shape", f"{given!r}", "(B, N, T, S)")
    for name, extent in zip("BNTS", shape, strict=True):
        check.integer(f"shape[{name}]", extent, 0, "an int of at least 0")
    rate = check_rate(check, "rate", rate)
    is_broadcast = check.flag("broadcast", broadcast)
    if 0 in shape or rate == 0.0:
        return jnp.ones(shape, bool)
    return _mask(check_key(check, "key", key), shape, rate, is_broadcast)


# Outside of jit each of its operations would be compiled, anew for each shape.
@functools.partial(cast(Any, jax.jit), static_argnums=(1, 2, 3))
def _mask(
    key: jax.Array, shape: tuple[int, int, int, int], rate: float, is_broadcast: bool
) -> jax.Array:
    B, N, T, S = shape
    seeds = seeds_of(key, B, is_broadcast)
    return kept(seeds, N, jnp.arange(T, dtype=jnp.int32), jnp.zeros((), jnp.int32), S, rate)


def check_rate(check: Checker, argument: str, rate: Any) -> float:
    """A number in `[0, 1)`."""
    number = check.number(argument, rate)
    if not 0.0 <= number < 1.0:
        check.value_error(argument, f"{number}", "a number in [0, 1)")
    return number


def check_key(check: Checker, argument: str, key: Any) -> jax.Array:
    """A key of `jax.random`, typed or raw."""
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if is_typed and key.shape != ():
        check.value_error(argument, f"keys of shape {list(key.shape)}", "one key")
    if not is_typed and (dtype != np.uint32 or getattr(key, "ndim", 0) != 1):
        found = f"a {type(key).__name__}" if dtype is None else f"of dtype {dtype}"
        check.type_error(argument, found, "a key of jax.random")
    return key
