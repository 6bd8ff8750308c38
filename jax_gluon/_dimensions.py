"""Arithmetic of extents, which are symbolic where `jax.export` is given symbolic shapes.

Comparisons of those raise unless they hold for all sizes; what depends on one is asked of
`is_static` first.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp

# What a symbolic extent is taken for where a kernel is chosen: long enough to be worth a choice.
_ASSUMED = 1024

_core: Any = jax.core


def is_static(*extents: int) -> bool:
    """Whether all extents are known when the program is traced."""
    return all(isinstance(cast(Any, extent), int) for extent in extents)


def min_extent(a: int, b: int) -> int:
    """The smaller one."""
    return _core.min_dim(a, b)


def max_extent(a: int, b: int) -> int:
    """The larger one."""
    return _core.max_dim(a, b)


def ceil_div(extent: int, size: int) -> int:
    """How many blocks of `size` an extent has."""
    return -(-extent // size)


def number(extent: int) -> int | jax.Array:
    """An extent, to compute with beside int32 arrays."""
    return extent if is_static(extent) else jnp.asarray(extent).astype(jnp.int32)


def assumed(extent: int) -> int:
    """The extent, or one that stands for it where it is symbolic."""
    return extent if is_static(extent) else _ASSUMED
