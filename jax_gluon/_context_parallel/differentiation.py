"""Attention over shards of tokens under a `jax.custom_vjp` of its own.

Backward gets what stays of a row: its output and log-sum-exp over all keys, whatever brought them.
Differentiating the steps themselves would keep every block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from jax_gluon import _lowering
from jax_gluon._context_parallel import all_gather, all_to_all, ring, wire
from jax_gluon._context_parallel.centers import without_common_center
from jax_gluon._context_parallel.merging import hidden, natural, unit_of, with_sinks
from jax_gluon._context_parallel.problem import (
    ContextProblem,
    Cotangents,
    Keys,
    Partial,
    Rows,
)
from jax_gluon._context_parallel.visible import visible_keys, visible_rows
from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    AttentionOperands,
    Residuals,
    compute_dtype,
    sinks_gradient,
)

_STRATEGIES: dict[str, Any] = {
    "ring": ring, "all_gather": all_gather, "all_to_all": all_to_all
}  # fmt: skip


class _Saved(NamedTuple):
    rows: Rows
    keys: Keys
    whole: Partial


def _primal(context: ContextProblem, rows: Rows, keys: Keys) -> tuple[jax.Array, jax.Array]:
    return _forward(context, rows, keys)[0]


def _forward(
    context: ContextProblem, rows: Rows, keys: Keys
) -> tuple[tuple[jax.Array, jax.Array], _Saved]:
    dtype = rows.query.dtype
    visible = None, None
    if any(context.problem.quantization):
        visible = visible_rows(context, rows), visible_keys(context, rows, keys)
    rows, keys = wire.encoded(context, rows, keys, visible)
    rows, keys = rows._replace(query=_named_codes(rows.query)), _named_keys(keys)
    unit = unit_of(context.problem)
    whole = _STRATEGIES[context.strategy].forward(context, rows, keys)
    is_seen = visible_rows(context, rows)
    if is_seen is not None and context.sight.layout != "contiguous":
        whole = hidden(whole, is_seen)
    whole = with_sinks(whole, rows.sinks, unit)
    whole = Partial(
        _named(_lowering.OUT_NAME, whole.out),
        _named(_lowering.LOG_SUM_EXP_NAME, whole.maximum),
        _named(_lowering.LOG_SUM_EXP_NAME, whole.log_sum),
    )
    out = whole.out.astype(dtype)
    return (out, natural(whole, rows.sinks, unit)), _Saved(rows, keys, whole)


def _named(name: str, x: jax.Array) -> jax.Array:
    return cast(Any, ad_checkpoint).checkpoint_name(x, name=name)


def _named_codes(x: Any) -> Any:
    if not wire.is_codes(x):
        return x
    return jax.tree.map(functools.partial(_named, _lowering.CODES_NAME), x)


def _named_keys(keys: Keys) -> Keys:
    return keys._replace(key=_named_codes(keys.key), value=_named_codes(keys.value))


def _row_sums(
    context: ContextProblem, saved: _Saved, mean: jax.Array, d_natural: jax.Array
) -> jax.Array:
    """Of dS over all keys: the sink, a key whose value is 0, has the rest."""
    sinks = saved.rows.sinks
    if sinks is None:
        return d_natural
    total = natural(saved.whole, None, unit_of(context.problem))
    of_sink = jnp.exp(jnp.minimum(sinks[:, None].astype(total.dtype) - total, 0.0))
    return of_sink * mean + (1.0 - of_sink) * d_natural


def _backward(
    context: ContextProblem, saved: _Saved, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Any, Any]:
    rows, keys, whole = saved
    d_out, d_natural = cotangents
    # Else XLA keeps blocks that forward was sent, for sends of backward that are the same.
    keys, d_out = cast(Any, jax.lax).optimization_barrier((keys, d_out))
    wide = compute_dtype(rows.query.dtype)
    # D: a row that sees no key has none.
    mean = jnp.sum(d_out.astype(wide) * whole.out, axis=-1).astype(whole.log_sum.dtype)
    given = Cotangents(d_out, d_natural - mean)
    blocks = without_common_center(
        context, rows, keys, whole, _row_sums(context, saved, mean, d_natural)
    )
    sums = _STRATEGIES[context.strategy].backward(context, rows, blocks.keys, blocks.whole, given)
    d_query = sums.query if blocks.d_query is None else sums.query + blocks.d_query
    query_spec, key_spec, value_spec = context.problem.quantization

    def of(x: Any, spec: Any, gradient: jax.Array) -> jax.Array | None:
        # None, which is zero, for operands that came as codes.
        return None if wire.is_codes(x) and spec is None else gradient.astype(x.dtype)

    d_bias = None if rows.bias is None or sums.bias is None else sums.bias.astype(rows.bias.dtype)
    d_sinks = None
    if rows.sinks is not None:
        operands = cast(Any, AttentionOperands)(rows.query, keys.key, keys.value, sinks=rows.sinks)
        unit = unit_of(context.problem)
        d_sinks = sinks_gradient(Residuals(operands, *whole), d_out, d_natural, unit)
    return (
        cast(Any, Rows)(of(rows.query, query_spec, d_query), bias=d_bias, sinks=d_sinks),
        cast(Any, Keys)(of(keys.key, key_spec, sums.key), of(keys.value, value_spec, sums.value)),
    )


_with_gradient = cast(Any, jax.custom_vjp(_primal, nondiff_argnums=(0,)))
_with_gradient.defvjp(_forward, _backward)
attend = cast(Callable[[ContextProblem, Rows, Keys], tuple[jax.Array, jax.Array]], _with_gradient)


def show_empty_rows(log_sum_exp: jax.Array) -> jax.Array:
    """-inf in place of what is finite where a row sees no key."""
    empty = jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, log_sum_exp.dtype)
    return jnp.where(log_sum_exp == empty, -jnp.inf, log_sum_exp)
