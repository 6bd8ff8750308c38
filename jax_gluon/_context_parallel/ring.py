"""Ring attention: blocks of keys and values go around while the devices compute.

Ring Attention (https://arxiv.org/abs/2310.01889), with the order of steps of `routes`. The block of
the next step is sent before the present one is computed with. Steps are a loop, whose next turn
waits for this one: a device has two blocks in flight, however many there are. In backward the
gradients of a block go with it, one step behind, and home after the last.
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
    Place,
    Rows,
)
from jax_gluon._context_parallel.routes import Step, route


class _Turn(NamedTuple):
    """A step as a device takes it: the block, and whether it may see any of it."""

    place: Place
    seen: Any
    direction: int
    is_last: bool = False  # of its direction
    distance: int = 0  # of the last


def forward(context: ContextProblem, rows: Rows, keys: Keys) -> Partial:
    """Attention of this device's rows over all keys."""
    unit = unit_of(context.problem)

    def add(so_far: Partial | None, turn: _Turn, block: Keys) -> Partial:
        part = blocks.attend(context, rows, block, turn.place, turn.seen)
        return part if so_far is None else merged(so_far, part, unit)

    return _around(context, keys, add)


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

    def add(sums: _Sums | None, turn: _Turn, block: Keys) -> _Sums:
        # Sent before the step is computed: what it adds meets them afterwards.
        moving = None if sums is None else sums.moving
        if moving is not None:
            moving = _shifted(moving, context, turn.direction)
        part = blocks.differentiate(context, rows, block, turn.place, turn.seen, whole, cotangents)
        so_far = None if sums is None else sums.bias
        d_bias = blocks.added_columns(rows.bias, so_far, part.bias, turn.place.keys, keys)
        if sums is None:
            return _Sums(part.query, part.key, part.value, d_bias, None)
        of_block = part.key, part.value
        both = of_block if moving is None else jax.tree.map(jnp.add, moving, of_block)
        d_key, d_value = sums.key, sums.value
        if turn.is_last:
            home = _shifted(both, context, -turn.distance)
            d_key, d_value, both = d_key + home[0], d_value + home[1], None
        return _Sums(sums.query + part.query, d_key, d_value, d_bias, both)

    return Gradients(*_around(context, keys, add)[:4])


def _around(context: ContextProblem, keys: Keys, add: Callable[[Any, _Turn, Keys], Any]) -> Any:
    """`add` of the result so far, for each step of the route and its block."""
    own, *others = route(context.sight)
    runs = [run for sign in (1, -1) if (run := [s for s in others if s.direction == sign])]
    # The first block of each direction starts from here.
    arriving = _sent(context, runs[0][:1], keys) if runs else None
    result = add(None, _turn(context, own), keys)
    for i, run in enumerate(runs):
        block, last = cast(Keys, arriving), len(run) - 1
        following = runs[i + 1] if i + 1 < len(runs) else None

        def send(step: int, block: Keys, run: Any = run, following: Any = following) -> Any:
            if step < len(run) - 1:
                return _sent(context, run[step + 1 : step + 2], block)
            return None if following is None else _sent(context, following[:1], keys)

        block, result = _in_turn(block, result)
        arriving = send(0, block)
        result = add(result, _turn(context, run[0], is_last=last == 0), block)
        if last > 1:
            block, result = _loop(context, run[1:last], cast(Keys, arriving), result, add, run[2:])
            arriving = block
        if last > 0:
            block, result = _in_turn(cast(Keys, arriving), result)
            arriving = send(last, block)
            result = add(result, _turn(context, run[last], is_last=True), block)
    return result


def _in_turn(block: Keys, result: Any) -> tuple[Keys, Any]:
    """A block that is sent on when the steps before are done: XLA would have all in flight."""
    return cast(Any, jax.lax).optimization_barrier((block, result))


def _loop(
    context: ContextProblem,
    steps: Sequence[Step],
    block: Keys,
    result: Any,
    add: Callable[[Any, _Turn, Keys], Any],
    following: Sequence[Step],
) -> tuple[Keys, Any]:
    """Steps that are neither the first nor the last; the block after them, and the result."""
    rank = jax.lax.axis_index(context.axis_name)
    first, direction = steps[0].distance, steps[0].direction
    seers = jnp.asarray([step.seers for step in steps])
    all_see = all(all(step.seers) for step in steps)

    def turn(carry: tuple[Keys, Any], index: jax.Array) -> tuple[tuple[Keys, Any], None]:
        block, result = _in_turn(*carry)
        arriving = _sent(context, following, block)
        origin = (rank - (first + direction * index)) % context.shards
        seen = True if all_see else seers[index, rank]
        result = add(result, _Turn(Place(rank, origin, False), seen, direction), block)
        return (arriving, result), None

    indices = jnp.arange(len(steps), dtype=jnp.int32)
    (block, result), _ = cast(Any, jax.lax.scan)(turn, (block, result), indices)
    return block, result


def _sent(context: ContextProblem, steps: Sequence[Step], block: Keys) -> Keys:
    """The block for any of these steps."""
    shards, direction = context.shards, steps[0].direction
    senders = sorted({sender for step in steps for sender in step.senders})
    pairs = [(sender, (sender + direction) % shards) for sender in senders]
    return wire.permuted(block, context.axis_name, pairs)


def _shifted(tree: Any, context: ContextProblem, by: int) -> Any:
    shards = context.shards
    pairs = [(r, (r + by) % shards) for r in range(shards)]
    return wire.permuted(tree, context.axis_name, pairs)


def _turn(context: ContextProblem, step: Step, is_last: bool = False) -> _Turn:
    rank = jax.lax.axis_index(context.axis_name)
    origin = rank if step.distance == 0 else (rank - step.distance) % context.shards
    seen: Any = True
    if not any(step.seers):
        seen = False
    elif not all(step.seers):
        seen = jnp.asarray(step.seers)[rank]
    place = Place(rank, origin, step.distance == 0)
    return _Turn(place, seen, step.direction, is_last, step.distance)
