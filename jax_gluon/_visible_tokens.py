"""Which tokens of an operand can be seen at all: what its codes may know of."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._problem import MIN_LOGIT, AttentionProblem, Operands


def tokens_within(lengths: jax.Array, extent: int) -> jax.Array:
    """Whether each token of each entry is before `lengths` (int32 `[B]`): bool `[B, extent]`."""
    return jnp.arange(extent, dtype=jnp.int32)[None, :] < lengths[:, None]


def lowered(position: jax.Array, by: int) -> jax.Array:
    """`position - by`, or the least int32, where that would be less."""
    least = int(np.iinfo(np.int32).min)
    return jnp.where(position < least + by, least, position - by)


def visible_tokens(
    problem: AttentionProblem, operands: Operands
) -> tuple[jax.Array | None, jax.Array | None]:
    """The query rows and the keys that may be seen: bool `[B, T]` and `[B, S]`; None: all.

    Masks and biases count where they are the same for all rows; then a key is seen if any head
    sees it.
    """
    B, T = operands.query.shape[:2]
    S = operands.key.shape[1]
    query = keys = None
    if operands.query_seq_lengths is not None:
        query = tokens_within(operands.query_seq_lengths, T)
    conditions: list[jax.Array] = []
    reach = 0 if problem.is_causal else S
    if problem.local_window is not None:
        reach = min(reach, problem.local_window[1])
    stands_at_index = operands.query_offset is None and operands.positions is None
    if T + reach < S and stands_at_index:
        conditions.append(tokens_within(jnp.full((B,), T + reach, jnp.int32), S))
    if operands.key_value_seq_lengths is not None:
        conditions.append(tokens_within(operands.key_value_seq_lengths, S))
    by_head: list[jax.Array] = []
    if isinstance(operands.mask, jax.Array) and operands.mask.shape[2] == 1:
        by_head.append(operands.mask)
    if operands.bias is not None and operands.bias.shape[2] == 1 and problem.soft_cap is None:
        wide = operands.bias.astype(jnp.promote_types(operands.bias.dtype, jnp.float32))
        by_head.append(~(wide < MIN_LOGIT))  # NaN is visible
    if by_head:
        seen = functools.reduce(jnp.logical_and, by_head)
        conditions.append(jnp.any(seen, axis=(1, 2)))
    if conditions:
        keys = jnp.broadcast_to(functools.reduce(jnp.logical_and, conditions), (B, S))
    return query, keys
