"""Which pages entries of a paged cache have: a table, from which alone it follows which are free.

An entry owns the pages that its tokens reach, the first numbers of its row of the table; a page is
free that nobody owns. Entries share a page only where one was made of the other, so that it has the
same place in their rows; it is copied before one of them writes to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jax_gluon._meshes import vary_like
from jax_gluon._quantization.formats import QuantizedTensor


class Pool(NamedTuple):
    """Of pages: tokens of one, how many there are, and how many hold the tokens of a center."""

    tokens: int
    pages: int
    first_pages: int


class Grant(NamedTuple):
    """Pages for what is to be written.

    `table` is the new one. Entry b may write its tokens before `room[b]`. Of the pages that were
    there, page `source[i]` is to be copied to `target[i]`, for i below `copies`.
    """

    table: jax.Array
    room: jax.Array
    source: jax.Array
    target: jax.Array
    copies: jax.Array


def owned(table: jax.Array, length: jax.Array, tokens: int) -> jax.Array:
    """Which numbers of the table are those of pages that an entry owns: bool `[B, P]`."""
    index = jnp.arange(table.shape[1], dtype=jnp.int32)[None, :]
    return index < _pages_of(length, tokens)[:, None]


def used_pages(table: jax.Array, length: jax.Array, pool: Pool) -> jax.Array:
    """Which pages somebody owns: bool `[pages]`."""
    numbers = jnp.where(owned(table, length, pool.tokens), table, pool.pages)
    used = jnp.zeros_like(table, jnp.bool_, (pool.pages,))
    return used.at[numbers].set(True, mode="drop")


def grant(
    table: jax.Array, length: jax.Array, written: tuple[jax.Array, jax.Array], pool: Pool
) -> Grant:
    """Pages for tokens from `written[0]` to `written[1]` of each entry, which has `length`.

    Those of earlier entries are taken first. An entry whose own pages can't be copied has no room.
    """
    (begin, end), (B, P) = written, table.shape
    index = jnp.arange(P, dtype=jnp.int32)[None, :]
    have, need = (_pages_of(x, pool.tokens)[:, None] for x in (length, end))
    is_new = (index >= have) & (index < need)
    # Pages that are there already: the one that is not full, or those of the first tokens.
    first = (begin // pool.tokens)[:, None]
    place = first + jnp.arange(pool.first_pages, dtype=jnp.int32)[None, :]
    is_rewritten = (place < have) & (begin < end)[:, None]
    place = jnp.minimum(place, P - 1)
    number = jnp.take_along_axis(table, place, axis=1)
    theirs = jnp.take(table, place, axis=1) == number[None]
    theirs &= place[None] < have[:, :, None]
    theirs &= ~jnp.eye(B, dtype=jnp.bool_)[:, :, None]
    is_copied = is_rewritten & jnp.any(theirs, axis=0)
    entry = jnp.arange(B, dtype=jnp.int32)[:, None]
    is_wanted = is_new.at[entry, jnp.where(is_copied, place, P)].set(True, mode="drop")

    def give() -> tuple[jax.Array, jax.Array]:
        is_free = ~used_pages(table, length, pool)
        rank = jnp.cumsum(is_free.astype(jnp.int32))
        free = jnp.zeros_like(table, shape=(pool.pages,))
        numbers = jnp.arange(pool.pages, dtype=jnp.int32)
        free = free.at[jnp.where(is_free, rank - 1, pool.pages)].set(numbers, mode="drop")
        order = jnp.cumsum(is_wanted.astype(jnp.int32).reshape(-1)).reshape(B, P) - 1
        is_given = is_wanted & (order < rank[-1])
        given = jnp.take(free, jnp.minimum(order, pool.pages - 1), mode="clip")
        missing = jnp.min(jnp.where(is_wanted & ~is_given, index, P), axis=1)
        return jnp.where(is_given, given, table), missing.astype(jnp.int32)

    def keep() -> tuple[jax.Array, jax.Array]:
        return table, vary_like(table, jnp.full((B,), P, jnp.int32))

    new_table, missing = cast(Any, jax.lax.cond)(jnp.any(is_wanted), give, keep)
    room = jnp.where(missing < have[:, 0], 0, missing * pool.tokens)
    target = jnp.take_along_axis(new_table, place, axis=1)
    is_copied = (is_copied & (target != number)).reshape(-1)
    (order,) = jnp.nonzero(is_copied, size=is_copied.size, fill_value=0)
    source, target = number.reshape(-1)[order], target.reshape(-1)[order]
    return Grant(new_table, room, source, target, jnp.sum(is_copied, dtype=jnp.int32))


def with_copies(codes: QuantizedTensor, given: Grant) -> QuantizedTensor:
    """The pages after those copies, which are made in place."""

    def copy(i: jax.Array, pages: QuantizedTensor) -> QuantizedTensor:
        def part(x: jax.Array) -> jax.Array:
            lax: Any = jax.lax
            page = lax.dynamic_index_in_dim(x, given.source[i], 0)
            return lax.dynamic_update_index_in_dim(x, page, given.target[i], 0)

        return jax.tree.map(part, pages)

    pages = dataclasses.replace(codes, center=None)
    pages = cast(Any, jax.lax.fori_loop)(0, given.copies, copy, pages)
    return dataclasses.replace(pages, center=codes.center)


class InPages:
    """Codes `[pages, tokens, K, H]`, those of an entry on the pages of its row of the table."""

    def __init__(self, table: jax.Array) -> None:
        self._table = table

    def room(self, part: jax.Array) -> int:
        return self._table.shape[1] * part.shape[1]

    def write(
        self, part: jax.Array, index: jax.Array, is_written: jax.Array, entries: jax.Array
    ) -> jax.Array:
        pages, size = part.shape[:2]
        place = jnp.minimum(jnp.maximum(index, 0) // size, self._table.shape[1] - 1)
        page = jnp.take_along_axis(self._table, place, axis=1)
        page = jnp.where(is_written, page, pages)
        return part.at[page, index % size].set(entries, mode="drop")


def _pages_of(length: jax.Array, tokens: int) -> jax.Array:
    return (length + (tokens - 1)) // tokens
