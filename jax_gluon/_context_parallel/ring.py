"""Ring attention: blocks of keys and values go around while the devices compute.

Ring Attention (https://arxiv.org/abs/2310.01889), with the order of steps of `routes`. The block of
the next step is sent before the present one is computed with, and the one after it only when that
is done: two blocks are in flight at most. In backward the gradients of a block go with it, one step
behind, and home after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jax_gluon._context_parallel import blocks, wire
from jax_gluon._context_parallel.merging import merged, unit_of
from jax_gluon._context_parallel.problem import (
    ContextProblem,
    Cotangents,
    Gradients,
    Keys,
    Partial,
    Rows,
)
from jax_gluon._context_parallel.routes import Step, route


def forward(context: ContextProblem, rows: Rows, keys: Keys) -> Partial:
    """Attention of this device's rows over all keys."""
    unit = unit_of(context.problem)

    def add(so_far: Partial | None, step: Step, block: Keys) -> Partial:
        place, seen = _place(context, step)
        part = blocks.attend(context, rows, block, place, seen)
        return part if so_far is None else merged(so_far, part, unit)

    result = _around(context, keys, add)
    assert result is not None
    return result


class _Sums(NamedTuple):
    """Gradients so far; `moving` are those of the block that is on its way."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    moving: tuple[jax.Array, jax.Array] | None


def backward(
    context: ContextProblem, rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents
) -> Gradients:
    """Gradients of this device's rows, of its keys, and of its rows of the bias."""
    steps = route(context.sight)

    def add(sums: _Sums | None, step: Step, block: Keys) -> _Sums:
        # Sent before the step is computed: what it adds meets them afterwards.
        moving = None if sums is None else sums.moving
        if moving is not None and not step.is_first:
            moving = _shifted(moving, context, step.direction)
        place, seen = _place(context, step)
        part = blocks.differentiate(context, rows, block, place, seen, whole, cotangents)
        if sums is None:
            d_bias = blocks.added_columns(rows.bias, None, part.bias, place[1], keys)
            return _Sums(part.query, part.key, part.value, d_bias, None)
        own = part.key, part.value
        both = own if moving is None else jax.tree.map(jnp.add, moving, own)
        d_key, d_value = sums.key, sums.value
        if _is_last(step, steps):
            home = _shifted(both, context, -step.distance)
            d_key, d_value, both = d_key + home[0], d_value + home[1], None
        d_bias = blocks.added_columns(rows.bias, sums.bias, part.bias, place[1], keys)
        return _Sums(sums.query + part.query, d_key, d_value, d_bias, both)

    sums = _around(context, keys, add)
    assert sums is not None
    return Gradients(*sums[:4])


def _is_last(step: Step, steps: Sequence[Step]) -> bool:
    """Of its direction."""
    return all(
        abs(s.distance) <= abs(step.distance) for s in steps if s.direction == step.direction
    )


def _around(context: ContextProblem, keys: Keys, add: Callable[[Any, Step, Keys], Any]) -> Any:
    """`add` of the result so far, for each step of the route and its block."""
    steps = route(context.sight)
    result, block = None, keys
    for i, step in enumerate(steps):
        following = None
        if i + 1 < len(steps):
            following = _sent(context, steps[i + 1], keys if steps[i + 1].is_first else block)
        result = add(result, step, block)
        if following is not None:
            # What is sent next waits until this block is done with.
            block, result = cast(Any, jax.lax.optimization_barrier)((following, result))
    return result


def _sent(context: ContextProblem, step: Step, block: Keys) -> Keys:
    shards = context.shards
    pairs = [(sender, (sender + step.direction) % shards) for sender in step.senders]
    return wire.permuted(block, context.axis_name, pairs)


def _shifted(tree: Any, context: ContextProblem, by: int) -> Any:
    shards = context.shards
    pairs = [(r, (r + by) % shards) for r in range(shards)]
    return wire.permuted(tree, context.axis_name, pairs)


def _place(context: ContextProblem, step: Step) -> tuple[tuple[Any, Any], Any]:
    """Shards of rows and of keys, and whether the first may see the second, on this device."""
    rank = jax.lax.axis_index(context.axis_name)
    origin = rank if step.distance == 0 else (rank - step.distance) % context.shards
    if all(step.seers):
        return (rank, origin), True
    if not any(step.seers):
        return (rank, origin), False
    return (rank, origin), jnp.asarray(step.seers)[rank]
