"""What is done to codes and to the rows that they come from, whatever their format."""

from __future__ import annotations

import functools
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np


class Blocks(Protocol):
    """Which tokens, and which elements of a row, share a scale; a `QuantSpec` says so."""

    @property
    def token_block(self) -> int: ...

    @property
    def head_block(self) -> int: ...

    @property
    def power_cells(self) -> int: ...


def spread(cells: jax.Array, spec: Blocks, shape: tuple[int, ...]) -> jax.Array:
    """Entries for blocks, `[..., T', N', H']`, spread over `shape` `[..., T, N, H]`."""
    T, H = shape[-3], shape[-1]
    if spec.token_block > 1:
        cells = jnp.repeat(cells, spec.token_block, axis=-3)[..., :T, :, :]
    if spec.head_block > 1:
        cells = jnp.repeat(cells, spec.head_block, axis=-1)[..., :H]
    return jnp.broadcast_to(cells, shape)


def pack(codes: jax.Array) -> jax.Array:
    """int8 codes `[..., H]` in [-8, 7] as uint8 `[..., H // 2]`: low nibble first, biased by 8."""
    biased = (codes + jnp.asarray(8, jnp.int8)).astype(jnp.uint8)
    low, high = biased[..., 0::2], biased[..., 1::2]
    return low | (high << jnp.asarray(4, jnp.uint8))


def unpack(data: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    low = data & jnp.asarray(15, jnp.uint8)
    high = data >> jnp.asarray(4, jnp.uint8)
    nibbles = jnp.stack([low, high], axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])
    return nibbles.astype(jnp.int8) - jnp.asarray(8, jnp.int8)


# XLA's CPU backend widens bfloat16, and moves that from a slice of an array to all of it: once
# before a loop, or for updates in every step. Arrays that are cut or updated are integers, which it
# leaves alone.


def to_bits(x: jax.Array) -> jax.Array:
    """The bits of bfloat16 as uint16; any other array as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """The array of `dtype` that `to_bits` took."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


# Tokens that are divided by powers of 4 keep the exponent in 3 bits: those of five tokens are the
# bits of a bfloat16 number. Two bits of its exponent are never alike, so that it is neither NaN nor
# subnormal, and passes through XLA as it is.

#: Tokens whose powers are kept in a number.
POWERS_IN_CELL = 5
#: The largest exponent of 4.
LARGEST_POWER = 7


def power_cells(powers: jax.Array, spec: Blocks) -> jax.Array:
    """Exponents of 4 of tokens, int32 `[..., T, N, 1]`, as `[..., T', N, cells]` bfloat16."""
    *leading, T, N, _ = powers.shape
    block, cells = spec.token_block, spec.power_cells
    blocks = -(-T // block)
    x = jnp.pad(powers, [(0, 0)] * len(leading) + [(0, blocks * block - T), (0, 0), (0, 0)])
    x = jnp.swapaxes(x.reshape(*leading, blocks, block, N), -1, -2)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, cells * POWERS_IN_CELL - block)])
    x = x.reshape(*x.shape[:-1], cells, POWERS_IN_CELL)
    x = jnp.sum(x << _places(x.ndim), axis=-1, dtype=jnp.int32)
    bits = (x & 0x3FFF) | (x & 0x4000) << 1 | (~x & 0x2000) << 1
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def token_factors(cells: jax.Array, spec: Blocks, T: int) -> jax.Array:
    """What the tokens that `power_cells` stands for were divided by: float32 `[..., T, N, 1]`."""
    *leading, blocks, N, count = cells.shape
    bits = to_bits(cells).astype(jnp.int32)
    bits = (bits & 0x3FFF) | (bits >> 1 & 0x4000)
    powers = bits[..., None] >> _places(bits.ndim + 1) & 7
    powers = powers.reshape(*leading, blocks, N, count * POWERS_IN_CELL)
    powers = jnp.swapaxes(powers[..., : spec.token_block], -1, -2)
    powers = powers.reshape(*leading, blocks * spec.token_block, N, 1)[..., :T, :, :]
    return power_of_four(powers)


def _places(ndim: int) -> jax.Array:
    """The lowest bits of the powers in a number, along the last of `ndim` axes."""
    places = jnp.arange(0, 3 * POWERS_IN_CELL, 3, dtype=jnp.int32)
    return places.reshape(*(1,) * (ndim - 1), POWERS_IN_CELL)


def power_of_four(exponent: jax.Array) -> jax.Array:
    """4^exponent as float32, exactly; XLA's own powers may round."""
    bits = (2 * exponent + 127) << 23
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


@functools.cache
def rotation(head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The randomised Hadamard rotation of rows, which are multiplied by it: float64 `[H, H]`.

    Orthogonal: signs, then Hadamard matrices over blocks of the largest power of two that divides
    H (QuaRot, https://arxiv.org/abs/2404.00456). The signs are a hash of the index, the same in the
    C++ kernels.
    """
    block = head_dim & -head_dim
    hadamard: Any = np.ones((1, 1))
    while hadamard.shape[0] < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = cast(Any, np).kron(np.eye(head_dim // block), hadamard / np.sqrt(block))
    return rotation_signs(head_dim)[:, None] * blocks


def rotation_signs(head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The signs of `rotation`: the lowest bit of SplitMix64 of 1, 2, ..."""
    z = np.arange(1, head_dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return 1.0 - 2.0 * (z & np.uint64(1)).astype(np.float64)


def rotated(x: jax.Array) -> jax.Array:
    """Rows `[..., H]` times the rotation."""
    matrix = jnp.asarray(rotation(x.shape[-1]), x.dtype)
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def unrotated(x: jax.Array) -> jax.Array:
    """The inverse of `rotated`."""
    matrix = jnp.asarray(rotation(x.shape[-1]).T, x.dtype)
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def without_center(x: jax.Array, center: jax.Array) -> jax.Array:
    """`x` less its center; a difference of two finite numbers is kept finite."""
    largest = float(np.finfo(np.float32).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x - center, -largest, largest), x)
