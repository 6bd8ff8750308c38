"""The bytes that each strategy sends, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from jax_gluon._context_parallel import wire
from jax_gluon._context_parallel.problem import ContextProblem, Keys, Rows, Strategy
from jax_gluon._context_parallel.routes import route
from jax_gluon._errors import Checker
from jax_gluon._problem import compute_dtype
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec

STRATEGIES: tuple[Strategy, ...] = ("ring", "all_gather", "all_to_all")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends, at most, in each pass."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of a step of training."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ContextPlan:
    """How attention over shards of tokens is to run, and why.

    `traffic` are the bytes that a device sends by each strategy that can be; `refused` says why
    others can't. `work` is, for each device, its part of the pairs of row and key that are visible;
    None where arrays say which are (positions, offsets, segments, masks, lengths), which are not
    known when a program is traced.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> mesh = jax.sharding.AbstractMesh((4,), ("sequence",))
    >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    >>> plan = jax_gluon.explain_context_parallel(
    ...     x, x, x, mesh=mesh, axis="sequence", is_causal=True
    ... )
    >>> plan.strategy, {name: x.total for name, x in plan.traffic.items()}
    ('all_to_all', {'ring': 25165824, 'all_gather': 25165824, 'all_to_all': 13492224})
    >>> [round(4 * x, 2) for x in plan.work]
    [0.25, 0.75, 1.25, 1.75]
    """

    strategy: Strategy
    reason: str
    traffic: dict[str, Traffic]
    refused: dict[str, str]
    work: tuple[float, ...] | None


def plan(context: ContextProblem, strategy: Strategy | None, rows: Rows, keys: Keys) -> ContextPlan:
    """The plan for operands as a device has them; shapes will do."""
    refusal = refusal_of_heads(context, rows, keys)
    refused = {} if refusal is None else {"all_to_all": refusal}
    traffic = _traffic(context, rows, keys, refused)
    if strategy is not None:
        chosen, reason = strategy, f'strategy="{strategy}" was asked for'
    else:
        chosen = _least(traffic)
        counts = ", ".join(f"{name} {each.total}" for name, each in traffic.items())
        reason = f"the fewest bytes sent by a device, forward and backward: {counts}"
    return ContextPlan(chosen, reason, traffic, refused, _work(context, rows, keys))


def _traffic(
    context: ContextProblem, rows: Rows, keys: Keys, refused: Container[str]
) -> dict[str, Traffic]:
    names = [name for name in STRATEGIES if name not in refused]
    return {name: traffic_of(context, name, rows, keys) for name in names}


def _least(traffic: dict[str, Traffic]) -> Strategy:
    # Of equals the first: the ring needs no memory for all keys, and sends while it computes.
    return cast(Strategy, min(traffic, key=lambda name: traffic[name].total))


def _work(context: ContextProblem, rows: Rows, keys: Keys) -> tuple[float, ...] | None:
    arrays = (
        rows.segment_ids, keys.mask, rows.mask, rows.lengths, rows.key_value_lengths,
    )  # fmt: skip
    if any(x is not None for x in arrays):
        return None
    if not context.is_by_position:
        return (1 / context.shards,) * context.shards
    if not context.sight.is_known:
        return None
    pairs = [sum(row) for row in context.sight.pairs()]
    return tuple(x / max(sum(pairs), 1) for x in pairs)


def traffic_of(context: ContextProblem, strategy: str, rows: Rows, keys: Keys) -> Traffic:
    """The formula of docs/ring-attention.md."""
    P = context.shards
    sent_rows, sent_keys = wire.shapes_sent(context, rows, keys)
    block = wire.size_of(sent_keys)
    query, key, value = rows.query, keys.key, keys.value
    wide = np.dtype(compute_dtype(query.dtype)).itemsize
    gradients = wide * sum(
        _size(x)
        for x, given in ((key, sent_keys.key), (value, sent_keys.value))
        if given is not None
    )
    if strategy == "ring":
        hops = len(route(context.sight)) - 1
        return Traffic(hops * block, hops * (block + gradients))
    if strategy == "all_gather":
        return Traffic((P - 1) * block, (P - 1) * (block + gradients))
    # Each device keeps one part in P of what it has.
    tokens = wire.size_of((sent_keys.positions, sent_keys.segment_ids, sent_keys.mask))
    of_rows = wire.size_of((rows.positions, rows.segment_ids))
    heads = wire.size_of((sent_rows.query, sent_keys.key, sent_keys.value))
    gathered = (P - 1) * (tokens + of_rows)
    out = _size(query) // query.shape[-1] * value.shape[-1]
    statistics = 2 * _size(query) // query.shape[-1] * 4
    forward = heads + out * wide + statistics
    whole = out * wide + statistics + out * query.dtype.itemsize + statistics // 2
    backward = heads + whole + _size(query) * wide + gradients
    return Traffic(gathered + forward * (P - 1) // P, gathered + backward * (P - 1) // P)


def _size(x: Any) -> int:
    shape: tuple[int, ...] = x.shape
    return math.prod(shape)


def refusal_of_heads(context: ContextProblem, rows: Rows, keys: Keys) -> str | None:
    """Why heads can't be exchanged, or None."""
    P = context.shards
    N, K = rows.query.shape[2], keys.key.shape[2]
    if N % P or K % P:
        return f"{N} query and {K} kv heads are no multiples of {P} devices"
    for name in ("bias", "mask"):
        if getattr(rows, name) is not None:
            return f"{name} has no rows of all devices"
    query = rows.query
    spec = query.spec if isinstance(query, QuantizedTensor) else context.problem.quantization[0]
    if spec is not None and not _is_of_tokens(spec, rows.query.shape[1]):
        return "scales of the query's format are of more than the tokens of a device's blocks"
    return None


def _is_of_tokens(spec: QuantSpec, tokens: int) -> bool:
    has_blocks = spec.token_block > 0 and tokens % spec.token_block == 0
    return has_blocks and not spec.center


def strategy_of(
    check: Checker, context: ContextProblem, strategy: Any, rows: Rows, keys: Keys
) -> Strategy:
    """The strategy that was asked for, if it can be; the one that sends the fewest bytes for None.

    Calls are traced with it, so it counts no pairs of row and key.
    """
    check.name("strategy", strategy, STRATEGIES)
    if strategy == "all_to_all":
        refusal = refusal_of_heads(context, rows, keys)
        if refusal is not None:
            check.value_error("strategy", f'"all_to_all", but {refusal}', '"ring", "all_gather"')
    if strategy is not None:
        return strategy
    refused = () if refusal_of_heads(context, rows, keys) is None else ("all_to_all",)
    return _least(_traffic(context, rows, keys, refused))
