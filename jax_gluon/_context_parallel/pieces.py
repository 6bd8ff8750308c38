"""Blocks as attention of one device has them, without positions.

Causal rows see of another shard's keys a rectangle, or as many as their index says: so it is in
every layout. What is computed then is a plain problem, which cuDNN takes too, and in which no
kernel compares positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jax_gluon._context_parallel.problem import ContextProblem, Keys, Place, Rows


class Piece(NamedTuple):
    """Rows and keys of a block; row i of them sees keys to the i-th, or all."""

    rows: slice
    keys: slice
    is_causal: bool = False


class Pieces(NamedTuple):
    """What rows see of a shard of keys that is before their own, their own, and after it."""

    before: Piece
    own: Piece
    after: Piece


_ALL = slice(None)


def pieces_of(context: ContextProblem, rows: Rows, keys: Keys) -> Pieces | None:
    """None where more than a causal mask and the layout says who sees whom."""
    sight = context.sight
    T, S = sight.tokens
    if not is_plain(context, rows, keys) or T != S or rows.query.shape[1] != T:
        return None
    whole, own = Piece(_ALL, _ALL), Piece(_ALL, _ALL, context.problem.is_causal)
    if not context.problem.is_causal:
        return Pieces(whole, own, whole)
    if sight.layout == "striped":
        return Pieces(own, own, Piece(slice(1, None), slice(T - 1), is_causal=True))
    if sight.layout == "zigzag":
        return Pieces(Piece(_ALL, slice(T // 2)), own, Piece(slice(T // 2, None), _ALL))
    # Of a contiguous layout nobody sees keys that come after.
    return Pieces(whole, own, whole)


def is_plain(context: ContextProblem, rows: Rows, keys: Keys) -> bool:
    """Whether a causal mask over the layout, or nothing, says who sees whom."""
    of_rows = (
        rows.bias, rows.mask, rows.lengths, rows.key_value_lengths, rows.offset, rows.positions,
        rows.segment_ids, rows.dropout_seeds,
    )  # fmt: skip
    of_keys = keys.positions, keys.segment_ids, keys.mask
    if any(x is not None for x in (*of_rows, *of_keys)) or context.problem.local_window is not None:
        return False
    return context.sight.is_known or not context.problem.is_causal


def by_order(pieces: Pieces, place: Place, compute: Callable[..., Any], *operands: Any) -> Any:
    """`compute(piece, *operands)` of the piece that is there at a place."""

    def of(piece: Piece) -> Callable[..., Any]:
        return lambda *operands: compute(piece, *operands)

    branches = [of(piece) for piece in pieces]
    lax = cast(Any, jax.lax)
    if place.is_own:
        return branches[1](*operands)
    if isinstance(place.rows, int) and isinstance(place.keys, int):
        return branches[_sign(place.keys - place.rows) + 1](*operands)
    if pieces.before == pieces.after and pieces.before == pieces.own:
        return branches[0](*operands)
    if place.is_own is False:
        if pieces.before == pieces.after:
            return branches[0](*operands)
        return lax.cond(place.keys < place.rows, branches[0], branches[2], *operands)
    return lax.switch(jnp.sign(place.keys - place.rows) + 1, branches, *operands)


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)
