"""What is sent: keys and values as they are, or quantized once, and how many bytes they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_gluon import _lowering
from jax_gluon._context_parallel.problem import ContextProblem, Keys, Rows
from jax_gluon._quantization.codes import from_bits, to_bits
from jax_gluon._quantization.formats import QuantizedTensor

_Tree = TypeVar("_Tree")
_lax: Any = jax.lax


def encoded(
    context: ContextProblem,
    rows: Rows,
    keys: Keys,
    visible: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> tuple[Rows, Keys]:
    """The operands with codes for floats that `quantization` names.

    Tokens that are not `visible`, bool `[B, T]` and `[B, S]` (None: all are), are in no scale.
    """
    query_spec, key_spec, value_spec = context.problem.quantization
    implementation = context.problem.implementation

    def codes(x: Any, spec: Any, visible: jax.Array | None) -> Any:
        return x if spec is None else _lowering.quantize(spec, implementation, x, visible)

    of_rows, of_keys = visible
    return (
        rows._replace(query=codes(rows.query, query_spec, of_rows)),
        keys._replace(
            key=codes(keys.key, key_spec, of_keys), value=codes(keys.value, value_spec, of_keys)
        ),
    )


def permuted(tree: _Tree, axis_name: Any, pairs: Sequence[tuple[int, int]]) -> _Tree:
    """What the device has that sends to this one; zeros where none does."""

    def move(x: jax.Array) -> jax.Array:
        return from_bits(_lax.ppermute(to_bits(x), axis_name, pairs), x.dtype)

    return jax.tree.map(move, tree)


def gathered(tree: _Tree, axis_name: Any) -> _Tree:
    """What all devices have: a leading axis of devices."""

    def gather(x: jax.Array) -> jax.Array:
        return from_bits(_lax.all_gather(to_bits(x), axis_name), x.dtype)

    return jax.tree.map(gather, tree)


def block(tree: _Tree, shard: int | jax.Array) -> _Tree:
    """The part of one device, of what `gathered` gives."""

    def part(x: jax.Array) -> jax.Array:
        bits = _lax.dynamic_index_in_dim(to_bits(x), shard, keepdims=False)
        return from_bits(bits, x.dtype)

    return jax.tree.map(part, tree)


def heads_apart(tree: _Tree, axis_name: Any, shards: int) -> _Tree:
    """From `[B, tokens, heads, X]` on each device: all devices' tokens of a part of the heads.

    `[P, B, tokens, heads / P, X]`. What is not of heads is that of all devices.
    """

    def move(x: jax.Array) -> jax.Array:
        bits = to_bits(x)
        if x.ndim < 4 or x.shape[2] == 1:
            return from_bits(_lax.all_gather(bits, axis_name), x.dtype)
        B, tokens, heads, X = x.shape
        bits = bits.reshape(B, tokens, shards, heads // shards, X)
        return from_bits(_lax.all_to_all(bits, axis_name, 2, 0), x.dtype)

    return jax.tree.map(move, tree)


def heads_together(x: jax.Array, axis_name: Any, shards: int) -> jax.Array:
    """From `[P, B, tokens, heads / P, ...]`, back to `[B, tokens, heads, ...]` of own tokens."""
    x = _lax.all_to_all(x, axis_name, 0, 2)
    return x.reshape(*x.shape[:2], shards * x.shape[3], *x.shape[4:])


def rows_of(x: jax.Array) -> jax.Array:
    """`[P, B, tokens, ...]` as `[B, P * tokens, ...]`."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def parts_of(x: jax.Array, shards: int) -> jax.Array:
    """The inverse of `rows_of`."""
    return jnp.swapaxes(x.reshape(x.shape[0], shards, -1, *x.shape[2:]), 0, 1)


def size_of(tree: Any) -> int:
    """Bytes of arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shapes_sent(context: ContextProblem, rows: Rows, keys: Keys) -> tuple[Rows, Keys]:
    """`encoded`, without computing anything."""
    return jax.eval_shape(functools.partial(encoded, context), rows, keys)


def is_codes(x: Any) -> bool:
    return isinstance(x, QuantizedTensor)
