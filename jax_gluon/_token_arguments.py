"""Arguments that say something of each token or batch entry, checked and made int32 arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_gluon._dropout import check_key, check_rate, seeds_of, threshold_of
from jax_gluon._errors import Checker


def lengths_of_batch(
    check: Checker, argument: str, lengths: Any, batch: int, limit: int
) -> jax.Array | None:
    """int32 `[B]`, clamped to `[0, limit]`."""
    return None if lengths is None else check.lengths(argument, lengths, (batch,), limit)


def offset_of_queries(check: Checker, offset: Any, batch: int) -> jax.Array | None:
    """int32 `[B]`; None: rows stand at their index."""
    if offset is None or (isinstance(offset, int) and offset == 0):
        return None
    array = check.int32("query_offset", offset)
    if array.shape not in ((), (batch,)):
        allowed = f"a scalar, or shape [B] = [{batch}]"
        check.value_error("query_offset", f"of shape {list(array.shape)}", allowed)
    return jnp.broadcast_to(array, (batch,))


def pair_of_tokens(
    check: Checker, what: str, query: Any, key_value: Any, extents: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array] | None:
    """int32 `[B, T]` and `[B, S]`; of one array for both sides, where T is S; or neither."""
    batch, T, S = extents
    given = {f"query_{what}": query, f"key_value_{what}": key_value}
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == 2:
        return None
    if missing and T != S:
        allowed = f"set where query has {T} tokens and key {S}: one array for both needs T = S"
        check.value_error(missing[0], "None", allowed)

    def of(name: str, x: Any, tokens: int) -> jax.Array:
        array = check.int32(name, x)
        fits = 1 <= array.ndim <= 2 and array.shape[-1] == tokens
        if not fits or (array.ndim == 2 and array.shape[0] not in (1, batch)):
            letter = "T" if name.startswith("query") else "S"
            allowed = f"shape [B, {letter}] = [{batch}, {tokens}], or [{letter}]"
            check.value_error(name, f"of shape {list(array.shape)}", allowed)
        return jnp.broadcast_to(array, (batch, tokens))

    first, second = (
        of(name, x if x is not None else key_value if query is None else query, tokens)
        for (name, x), tokens in zip(given.items(), (T, S), strict=True)
    )
    return first, second


def dropout_seeds(
    check: Checker, rate: Any, rng: Any, broadcast: Any, batch: int
) -> jax.Array | None:
    """int32 `[B, 4]`; None: nothing is dropped."""
    is_broadcast = check.flag("broadcast_dropout", broadcast)
    if threshold_of(check_rate(check, "dropout_rate", rate)) == 0:
        return None
    if rng is None:
        check.value_error("dropout_rng", "None", f"a key, where dropout_rate is {rate}")
    return seeds_of(check_key(check, "dropout_rng", rng), batch, is_broadcast)
