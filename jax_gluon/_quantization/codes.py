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
