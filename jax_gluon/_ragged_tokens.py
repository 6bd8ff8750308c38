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


def without_padding(new: jax.Array, start: jax.Array) -> jax.Array:
    """The tokens from `start` on at the front."""
    place = jnp.arange(new.shape[1], dtype=jnp.int32)[None, :] + start[:, None]
    return _gather(new, jnp.minimum(place, new.shape[1] - 1))


# The last tokens of all are kept in a ring: token p is in slot p modulo its size, a multiple of the
# block.


def of_block(tail: jax.Array, start: jax.Array, block: int) -> jax.Array:
    """The tokens of the block that starts at `start`."""
    place = (start % tail.shape[1])[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
    return _gather(tail, place)


def whole_blocks(
    tail: jax.Array, new: jax.Array, length: jax.Array, count: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """The tokens of the unfinished block and `count` new ones, in whole blocks; the new ring.

    The last token is repeated to the end, which leaves the extremes of its block what they are.
    """
    offset, T = (length % block)[:, None], new.shape[1]
    extent = -(-(T + block - 1) // block) * block
    place = jnp.arange(extent, dtype=jnp.int32)[None, :]
    after = _with_last_tokens(tail, new, length, count)
    if extent <= tail.shape[1]:
        # The ring has all of them. Nothing reads the one before, so that it is written in place.
        place = jnp.minimum(place, jnp.maximum(offset + count[:, None] - 1, 0))
        start = length // block * block
        return _gather(after, (start[:, None] + place) % tail.shape[1]), after
    last = jnp.maximum(count - 1, 0)[:, None]
    behind = _gather(new, jnp.clip(place - offset, 0, last))
    before = of_block(tail, length // block * block, block)
    before = jnp.pad(before, [(0, 0), (0, extent - block), (0, 0), (0, 0)])
    is_old = (place < offset) | (count == 0)[:, None]
    return jnp.where(is_old[:, :, None, None], before, behind), after


def _with_last_tokens(
    tail: jax.Array, new: jax.Array, length: jax.Array, count: jax.Array
) -> jax.Array:
    """The ring after the first `count` of `new`; where they are more than it holds, the last."""
    slots, token = tail.shape[1], jnp.arange(new.shape[1], dtype=jnp.int32)[None, :]
    is_kept = (token < count[:, None]) & (token >= count[:, None] - slots)
    target = jnp.where(is_kept, (length[:, None] + token) % slots, slots)
    entry = jnp.arange(tail.shape[0], dtype=jnp.int32)[:, None]
    return tail.at[entry, target].set(new, mode="drop")


def _gather(x: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, tokens[:, :, None, None], axis=1, mode="promise_in_bounds")
