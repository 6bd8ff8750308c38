"""Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotated(x: jax.Array) -> jax.Array:
    """`rotated_at` of tokens that stand at their index."""
    return rotated_at(x, jnp.arange(x.shape[1]))


def rotated_at(x: jax.Array, positions: jax.Array) -> jax.Array:
    """`[B, T, N, H]`, rotated by `positions` `[T]` of the tokens."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)
    angle = (positions[:, None] * frequency)[:, None]
    left, right = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
