"""Sequence lengths, as every public function takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

_INT32_MAX = int(np.iinfo(np.int32).max)
_ARRAYS: Any = (jax.Array, np.ndarray, np.generic)


def checked_lengths(
    lengths: Any,
    shape: tuple[int, ...],
    limit: int,
    name_of_shape: str,
    fail: Callable[[type[Exception], str, str], NoReturn],
) -> jax.Array:
    """Integers of any dtype as int32 of `shape`, clamped to `[0, limit]` before they are narrowed.

    `fail(error, found, allowed)` raises what is wrong in the words of the caller.
    """
    array: Any = lengths
    if not isinstance(lengths, _ARRAYS):
        leaves: list[Any] = jax.tree.leaves(lengths)
        try:
            if any(isinstance(x, jax.Array) for x in leaves):
                array = jnp.asarray(lengths)
            else:
                array = np.asarray(lengths)
        except (TypeError, ValueError) as error:
            fail(TypeError, f"a {type(lengths).__name__} ({error})", "an array or a list")
        if not leaves:
            array = array.astype(np.int32)  # NumPy reads an empty list as floats.
        elif all(type(x) is int for x in leaves):
            array = np.clip(array, 0, _INT32_MAX).astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        fail(TypeError, f"of dtype {array.dtype.name}", "an integer dtype")
    if array.shape != shape:
        fail(ValueError, f"of shape {array.shape}", name_of_shape)
    most = min(limit, int(np.iinfo(array.dtype).max))
    clip = jnp.clip if isinstance(array, jax.Array) else np.clip
    return jnp.asarray(clip(array, 0, most).astype(np.int32))
