"""Which part of the batch and of the heads a device has, and what differs where it has not all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp

from jax_gluon import _dropout as dropout
from jax_gluon._block_mask import BlockMask
from jax_gluon._problem import AttentionOperands, AttentionProblem, Operands, Residuals
from jax_gluon._quantization.formats import QuantizedTensor

_Tree = TypeVar("_Tree")
_AnyOperands = TypeVar("_AnyOperands", bound=AttentionOperands[Any])


class Split(NamedTuple):
    """The mesh axes over which batch, query heads and kv heads are split, the slowest first.

    `kv_heads` are the first of `heads`: the devices along the others share kv heads.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()

    @property
    def sharing(self) -> tuple[str, ...]:
        """Axes of devices whose query heads read the same kv heads."""
        return self.heads[len(self.kv_heads) :]


#: Of a device that has everything.
WHOLE = Split()

# Axes of every operand and result, a letter each: b batch, n query heads, k kv heads; along the
# others no device has a part. Those of codes are the same for data, scales and all that they have.
LENGTHS, TOKENS, ROWS, QUERY, KEY, LOGITS = "b", "b.", "b.n", "b.n.", "b.k.", "bn.."
#: Of keys and values in pages, which every device has of all entries.
PAGES = "..k."
_OPERANDS: Any = cast(Any, AttentionOperands)(
    query=QUERY,
    key=KEY,
    value=KEY,
    bias=LOGITS,
    mask=LOGITS,
    query_seq_lengths=LENGTHS,
    key_value_seq_lengths=LENGTHS,
    key_value_mask=TOKENS,
    query_offset=LENGTHS,
    sinks=".n",
    segment_ids=TOKENS,
    positions=TOKENS,
    dropout_seeds=TOKENS,
    page_table=TOKENS,
)


def axes_of_operands(operands: AttentionOperands[Any]) -> Any:
    """The letters of the operands' axes: a tree that is a prefix of theirs."""
    axes, mask = _OPERANDS, operands.mask
    if isinstance(mask, BlockMask):
        index: Any = LOGITS
        tiles: Any = "...."
        of_mask = BlockMask(index, tiles, mask.query_length, mask.key_value_length)
        axes = axes._replace(mask=of_mask)
    if operands.page_table is not None:
        axes = axes._replace(key=_axes_of_pages(operands.key), value=_axes_of_pages(operands.value))
    return axes


def _axes_of_pages(x: QuantizedTensor) -> Any:
    letters: Any = KEY
    center = None if x.center is None else letters
    leaves, structure = cast(tuple[list[Any], Any], jax.tree.flatten(x))
    pages = structure.unflatten([PAGES] * len(leaves))
    return replace(cast(QuantizedTensor, pages), center=center)


def axes_of_residuals(residuals: Residuals) -> Any:
    """Likewise."""
    return Residuals(axes_of_operands(residuals.operands), *cast(Any, (QUERY, ROWS, ROWS)))


def own_operands(split: Split, operands: Operands) -> Operands:
    """The operands as a call on a device reads them: the kv heads that its query heads read."""
    seeds = operands.dropout_seeds
    if split.heads and seeds is not None:
        first = _index(split.heads) * operands.query.shape[2]
        operands = operands._replace(dropout_seeds=dropout.of_later_heads(seeds, first))
    return own_kv_heads(split, operands, operands)


def own_residuals(split: Split, residuals: Residuals) -> Residuals:
    """Likewise."""
    return residuals._replace(operands=own_operands(split, residuals.operands))


def own_kv_heads(split: Split, operands: Operands, of: _AnyOperands) -> _AnyOperands:
    """Those of `of`, which are like key and value of `operands`."""
    read = _kv_heads_read(split, operands)
    if read is None:
        return of
    K = operands.key.shape[2]

    def own(x: jax.Array) -> jax.Array:
        # Scales may be the same for all heads.
        return jnp.take(x, read, 2, mode="clip") if x.shape[2] == K else x

    key, value = jax.tree.map(own, (of.key, of.value))
    return of._replace(key=key, value=value)


def gradients_of_all(
    split: Split, operands: Operands, gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value of those of `own_operands`."""
    read = _kv_heads_read(split, operands)
    K = operands.key.shape[2]

    def of_all(x: jax.Array) -> jax.Array:
        if read is not None:
            shape = (*x.shape[:2], K, x.shape[3])
            zeros = jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32), shape)
            return summed(zeros.at[:, :, read].add(x, mode="drop"), split.sharing).astype(x.dtype)
        return summed(x, split.sharing)

    d_query, d_key, d_value = gradients
    return d_query, of_all(d_key), of_all(d_value)


def summed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum of what the devices along the axes have."""
    if not axes:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return cast(Any, jax.lax.psum)(wide, axes).astype(x.dtype)


def codes_span_devices(problem: AttentionProblem, split: Split, operands: Operands) -> bool:
    """Whether codes depend on more than a device has, or are of more heads than its call reads."""
    if split == WHOLE or not any(problem.quantization):
        return False
    spans = [spec is not None and spec.granularity == "tensor" for spec in problem.quantization]
    by_head = [operands.mask, operands.bias]  # which hide a key from codes where no head sees it
    hides = [isinstance(x, jax.Array) and x.shape[2] == 1 for x in by_head]
    return any(spans) or (bool(split.heads) and any(hides)) or bool(split.sharing)


def _kv_heads_read(split: Split, operands: Operands) -> jax.Array | None:
    """Which kv heads a device's query heads read, int32. None: all there are.

    They are one, or some with as many query heads each, or one for each query head.
    """
    N, K = operands.query.shape[2], operands.key.shape[2]
    if not split.sharing or K == 1:
        return None
    devices: int = cast(Any, jax.lax.psum)(1, split.sharing)
    group = N * devices // K
    step = group if N % group == 0 else N if group % N == 0 else 1
    heads = jnp.arange(0, N, step, dtype=jnp.int32)
    return (_index(split.sharing) * N + heads) // group


def _index(axes: tuple[str, ...]) -> jax.Array:
    return cast(Any, jax.lax.axis_index)(axes)
