"""Tokens that are appended to entries of unlike lengths: each goes to a place of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def with_tokens(head: jax.Array, new: jax.Array, length: jax.Array, count: jax.Array) -> jax.Array:
    """The first tokens of all, with those of `new`, the first `count`, that are among them."""
    place = jnp.arange(head.shape[1], dtype=jnp.int32)[None, :] - length[:, None]
    is_new = (place >= 0) & (place < count[:, None])
    tokens = _gather(new, jnp.clip(place, 0, new.shape[1] - 1))
    return jnp.where(is_new[:, :, None, None], tokens, head)


def whole_blocks(
    tail: jax.Array, new: jax.Array, offset: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first `offset` tokens of the tail and `count` new ones, in whole blocks; the new tail.

    The last token is repeated to the end, which leaves the extremes of its block what they are.
    """
    block, T = tail.shape[1], new.shape[1]
    extent = -(-(T + block - 1) // block) * block
    place = jnp.arange(extent, dtype=jnp.int32)[None, :]
    last = jnp.maximum(count - 1, 0)[:, None]
    behind = _gather(new, jnp.clip(place - offset[:, None], 0, last))
    before = jnp.pad(tail, [(0, 0), (0, extent - block), (0, 0), (0, 0)])
    is_old = (place < offset[:, None]) | (count == 0)[:, None]
    x = jnp.where(is_old[:, :, None, None], before, behind)
    start = (offset + count) // block * block
    # Behind the buffer only where its last block is full: the tail is then empty.
    unfinished = start[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
    return x, _gather(x, jnp.minimum(unfinished, extent - 1))


def _gather(x: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, tokens[:, :, None, None], axis=1, mode="promise_in_bounds")
