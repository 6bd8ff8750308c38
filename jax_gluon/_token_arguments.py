"""Arguments that say something of each token or batch entry, checked and made int32 arrays."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_gluon._dropout import check_key, check_rate, seeds_of, threshold_of
from jax_gluon._errors import Checker


def lengths_of_batch(
    check: Checker, argument: str, lengths: Any, batch: tuple[int, ...], limit: int
) -> jax.Array | None:
    """int32 `[B]`, clamped to `[0, limit]`."""
    return (
        None if lengths is None else check.lengths(argument, lengths, batch or (1,), limit).ravel()
    )


def offset_of_queries(check: Checker, offset: Any, batch: tuple[int, ...]) -> jax.Array | None:
    """int32 `[B]`; None: rows stand at their index."""
    if offset is None or (isinstance(offset, int) and offset == 0):
        return None
    array = check.int32("query_offset", offset)
    whole = batch or (1,)
    if array.shape not in ((), whole):
        allowed = f"a scalar, or shape [B] = {list(whole)}"
        check.value_error("query_offset", f"of shape {list(array.shape)}", allowed)
    return jnp.broadcast_to(array, whole).ravel()


def pair_of_tokens(
    check: Checker,
    what: str,
    query: Any,
    key_value: Any,
    batch: tuple[int, ...],
    extents: tuple[int, int],
) -> tuple[jax.Array, jax.Array] | None:
    """int32 `[B, T]` and `[B, S]`; of one array for both sides, where T is S; or neither."""
    T, S = extents
    given = {f"query_{what}": query, f"key_value_{what}": key_value}
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == 2:
        return None
    if missing and T != S:
        allowed = f"set where query has {T} tokens and key {S}: one array for both needs T = S"
        check.value_error(missing[0], "None", allowed)

    def of(name: str, x: Any, tokens: int) -> jax.Array:
        return _of_tokens(check, name, check.int32(name, x), batch, tokens)

    first, second = (
        of(name, x if x is not None else key_value if query is None else query, tokens)
        for (name, x), tokens in zip(given.items(), (T, S), strict=True)
    )
    return first, second


def mask_of_keys(
    check: Checker, mask: Any, batch: tuple[int, ...], extent: int
) -> jax.Array | None:
    """Bool `[B, S]`."""
    if mask is None:
        return None
    array = check.visibility("key_value_mask", mask)
    return _of_tokens(check, "key_value_mask", array, batch, extent)


def _of_tokens(
    check: Checker, name: str, array: jax.Array, batch: tuple[int, ...], tokens: int
) -> jax.Array:
    """`[B, tokens]` of an array that may lack batch axes, or have them of extent 1."""
    whole = batch or (1,)
    leading = array.shape[:-1]
    fits = 1 <= array.ndim <= len(whole) + 1 and array.shape[-1] == tokens
    if not fits or any(
        extent not in (1, full) for extent, full in zip(leading[::-1], whole[::-1], strict=False)
    ):
        letter = "T" if name.startswith("query") else "S"
        allowed = f"shape [B, {letter}] = {[*whole, tokens]}, or [{letter}]"
        check.value_error(name, f"of shape {list(array.shape)}", allowed)
    return jnp.broadcast_to(array, (*whole, tokens)).reshape(math.prod(whole), tokens)


def dropout_seeds(
    check: Checker, rate: Any, rng: Any, broadcast: Any, batch: int
) -> jax.Array | None:
    """int32 `[B, 7]`; None: nothing is dropped."""
    is_broadcast = check.flag("broadcast_dropout", broadcast)
    if threshold_of(check_rate(check, "dropout_rate", rate)) == 0:
        return None
    if rng is None:
        check.value_error("dropout_rng", "None", f"a key, where dropout_rate is {rate}")
    return seeds_of(check_key(check, "dropout_rng", rng), batch, is_broadcast)
