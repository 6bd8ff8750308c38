"""The one description of an attention problem that travels through every layer.

Letters, everywhere: B batch, T query length, S key length, N query heads, K kv heads, H head dim,
V value head dim. Query head n reads kv head `n // (N // K)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_gluon._block_mask import BlockMask
from jax_gluon._kernels import PassKernels
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec

#: What a row that sees no key has as its log-sum-exp, and stores as the logarithm of its sum beside
#: a maximum of 0. An infinity would trip `jax_debug_infs`; only the public value is -inf.
EMPTY_ROW_LOG_SUM_EXP = -3.0e38


#: Axes of query and output; those of key and value are in the same order.
Layout = Literal["BTNH", "BNTH"]

_DEFAULT_KERNELS = PassKernels()


@dataclass(frozen=True)
class AttentionProblem:
    """The static part of a problem: `softmax(mask(soft_cap(scale * q k^T + bias))) v`.

    `local_window` is `(left, right)`: key j is visible to query i where
    `i - left <= j <= i + right`. `soft_cap` c turns a logit x into `c * tanh(x / c)`.
    `implementation` None leaves the choice to the platform that the program is lowered for.
    `layout` is that of the caller's float operands and results, which passes are given and return.
    `quantization` is how query, key and value are still to be quantized. The kernels are those of
    the plugin. Where `is_partial`, the keys are a part of those that rows see: backward gets output
    and log-sum-exp of all, and as the cotangent of the log-sum-exp what is left when D, each row's
    mean of dP, is taken from it: no part knows D.
    """

    scale: float
    is_causal: bool = False
    local_window: tuple[int, int] | None = None
    soft_cap: float | None = None
    quantization: tuple[QuantSpec | None, QuantSpec | None, QuantSpec | None] = (None, None, None)
    dropout_rate: float = 0.0
    implementation: str | None = None
    layout: Layout = "BTNH"
    kernels: PassKernels = _DEFAULT_KERNELS
    is_partial: bool = False


#: A bias below this hides its key like -inf, unless there is a soft cap. It is about the least
#: logit that stays finite in float32 as a multiple of log 2, the unit of the CPU kernels.
MIN_LOGIT = -2.35e38


_Rows = TypeVar("_Rows", bound=jax.Array | QuantizedTensor | None, covariant=True)


class AttentionOperands(NamedTuple, Generic[_Rows]):
    """The arrays of a problem, all of rank 4 but those of numbers for each entry or head.

    With layout "BNTH" float operands have heads before tokens.

    query `[B, T, N, H]`, key `[B, S, K, H]` and value `[B, S, K, V]` are float arrays of one dtype
    or `QuantizedTensor`s; bias (float) and mask (bool, True: visible) are `[b, n, t, s]`, each
    extent 1 or the full one; a mask of several rows may also be a `BlockMask`; the lengths are
    int32 `[B]`, clamped to `[0, T]` and `[0, S]` where they are used; `key_value_mask` (bool
    `[B, S]`, True: visible) hides keys from all rows. Row i stands at position
    `i + query_offset[b]` (int32 `[B]`; None: 0), in which causal and window are meant; or rows and
    keys stand at `positions` (int32 `[B, T]` and `[B, S]`). A row sees keys of its segment only,
    where there are `segment_ids` (likewise). `sinks` `[1, N]`, float32 (float64 for float64
    operands), are logits that are in the denominator alone. `dropout_seeds` (int32 `[B, 7]`) are
    there where the problem's `dropout_rate` is not 0. With a `page_table` (int32 `[B, P]`) key and
    value are codes in pages, `[pages, tokens, K, H]`, whose centers alone are `[B, 1, K, H]`: token
    j of entry b is in page `page_table[b, j // tokens]`. S is then P pages.
    """

    query: _Rows
    key: _Rows
    value: _Rows
    bias: jax.Array | None = None
    mask: jax.Array | BlockMask | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None
    key_value_mask: jax.Array | None = None
    query_offset: jax.Array | None = None
    sinks: jax.Array | None = None
    segment_ids: tuple[jax.Array, jax.Array] | None = None
    positions: tuple[jax.Array, jax.Array] | None = None
    dropout_seeds: jax.Array | None = None
    page_table: jax.Array | None = None


Operands = AttentionOperands[jax.Array | QuantizedTensor]
FloatOperands = AttentionOperands[jax.Array]
#: Tangents of query, key, value, bias and sinks; None is zero.
Tangents = AttentionOperands[jax.Array | None]


class Residuals(NamedTuple):
    """What forward leaves for backward; the last two are the parts that `forward` returns."""

    operands: Operands
    out: jax.Array
    row_maximum: jax.Array
    log_sum: jax.Array


def compute_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """What operands of `dtype` are computed in: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == jnp.float64 else np.float32)


def log_sum_exp(
    row_maximum: jax.Array, log_sum: jax.Array, sinks: jax.Array | None, unit: float | jax.Array
) -> jax.Array:
    """The natural log-sum-exp of parts in multiples of `unit`; finite where a row sees no key.

    That of such a row is its sink, if there is one: the parts do not know of it.
    """
    empty = jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, log_sum.dtype)
    natural = (row_maximum + log_sum) * jnp.asarray(unit, log_sum.dtype)
    of_empty = empty
    if sinks is not None:
        of_empty = jnp.maximum(sinks[:, None].astype(log_sum.dtype), empty)
    return jnp.where(log_sum == empty, of_empty, natural)


def sinks_gradient(
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
    unit: float | jax.Array,
) -> jax.Array:
    """The gradient of the sinks, of their shape and dtype; parts are in multiples of `unit`.

    A sink is a key whose value is 0: `sum P (d_log_sum_exp - rowsum(dO * O))` over its rows.
    """
    sinks, dtype = residuals.operands.sinks, residuals.log_sum.dtype
    assert sinks is not None
    is_empty = residuals.log_sum == jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, dtype)
    logit = sinks[:, None].astype(dtype)
    # In this order: the logarithm of the sum would vanish in a large maximum.
    above = logit * jnp.asarray(1 / unit, dtype) - residuals.row_maximum
    above -= jnp.where(is_empty, 0.0, residuals.log_sum)
    p = jnp.exp(above * jnp.asarray(unit, dtype))
    p = jnp.where(is_empty, (logit > -jnp.inf).astype(dtype), p)
    d_logit = -jnp.sum(d_out.astype(dtype) * residuals.out.astype(dtype), axis=-1)
    # The output of a row that sees no key is 0 whatever its cotangent is.
    d_logit = jnp.where(is_empty, 0.0, d_logit)
    if d_log_sum_exp is not None:
        d_logit += d_log_sum_exp
    d_sinks = jnp.sum(jnp.where(p == 0, 0.0, p * d_logit), axis=(0, 1))
    return d_sinks[None].astype(sinks.dtype)
