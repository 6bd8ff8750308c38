"""How tokens become codes of a cache: an operand's codes, and the floats that are kept of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from jax_gluon import _lowering
from jax_gluon._meshes import vary_like
from jax_gluon._quantization.codes import power_cells, to_bits, unrotated, without_center
from jax_gluon._quantization.formats import CENTER_TOKENS, QuantizedTensor, QuantSpec
from jax_gluon._ragged_tokens import of_block, whole_blocks, with_tokens
from jax_gluon._xla.quantize import divide_large_tokens, ordinary_norm


class Cached(NamedTuple):
    """An operand: its codes, its first tokens (of a centered format) and its last (of a blocked).

    The first are float32 `[B, 32, K, H]`, in whole blocks; the last a ring of two blocks, so that a
    block of tokens can be taken back.
    """

    codes: QuantizedTensor
    head: jax.Array | None
    tail: jax.Array | None

    @property
    def rewindable(self) -> int | None:
        """How many tokens can be taken back; None: any."""
        return None if self.tail is None else self.tail.shape[1] - self.codes.spec.token_block


class Tokens(NamedTuple):
    """New tokens `[B, T, K, H]`, of which the first `real` go behind `length` others."""

    new: jax.Array
    length: jax.Array
    real: jax.Array


class Place(Protocol):
    """Where entries of a part of the codes stand, `[B, i]` for block i of tokens, or token i."""

    def room(self, part: jax.Array) -> int:
        """Entries that there is room for."""
        ...

    def write(
        self, part: jax.Array, index: jax.Array, is_written: jax.Array, entries: jax.Array
    ) -> jax.Array:
        """The part with those entries that are written; an index may be past the room."""
        ...


class InOnePiece:
    """Codes `[B, capacity, K, H]`: past the end is the beginning, in a ring."""

    def room(self, part: jax.Array) -> int:
        return part.shape[1]

    def write(
        self, part: jax.Array, index: jax.Array, is_written: jax.Array, entries: jax.Array
    ) -> jax.Array:
        target = jnp.where(is_written, index % part.shape[1], part.shape[1])
        entry = jnp.arange(part.shape[0], dtype=jnp.int32)[:, None]
        return part.at[entry, target].set(entries, mode="drop")


def empty(spec: QuantSpec, batch: int, rows: tuple[int, int, int, int], dtype: Any) -> Cached:
    """No tokens yet; `rows` is the shape of what is stored, pages or entries first."""
    # Zeros stand for 0 in every format. No float array of this size is ever made.
    K, width = rows[2:]
    x = jax.ShapeDtypeStruct(rows, jnp.float32)
    parts = jax.eval_shape(functools.partial(_lowering.quantize, spec, "xla"), x, None)
    parts = jax.eval_shape(functools.partial(jax.tree.map, to_bits), parts)
    center = head = tail = None
    if spec.center:
        tokens = -(-CENTER_TOKENS // spec.token_block) * spec.token_block
        head = jnp.zeros((batch, tokens, K, width), jnp.float32)
        center = jnp.zeros((batch, 1, K, width), jnp.float32)
    if spec.token_block > 1:
        tail = jnp.zeros((batch, 2 * spec.token_block, K, width), jnp.float32)
    codes = _zeros(dataclasses.replace(parts, center=None))
    return Cached(dataclasses.replace(codes, center=center, dtype=dtype), head, tail)


def first_written(cached: Cached, length: jax.Array) -> jax.Array:
    """The first token whose codes change where tokens are stored behind `length` others."""
    block = cached.codes.spec.token_block
    first = length // block * block
    return first if cached.head is None else jnp.where(length < CENTER_TOKENS, 0, first)


def replayed(cached: Cached, length: jax.Array) -> Tokens | None:
    """Tokens that leave the codes as if none had followed the first `length`, stored again."""
    if cached.head is None and cached.tail is None:
        return None
    block = cached.codes.spec.token_block
    start = length // block * block
    new = None if cached.tail is None else of_block(cached.tail, start, block)
    if cached.head is None:
        return Tokens(cast(jax.Array, new), start, length - start)
    # While the center is not final, it and all codes so far are those of the first tokens.
    is_open = length < CENTER_TOKENS
    if new is None:
        return Tokens(cached.head, jnp.zeros_like(length), jnp.where(is_open, length, 0))
    new = jnp.pad(new, [(0, 0), (0, cached.head.shape[1] - block), (0, 0), (0, 0)])
    new = jnp.where(is_open[:, None, None, None], cached.head, new)
    start = jnp.where(is_open, 0, start)
    return Tokens(new, start, length - start)


def stored(place: Place, cached: Cached, tokens: Tokens) -> Cached:
    """The operand with those tokens: codes, and the floats that are kept."""
    codes, head, tail = cached
    spec, length, count = codes.spec, tokens.length, tokens.real
    block = spec.token_block
    x = tokens.new.astype(jnp.float32)
    center, recoded = codes.center, None
    if head is not None:
        head = with_tokens(head, x, length, count)
        recoded = _recoded(codes, head, length, count)
        center = recoded.center
    if tail is not None:
        x, tail = whole_blocks(tail, x, length, count, block)
    x = _centered(codes, x, center)
    cells = None
    if spec.token_powers:
        first_tokens = _centered(codes, cast(Any, head), center)
        seen = jnp.arange(first_tokens.shape[1], dtype=jnp.int32)[None, :]
        ordinary = ordinary_norm(first_tokens, seen < (length + count)[:, None])
        x, powers = divide_large_tokens(x, ordinary)
        real = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < (length % block + count)[:, None]
        cells = power_cells(jnp.where(real[:, :, None, None], powers, 0), spec)
    plain = dataclasses.replace(spec, center=False, token_powers=False)
    fresh = _lowering.quantize(plain, None, x, None)
    if cells is not None:
        fresh = dataclasses.replace(fresh, scale=jnp.concatenate([fresh.scale, cells], axis=-1))
    first = length // block
    end = jnp.where(count > 0, -(-(length + count) // block), 0)

    def scatter(name: str, size: int) -> Any:
        """`size` entries a block."""
        old = getattr(codes, name)
        if old is None:
            return None
        entries = to_bits(getattr(fresh, name))
        index = (first * size)[:, None] + jnp.arange(entries.shape[1], dtype=jnp.int32)[None, :]
        if recoded is not None:
            again = to_bits(getattr(recoded, name))
            entries = jnp.concatenate([again, entries], axis=1)
            early = jnp.arange(again.shape[1], dtype=jnp.int32)[None, :]
            # A final center leaves these codes what they are.
            early = jnp.where((length < CENTER_TOKENS)[:, None], early, -1)
            index = jnp.concatenate([early, index], axis=1)
        last = (end * size)[:, None]
        # More than a ring holds: of entries for the same slot, only the last is written.
        is_written = (index >= 0) & (index < last) & (index >= last - place.room(old))
        return place.write(old, index, is_written, entries)

    written = dataclasses.replace(
        codes, data=scatter("data", block), scale=scatter("scale", 1),
        zero_point=scatter("zero_point", 1), minimum=scatter("minimum", 1), center=center,
    )  # fmt: skip
    return Cached(written, head, tail)


def _recoded(
    cached: QuantizedTensor, head: jax.Array, length: jax.Array, count: jax.Array
) -> QuantizedTensor:
    """Codes of the first tokens, and the center, where it is not final; zeros in their place."""
    B, tokens = head.shape[:2]
    is_open = length < CENTER_TOKENS

    def code() -> QuantizedTensor:
        token = jnp.arange(tokens, dtype=jnp.int32)[None, :]
        visible = jnp.broadcast_to(token < (length + count)[:, None], (B, tokens))
        return _lowering.quantize(cached.spec, None, head, visible)

    codes = cast(Any, jax.lax.cond)(
        jnp.any(is_open & (count > 0)),
        code,
        lambda: vary_like(head, _zeros(cast(Any, jax.eval_shape)(code))),
    )
    is_moved = (is_open & (count > 0))[:, None, None, None]
    center = jnp.where(is_moved, codes.center, cast(Any, cached.center))
    return dataclasses.replace(codes, center=center)


def _centered(cached: QuantizedTensor, x: jax.Array, center: jax.Array | None) -> jax.Array:
    """`x` less its center, which the cache keeps rotated where the format is."""
    if center is None:
        return x
    return without_center(x, unrotated(center) if cached.spec.rotate else center)


def _zeros(parts: QuantizedTensor) -> QuantizedTensor:
    def zeros(x: Any) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(zeros, parts)
