"""The passes by cuDNN's fused kernels, through JAX's own calls of them.

cuDNN keeps one number for each row, the natural log-sum-exp in float32, so that what forward keeps
here and in XLA's implementation is alike: either's backward may follow either's forward.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._cuda import quantizer
from jax_gluon._dimensions import is_static
from jax_gluon._layouts import swapped
from jax_gluon._operands import quantize_operands
from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    AttentionProblem,
    Operands,
    Residuals,
    log_sum_exp,
)
from jax_gluon._quantization.formats import QuantizedTensor
from jax_gluon._xla import implementation as xla

# `jax.nn.dot_product_attention` rounds the log-sum-exp to the operands' 16 bits.
try:
    from jax._src.cudnn import fused_attention_stablehlo as _calls
except ImportError:  # pragma: no cover - a JAX that has moved them
    _calls: Any = None

_FLOATS = ("bfloat16", "float16")
_HEAD_DIM_STEP = 8
_LEAST_CAPABILITY = "8.0"


def missing() -> str | None:
    """Why JAX has no cuDNN here, or None."""
    if (
        _calls is None
        or "return_residual" not in inspect.signature(_calls.dot_product_attention).parameters
    ):
        return f"JAX {jax.__version__} has no call of cuDNN that returns the log-sum-exp"
    try:
        version = _calls.check_cudnn_version()
    except RuntimeError as error:
        return f"JAX finds no cuDNN ({error})"
    if jax.default_backend() == "gpu":
        if not _calls.check_compute_capability(_LEAST_CAPABILITY):
            return f"cuDNN's fused kernels need compute capability {_LEAST_CAPABILITY}"
        if version < 91100 and _calls.check_compute_capability("10.3"):
            return "on this GPU cuDNN's fused kernels need cuDNN 9.11"
    return None


def refusal(problem: AttentionProblem, operands: Operands) -> str | None:
    """Why cuDNN does not take a problem, or None.

    Taken is what it computes as this library defines it, and without a dense mask.
    """
    dtype = dtype_of(operands)
    T, H = operands.query.shape[1], operands.query.shape[-1]
    S, V = operands.value.shape[1], operands.value.shape[-1]
    if dtype.name not in _FLOATS:
        return f"cuDNN takes {' and '.join(_FLOATS)}, not {dtype.name}"
    if not is_static(*operands.query.shape, *operands.key.shape):
        return "cuDNN takes no symbolic extents"
    widest = _max_head_dim()
    if H != V or H % _HEAD_DIM_STEP or widest < H:
        return f"cuDNN takes head dims to {widest} that {_HEAD_DIM_STEP} divides, not {H} and {V}"
    for name in (
        "mask", "key_value_mask", "query_offset", "segment_ids", "positions", "sinks",
    ):  # fmt: skip
        if getattr(operands, name) is not None:
            return f"cuDNN takes no {name} as it is meant here"
    if operands.dropout_seeds is not None:
        return "cuDNN's dropout drops other elements"
    if problem.soft_cap is not None:
        return "cuDNN has no soft cap"
    if problem.scale <= 0:
        return f"cuDNN takes a positive scale, not {problem.scale}"
    if problem.local_window is not None and (not _is_left_window(problem) or T > S):
        return "cuDNN takes windows to the left of causal rows alone, at most as many as keys"
    if (bias := operands.bias) is not None:
        if bias.dtype != dtype or bias.shape[2:] != (T, S):
            found = f"{bias.dtype.name}{list(bias.shape)}"
            return f"cuDNN takes a bias {dtype.name}[b, n, {T}, {S}], not {found}"
        if T % 2 or S % 2:
            return "cuDNN takes a bias of even extents alone"
    return None


def forward(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    operands = quantize_operands(problem, operands, quantizer.quantize)
    out, row_maximum = _attend(problem, operands.bias, *_arrays(problem, operands))
    out = swapped(problem, out.astype(dtype))
    row_maximum = jnp.swapaxes(row_maximum, 1, 2)
    log_sum = jnp.zeros_like(row_maximum)
    if (is_empty := _empty_rows(problem, operands, row_maximum)) is not None:
        out = jnp.where(is_empty[..., None], jnp.zeros_like(out), out)
        row_maximum = jnp.where(is_empty, 0.0, row_maximum)
        log_sum = jnp.where(is_empty, EMPTY_ROW_LOG_SUM_EXP, log_sum)
    residuals = Residuals(operands, out, row_maximum, log_sum)
    return log_sum_exp(row_maximum, log_sum, None, 1.0), residuals


def backward(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # cuDNN's has none, and makes D of the output: of all keys, where these are a part of them.
    if d_log_sum_exp is not None and not problem.is_partial:
        return xla.backward(problem, residuals, d_out, d_log_sum_exp, xla.GPU)
    operands, out, row_maximum, log_sum = residuals
    dtype, wide = dtype_of(operands), out.dtype
    out, d_out = out.astype(dtype), d_out.astype(dtype)
    T, S = operands.query.shape[1], operands.key.shape[1]
    is_empty = log_sum == EMPTY_ROW_LOG_SUM_EXP
    d_out = jnp.where(is_empty[..., None], jnp.zeros_like(d_out), d_out)
    # (XLA's forward keeps a sum beside the maximum.)
    statistics = jnp.where(is_empty, 0.0, row_maximum + log_sum)
    given = _arrays(problem, operands, is_backward=True)
    out, d_out, statistics = (_of_even_extent(x) for x in (out, d_out, statistics))
    statistics = jnp.swapaxes(statistics, 1, 2)
    attend = functools.partial(_attend, problem, operands.bias)
    kept, differentiate = cast(Any, jax.vjp)(attend, *given)
    differentiate = _replaced(differentiate, kept, (swapped(problem, out), statistics))
    gradients = differentiate((swapped(problem, d_out), jnp.zeros_like(statistics)))
    d_query, d_key, d_value = (x.astype(wide) for x in swapped(problem, tuple(gradients[:3])))
    return d_query[:, :T], d_key[:, :S], d_value[:, :S]


def dtype_of(operands: Operands) -> np.dtype[Any]:
    """Of float operands, and of what codes stand for; the output may be of a wider one."""
    return np.dtype(operands.query.dtype)


class _Arrays(NamedTuple):
    """What cuDNN is given, in the problem's layout."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    query_seq_lengths: jax.Array | None
    key_value_seq_lengths: jax.Array | None


def _arrays(
    problem: AttentionProblem,
    operands: Operands,
    is_backward: bool = False,
) -> _Arrays:
    """Codes are floats to cuDNN. Its backward takes even numbers of tokens alone."""
    dtype = dtype_of(operands)
    floats = [
        x.dequantize(dtype) if isinstance(x, QuantizedTensor) else x.astype(dtype)
        for x in operands[:3]
    ]
    lengths = (operands.query_seq_lengths, operands.key_value_seq_lengths)
    # It multiplies what is hidden by 0.
    floats = [
        x if length is None else jnp.where(_within(length, x.shape[1]), x, jnp.zeros_like(x))
        for x, length in zip(floats, (lengths[0], lengths[1], lengths[1]), strict=True)
    ]
    extents = floats[0].shape[1], floats[1].shape[1]
    is_padded = is_backward and any(extent % 2 for extent in extents)
    if is_padded:
        floats = [_of_even_extent(x) for x in floats]
    query, key, value = swapped(problem, tuple(floats))
    if lengths == (None, None) and not is_padded:
        return _Arrays(query, key, value, None, None)
    B = floats[0].shape[0]
    of_queries, of_keys = (
        jnp.full((B,), most, jnp.int32) if x is None else jnp.clip(x, 0, most)
        for x, most in zip(lengths, extents, strict=True)
    )
    return _Arrays(query, key, value, of_queries, of_keys)


def _within(lengths: jax.Array, extent: int) -> jax.Array:
    """Which tokens are, `[B, T, 1, 1]`."""
    return (jnp.arange(extent, dtype=jnp.int32) < lengths[:, None])[..., None, None]


def _of_even_extent(x: jax.Array) -> jax.Array:
    """With a token of zeros more where their number is odd."""
    pads = [(0, x.shape[axis] % 2 if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, pads)


def _attend(
    problem: AttentionProblem,
    bias: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_seq_lengths: jax.Array | None,
    key_value_seq_lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Output in the problem's layout, and the natural log-sum-exp `[B, N, T]`."""
    kinds = _calls.MaskType
    is_causal = problem.is_causal or problem.local_window is not None
    if query_seq_lengths is None:
        mask = kinds.CAUSAL if is_causal else kinds.NO_MASK
    else:
        mask = kinds.PADDING_CAUSAL if is_causal else kinds.PADDING
    window = None
    T = query.shape[2 if problem.layout == "BNTH" else 1]
    if problem.local_window is not None and problem.local_window[0] < T - 1:
        window = problem.local_window[0] + 1  # itself among them
    return _calls.dot_product_attention(
        query,
        key,
        value,
        bias,
        None,
        query_seq_lengths,
        key_value_seq_lengths,
        scale=problem.scale,
        mask_type=mask,
        qkv_layout=problem.layout,
        sliding_window_length=window,
        return_residual=True,
    )


def _max_head_dim() -> int:
    return 256 if _calls.check_compute_capability("9.0") else 128


def _replaced(differentiate: Any, computed: tuple[Any, ...], kept: tuple[Any, ...]) -> Any:
    """The transposed function, which keeps what forward made, with what an earlier call made.

    Forward is then computed for nobody, and XLA drops it. Were the results not among what is
    kept, it would run twice, and the gradient would be the same.
    """
    leaves, structure = cast(tuple[list[Any], Any], jax.tree.flatten(differentiate))
    by_identity = {id(x): y for x, y in zip(computed, kept, strict=True)}
    return jax.tree.unflatten(structure, [by_identity.get(id(x), x) for x in leaves])


def _is_left_window(problem: AttentionProblem) -> bool:
    assert problem.local_window is not None
    return problem.is_causal or problem.local_window[1] == 0


def _empty_rows(
    problem: AttentionProblem, operands: Operands, statistics: jax.Array
) -> jax.Array | None:
    """Which rows `[B, T, N]` see no key; None where each sees one."""
    B, T, N, _ = operands.query.shape
    S = operands.key.shape[1]
    is_causal = problem.is_causal or problem.local_window is not None
    left = T if problem.local_window is None else problem.local_window[0]
    lengths = operands.query_seq_lengths, operands.key_value_seq_lengths
    is_empty = None
    if any(x is not None for x in lengths):
        row = jnp.arange(T, dtype=jnp.int32)[None, :]
        end = jnp.full((B, 1), S, jnp.int32)
        if lengths[1] is not None:
            end = jnp.clip(lengths[1], 0, S)[:, None]
        if is_causal:
            end = jnp.minimum(end, row + 1)
        is_empty = end <= jnp.maximum(row - left, 0)
        if lengths[0] is not None:
            is_empty |= row >= lengths[0][:, None]
        is_empty = jnp.broadcast_to(is_empty[..., None], (B, T, N))
    if operands.bias is not None:  # an infinite one may hide all keys of a row
        hidden = statistics < 0.5 * EMPTY_ROW_LOG_SUM_EXP
        is_empty = hidden if is_empty is None else is_empty | hidden
    return is_empty
