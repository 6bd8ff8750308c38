"""Which tokens can be seen at all: what codes may know of, and what masks of keys hide."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._dimensions import is_static, min_extent, number
from jax_gluon._pages import key_value_length
from jax_gluon._problem import MIN_LOGIT, AttentionOperands, AttentionProblem, Operands
from jax_gluon._quantization.formats import QuantizedTensor

_Rows = TypeVar("_Rows", bound=jax.Array | QuantizedTensor)


def tokens_within(lengths: jax.Array, extent: int) -> jax.Array:
    """Whether each token of each entry is before `lengths` (int32 `[B]`): bool `[B, extent]`."""
    return jnp.arange(extent, dtype=jnp.int32)[None, :] < lengths[:, None]


def lowered(position: jax.Array, by: int) -> jax.Array:
    """`position - by`, or the least int32, where that would be less."""
    least = int(np.iinfo(np.int32).min)
    return jnp.where(position < least + by, least, position - by)


def visible_tokens(
    problem: AttentionProblem, operands: Operands, heads_over: tuple[str, ...] = ()
) -> tuple[jax.Array | None, jax.Array | None]:
    """The query rows and the keys that may be seen: bool `[B, T]` and `[B, S]`; None: all.

    Masks and biases count where they are the same for all rows; then a key is seen if any head
    sees it, where heads are split over axes of a mesh on any of their devices.
    """
    B, T = operands.query.shape[:2]
    S = key_value_length(operands)
    query = keys = None
    if operands.query_seq_lengths is not None:
        query = tokens_within(operands.query_seq_lengths, T)
    conditions: list[jax.Array] = []
    reach = S
    if problem.local_window is not None:
        reach = min_extent(problem.local_window[1], S)
    if problem.is_causal:
        reach = 0
    stands_at_index = operands.query_offset is None and operands.positions is None
    if stands_at_index and (T + reach < S if is_static(T, S) else reach is not S):
        conditions.append(tokens_within(jnp.full((B,), number(T + reach), jnp.int32), S))
    if operands.key_value_seq_lengths is not None:
        conditions.append(tokens_within(operands.key_value_seq_lengths, S))
    if operands.key_value_mask is not None:
        conditions.append(operands.key_value_mask)
    of_logits = visible_by_logits(problem, operands.bias, operands.mask, heads_over)
    if of_logits is not None:
        conditions.append(of_logits)
    if conditions:
        keys = jnp.broadcast_to(functools.reduce(jnp.logical_and, conditions), (B, S))
    return query, keys


def visible_by_logits(
    problem: AttentionProblem, bias: jax.Array | None, mask: Any, over: tuple[str, ...]
) -> jax.Array | None:
    """The keys that a mask and a bias of no rows leave to any head: bool `[b, s]`; None: all.

    Or to heads on any device along axes `over` of a mesh.
    """
    by_head: list[jax.Array] = []
    if isinstance(mask, jax.Array) and mask.shape[2] == 1:
        by_head.append(mask)
    if bias is not None and bias.shape[2] == 1 and problem.soft_cap is None:
        wide = bias.astype(jnp.promote_types(bias.dtype, jnp.float32))
        by_head.append(~(wide < MIN_LOGIT))  # NaN is visible
    if not by_head:
        return None
    by_any = jnp.any(functools.reduce(jnp.logical_and, by_head), axis=(1, 2))
    if over:
        by_any = cast(Any, jax.lax.pmax)(by_any.astype(jnp.int32), over) > 0
    return by_any


def mask_as_segments(operands: AttentionOperands[_Rows]) -> AttentionOperands[_Rows]:
    """The operands with keys that `key_value_mask` hides in segments of which no row is.

    Kernels then skip blocks of such keys, as they skip those of other segments.
    """
    mask = operands.key_value_mask
    if mask is None:
        return operands
    B, T = operands.query.shape[:2]
    if operands.segment_ids is None:
        # Segments that follow each other need no sorting: padding before the first real token
        # comes before it, as padding after the last comes after.
        first = jnp.argmax(mask, axis=1, keepdims=True)
        outside = jnp.where(jnp.arange(mask.shape[1])[None, :] < first, jnp.int32(-1), jnp.int32(1))
        query_ids, key_ids = jnp.zeros_like(outside, shape=(B, T)), jnp.zeros_like(outside)
    else:
        query_ids, key_ids = operands.segment_ids
        # T rows leave one of T + 1 numbers free.
        is_used = jnp.zeros_like(query_ids, jnp.bool_, (B, T + 1))
        entry = jnp.arange(B, dtype=jnp.int32)[:, None]
        inside = jnp.where(query_ids < 0, number(T + 1), query_ids)
        is_used = is_used.at[entry, inside].set(True, mode="drop")
        outside = jnp.argmin(is_used, axis=1, keepdims=True).astype(jnp.int32)
    segment_ids = query_ids, jnp.where(mask, key_ids, outside)
    return operands._replace(key_value_mask=None, segment_ids=segment_ids)
