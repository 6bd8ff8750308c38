"""The oracle: attention written down plainly, differentiated by JAX itself.

It materialises the `[T, S]` scores and is as accurate as the dtype it is given: pass float64 under
`jax_enable_x64`. It answers what `jax_gluon`'s functions should return, and nothing about how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, Unpack, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_gluon import _dropout as dropout
from jax_gluon._arguments import KEYWORDS, AttentionKeywords, check_arguments
from jax_gluon._block_mask import BlockMask
from jax_gluon._errors import Checker
from jax_gluon._layouts import swapped, swapped_operands
from jax_gluon._problem import MIN_LOGIT, AttentionProblem, Operands
from jax_gluon._quantization.formats import Operand, QuantizedTensor, QuantSpec
from jax_gluon._typing import Array, BoolOrInteger, Float, Integer
from jax_gluon._visible_tokens import lowered, tokens_within, visible_tokens
from jax_gluon._xla.quantize import quantize

__all__ = ["attention_with_log_sum_exp", "dot_product_attention", "fake_quantize"]

# The two products, as einsum writes them.
_SCORES = "bkgth,bksh->bkgts"
_OUTPUT = "bkgts,bksv->bkgtv"

_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def dot_product_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    *,
    return_residual: Literal[False] = False,
    **keywords: Unpack[AttentionKeywords],
) -> Float[Array, "*B T N V"]: ...


@overload
def dot_product_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    *,
    return_residual: Literal[True],
    **keywords: Unpack[AttentionKeywords],
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]: ...


def dot_product_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    *,
    return_residual: bool = False,
    **keywords: Unpack[AttentionKeywords],
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """What `jax_gluon.dot_product_attention` should return; its gradient is what JAX derives.

    **Arguments**, **Returns** and **Raises** are those of `jax_gluon.dot_product_attention`;
    `implementation` and `kernel` are checked and change nothing. Memory is O(T * S).

    >>> import jax, jax_gluon.reference
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> jax_gluon.reference.dot_product_attention(x, x, x, is_causal=True).shape
    (2, 128, 8, 64)
    """
    check = Checker("reference.dot_product_attention")
    check.flag("return_residual", return_residual)
    out, log_sum_exp = _run(check, query, key, value, bias, mask, keywords)
    if not return_residual:
        return out
    key_dtype = key.dtype if isinstance(key, QuantizedTensor) else jnp.asarray(key).dtype
    return out, jax.lax.stop_gradient(log_sum_exp).astype(key_dtype)


def attention_with_log_sum_exp(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    **keywords: Unpack[AttentionKeywords],
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """What `jax_gluon.attention_with_log_sum_exp` should return.

    **Arguments** and **Raises** are those of `dot_product_attention` but `return_residual`.

    **Returns:** the output, and the natural log-sum-exp of each row, float32 (float64 for float64
    operands) `[B, T, N]` or `[T, N]`, through which the gradient flows: -inf, with gradient 0,
    where a row sees no key.

    >>> import jax, jax_gluon.reference
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> out, log_sum_exp = jax_gluon.reference.attention_with_log_sum_exp(x, x, x)
    >>> log_sum_exp.shape
    (2, 128, 8)
    """
    check = Checker("reference.attention_with_log_sum_exp")
    return _run(check, query, key, value, bias, mask, keywords)


def fake_quantize(
    x: Float[Array, "*B T N H"], spec: QuantSpec, *, lengths: Integer[Array, "*B"] | None = None
) -> Float[Array, "*B T N H"]:
    """`x` after a round trip through `spec`; its gradient is the identity (straight-through).

    **Arguments:** as `jax_gluon.quantize`: `x` is float `[B, T, N, H]` or `[T, N, H]`.

    **Returns:** float32, or float64 where `x` is: the codes are those of `x` rounded to float32.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> error = jax_gluon.reference.fake_quantize(x, jax_gluon.QuantSpec(center=True)) - x
    >>> bool(jnp.max(jnp.abs(error)) < jnp.max(jnp.abs(x)) / 100)
    True
    """
    x = x.astype(np.promote_types(x.dtype, np.float32))
    visible = None
    if lengths is not None:
        visible = tokens_within(jnp.reshape(lengths, (-1,)), x.shape[-3])
        visible = visible.reshape(*x.shape[:-3], x.shape[-3])
    return _rounded(x, spec, visible)


def _rounded(x: jax.Array, spec: QuantSpec, visible: jax.Array | None) -> jax.Array:
    constant = jax.lax.stop_gradient(x)
    rounded = quantize(constant, spec, visible).dequantize(x.dtype)
    # The difference is exactly 0, and carries the gradient.
    return rounded + (x - constant)


def _run(
    check: Checker,
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None,
    mask: ArrayLike | BlockMask | None,
    keywords: AttentionKeywords,
) -> tuple[jax.Array, jax.Array]:
    check.keywords(keywords, KEYWORDS)
    arguments = check_arguments(check, query, key, value, bias, mask, **keywords)
    problem, operands = arguments.problem, arguments.operands
    scale = problem.scale if arguments.scale is None else arguments.scale
    dtype = np.promote_types(operands.query.dtype, np.float32)
    operands = swapped_operands(problem, operands)
    out, log_sum_exp = swapped(problem, _attend(problem, operands, jnp.asarray(scale, dtype)))
    return arguments.unflatten(out), arguments.unflatten(log_sum_exp)


def _jit_with_static_problem(function: _Function) -> _Function:
    return cast(_Function, jax.jit(function, static_argnums=0))


@_jit_with_static_problem
def _attend(
    problem: AttentionProblem, operands: Operands, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    B, T, N, H = operands.query.shape
    K = operands.key.shape[2]
    dtype = scale.dtype
    query, key, value = _floats(problem, operands, dtype)
    if scale.ndim:
        scale = scale.reshape(K, N // K, 1, 1)
    # Query heads are grouped by the kv head that they read.
    query = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    visible = _grouped(_visible(problem, operands), K)

    def logits(query: jax.Array, key: jax.Array, visible: jax.Array) -> jax.Array:
        products = _over_visible(_SCORES, query, key, visible)
        scores = scale * jnp.where(visible, products, 0.0)
        if operands.bias is not None:
            bias = _grouped(_to_scores(operands, operands.bias), K).astype(dtype)
            scores += jnp.where(visible, bias, 0.0)
        return scores

    if problem.soft_cap is None:
        # What a logit of -inf hides is taken out before the product, for its gradient to be 0.
        visible &= ~(jax.lax.stop_gradient(logits(query, key, visible)) < MIN_LOGIT)
    scores = logits(query, key, visible)
    if problem.soft_cap is not None:
        scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)

    is_empty = ~jnp.any(visible, axis=-1, keepdims=True)
    largest = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    sinks = jnp.full((1, N), -jnp.inf) if operands.sinks is None else operands.sinks
    sinks = sinks.astype(dtype).reshape(1, K, N // K, 1, 1)
    has_sink = sinks != -jnp.inf
    maximum = jnp.maximum(jnp.where(is_empty, 0.0, largest), sinks)
    maximum = jax.lax.stop_gradient(maximum)
    is_empty &= ~has_sink
    # The inner `where` keeps the exponential, and with it the gradient, of a hidden score finite.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - maximum, 0.0)), 0.0)
    of_sink = jnp.where(has_sink, jnp.exp(jnp.where(has_sink, sinks - maximum, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True) + of_sink
    total = jnp.where(is_empty, 1.0, total)
    probabilities, met = weights / total, visible
    if operands.dropout_seeds is not None:
        rows, first = jnp.arange(T, dtype=jnp.int32), jnp.zeros((), jnp.int32)
        seeds, rate, S = operands.dropout_seeds, problem.dropout_rate, key.shape[2]
        kept = _grouped(dropout.kept(seeds, N, rows, first, S, rate), K)
        probabilities, met = jnp.where(kept, probabilities, 0.0) / (1.0 - rate), visible & kept
    out = _over_visible(_OUTPUT, probabilities, value, met)
    out = jnp.where(is_empty, 0.0, out)
    log_sum_exp = jnp.where(is_empty, -jnp.inf, maximum + jnp.log(total))
    out, log_sum_exp = (
        jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(B, T, N, x.shape[-1]) for x in (out, log_sum_exp)
    )
    return out.astype(operands.query.dtype), log_sum_exp[..., 0]


def _floats(
    problem: AttentionProblem, operands: Operands, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, keys = visible_tokens(problem, operands)

    def floats(x: Any, spec: QuantSpec | None, visible: jax.Array | None) -> jax.Array:
        if isinstance(x, QuantizedTensor):
            return x.dequantize(dtype)
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        return (_rounded(wide, spec, visible) if spec else x).astype(dtype)

    query, key, value = map(floats, operands[:3], problem.quantization, (rows, keys, keys))
    return query, key, value


def _visible(problem: AttentionProblem, operands: Operands) -> jax.Array:
    """Which keys each row sees, `[B, N, T, S]`."""
    T, S = operands.query.shape[1], operands.key.shape[1]
    row = jnp.arange(T, dtype=jnp.int32)[None, None, :, None]
    key = jnp.arange(S, dtype=jnp.int32)[None, None, None, :]
    visible = _to_scores(operands, jnp.ones((1, 1, 1, 1), bool))
    mask = operands.mask
    if mask is not None:
        visible &= mask.to_dense() if isinstance(mask, BlockMask) else mask
    if operands.bias is not None and problem.soft_cap is None:
        bias = operands.bias.astype(np.promote_types(operands.bias.dtype, np.float32))
        visible &= ~(bias < MIN_LOGIT)  # NaN is visible
    if operands.segment_ids is not None:
        query_ids, key_ids = operands.segment_ids
        visible &= query_ids[:, None, :, None] == key_ids[:, None, None, :]
    at, key_at = row, key
    if operands.query_offset is not None:
        # As far as this past any sequence, and small enough for a sum.
        offset = jnp.clip(operands.query_offset, -(2**29), 2**29)
        at = row + offset[:, None, None, None]
    if operands.positions is not None:
        at = operands.positions[0][:, None, :, None]
        key_at = operands.positions[1][:, None, None, :]
    if problem.is_causal:
        visible &= key_at <= at
    if problem.local_window is not None:
        left, right = problem.local_window
        visible &= (lowered(at, left) <= key_at) & (lowered(key_at, right) <= at)
    if operands.query_seq_lengths is not None:
        visible &= row < operands.query_seq_lengths[:, None, None, None]
    if operands.key_value_seq_lengths is not None:
        visible &= key < operands.key_value_seq_lengths[:, None, None, None]
    if operands.key_value_mask is not None:
        visible &= operands.key_value_mask[:, None, None, :]
    return visible


def _to_scores(operands: Operands, x: jax.Array) -> jax.Array:
    B, T, N, _ = operands.query.shape
    return jnp.broadcast_to(x, (B, N, T, operands.key.shape[1]))


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    B, N, T, S = x.shape
    return x.reshape(B, kv_heads, N // kv_heads, T, S)


def _over_visible(
    subscripts: str, rows: jax.Array, table: jax.Array, visible: jax.Array
) -> jax.Array:
    """`einsum(subscripts, rows, table)` over visible pairs of a query and a key.

    `table` is `[B, K, S, X]`, and `visible` `[B, K, G, T, S]`. Where a number is not finite, hidden
    pairs are zeros before they are multiplied: a product that is masked afterwards would make
    `0 * NaN` in the gradient. Those terms take `T * S * X` memory.
    """

    def at_once(rows: jax.Array, table: jax.Array) -> jax.Array:
        # Under vmap both branches run: this one must then not see NaN either.
        rows, table = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (rows, table))
        return jnp.einsum(subscripts, rows, table, precision=jax.lax.Precision.HIGHEST)

    @jax.checkpoint
    def term_by_term(rows: jax.Array, table: jax.Array) -> jax.Array:
        axis = -1 if sums_features else -2
        terms = (
            rows[:, :, :, :, None] if sums_features else rows[..., None],
            table[:, :, None, None],
        )
        left, right = (jnp.where(visible[..., None], x, 0.0) for x in terms)
        return jnp.sum(left * right, axis=axis)

    sums_features = subscripts == _SCORES
    all_finite = jnp.all(jnp.isfinite(rows)) & jnp.all(jnp.isfinite(table))
    return cast(Any, jax.lax.cond)(all_finite, at_once, term_by_term, rows, table)
