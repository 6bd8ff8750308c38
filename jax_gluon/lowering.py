"""From a problem to what runs it: the plugin's XLA FFI calls, or the XLA implementation.

Every function here is jitted with the problem static, so that a call outside `jax.jit` compiles
once per problem and shape.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_gluon import quantization, xla
from jax_gluon.problem import AttentionOperands, AttentionProblem
from jax_gluon.quantization import QuantizedOperands, QuantizedRows

Operands = AttentionOperands | QuantizedOperands


class Residuals(NamedTuple):
    """What forward leaves for backward; `log_sum_exp` is the base-2 form that `forward` returns."""

    operands: Operands
    out: jax.Array
    log_sum_exp: jax.Array


_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_ATTENTION_FORWARD = "jax_gluon.attention_forward"
_ATTENTION_BACKWARD = "jax_gluon.attention_backward"
_ATTENTION_BACKWARD_BIAS = "jax_gluon.attention_backward_bias"
_QUANTIZE = "jax_gluon.quantize"


def jit(*static_argnums: int) -> Callable[[_Function], _Function]:
    """`jax.jit`, inlined into the caller's program, for a function that keeps its type."""

    def decorate(function: _Function) -> _Function:
        return cast(_Function, jax.jit(function, static_argnums=static_argnums, inline=True))

    return decorate


def compute_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """What operands of `dtype` are computed in: float64 for float64, else float32."""
    return np.dtype(np.float64 if dtype == jnp.float64 else np.float32)


@functools.cache
def plugin() -> ModuleType:
    """The compiled plugin, its custom calls registered for JAX's CPU platform.

    **Raises:** `ImportError` where the module is missing or does not load.
    """
    try:
        module: Any = importlib.import_module("jax_gluon._plugin")
    except ImportError as error:
        raise ImportError(
            "jax_gluon's compiled plugin can't be imported, so attention can only run with "
            'implementation="xla". Install jax-gluon from a wheel, or build it with '
            f'"pip install ." in its repository. The cause: {error}'
        ) from error
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module


def register() -> None:
    """Register the custom calls; a missing plugin is reported by the first call that needs it."""
    with contextlib.suppress(ImportError):
        plugin()


@jit(0)
def quantize(problem: AttentionProblem, operands: AttentionOperands) -> QuantizedOperands:
    """The INT8 codes of query, key (centred) and value."""

    def rows(x: jax.Array, center: bool, lengths: jax.Array | None) -> QuantizedRows:
        return _on_platform(
            problem,
            functools.partial(_quantize_cpu, center=center),
            functools.partial(_quantize_xla, center=center),
            x,
            lengths,
        )

    return QuantizedOperands(
        rows(operands.query, False, None),
        rows(operands.key, True, operands.key_value_seq_lengths),
        rows(operands.value, False, None),
        *operands[3:],
    )


@jit(0, 1)
def forward(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """Output `[B, T, N, V]` of `dtype`, and the base-2 log-sum-exp `[B, T, N]` of each row."""
    return _on_platform(
        problem,
        functools.partial(_forward_cpu, problem, dtype),
        functools.partial(_forward_xla, problem, dtype),
        operands,
    )


@jit(0)
def backward(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, of the dtype of the output.

    `d_log_sum_exp` is the cotangent of the natural-log form.
    """
    return _on_platform(
        problem,
        functools.partial(_backward_cpu, problem),
        functools.partial(_backward_xla, problem),
        residuals,
        d_out,
        d_log_sum_exp,
    )


@jit(0)
def backward_bias(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    """Gradient of the bias. A call of its own, so that XLA drops it when nobody asks for it."""
    return _on_platform(
        problem,
        functools.partial(_backward_bias_cpu, problem),
        functools.partial(_backward_bias_xla, problem),
        residuals,
        d_out,
        d_log_sum_exp,
    )


def _on_platform(
    problem: AttentionProblem,
    cpu: Callable[..., _Result],
    xla: Callable[..., _Result],
    *operands: Any,
) -> _Result:
    if problem.implementation == "xla":
        return xla(*operands)
    plugin()
    if problem.implementation == "cpu":
        return cpu(*operands)
    return cast(_Result, jax.lax.platform_dependent(*operands, cpu=cpu, default=xla))


# The plugin. Its handlers take the leading axes that vmap adds, of extent 1 where an operand is not
# mapped, so nothing is copied to broadcast it.


def _ffi_call(target: str, results: Any) -> Callable[..., Any]:
    return cast(Any, jax.ffi.ffi_call(target, results, vmap_method="expand_dims"))


def _attributes(problem: AttentionProblem, operands: Operands) -> dict[str, Any]:
    left, right = problem.local_window or (-1, -1)
    return {
        "scale": np.float32(problem.scale),
        "soft_cap": np.float32(problem.soft_cap or 0.0),
        "causal": np.int64(problem.is_causal),
        "window_left": np.int64(left),
        "window_right": np.int64(right),
        "has_bias": np.int64(operands.bias is not None),
        "has_mask": np.int64(operands.mask is not None),
        "has_query_seq_lengths": np.int64(operands.query_seq_lengths is not None),
        "has_key_value_seq_lengths": np.int64(operands.key_value_seq_lengths is not None),
        "quantized": np.int64(isinstance(operands, QuantizedOperands)),
    }


def _arguments(operands: Operands) -> list[jax.Array]:
    if isinstance(operands, QuantizedOperands):
        query, key, value = operands.query, operands.key, operands.value
        arrays = [query.data, key.data, value.data, query.scale, key.scale, value.scale, key.mean]
    else:
        arrays = [operands.query, operands.key, operands.value]
    optional = (
        operands.bias,
        operands.mask,
        operands.query_seq_lengths,
        operands.key_value_seq_lengths,
    )
    return [array for array in (*arrays, *optional) if array is not None]


def _row_shapes(operands: Operands) -> list[tuple[int, ...]]:
    """Shapes of query, key and value."""
    if isinstance(operands, QuantizedOperands):
        return [rows.data.shape for rows in operands[:3]]
    return [array.shape for array in operands[:3]]


def _forward_cpu(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    query, _, value = _row_shapes(operands)
    results = (
        jax.ShapeDtypeStruct((*query[:-1], value[-1]), dtype),
        jax.ShapeDtypeStruct(query[:-1], jnp.float32),
    )
    out, log_sum_exp = _ffi_call(_ATTENTION_FORWARD, results)(
        *_arguments(operands), **_attributes(problem, operands)
    )
    return out, log_sum_exp


def _backward_call(
    target: str,
    results: Any,
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> Any:
    operands, out, log_sum_exp = residuals
    cotangents = [d_out] if d_log_sum_exp is None else [d_out, d_log_sum_exp]
    return _ffi_call(target, results)(
        *_arguments(operands),
        out,
        log_sum_exp,
        *cotangents,
        **_attributes(problem, operands),
        has_d_log_sum_exp=np.int64(d_log_sum_exp is not None),
    )


def _backward_cpu(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype = residuals.out.dtype
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape in _row_shapes(residuals.operands)]
    d_query, d_key, d_value = _backward_call(
        _ATTENTION_BACKWARD, results, problem, residuals, d_out, d_log_sum_exp
    )
    return d_query, d_key, d_value


def _backward_bias_cpu(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    bias = residuals.operands.bias
    assert bias is not None
    result = jax.ShapeDtypeStruct(bias.shape, bias.dtype)
    return _backward_call(
        _ATTENTION_BACKWARD_BIAS, result, problem, residuals, d_out, d_log_sum_exp
    )


def _quantize_cpu(x: jax.Array, lengths: jax.Array | None, *, center: bool) -> QuantizedRows:
    results = [
        jax.ShapeDtypeStruct(x.shape, jnp.int8),
        jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32),
    ]
    if center:
        results.append(jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[2:]), jnp.float32))
    rows = _ffi_call(_QUANTIZE, results)(
        *([x] if lengths is None else [x, lengths]),
        center=np.int64(center),
        has_lengths=np.int64(lengths is not None),
    )
    return QuantizedRows(*rows)


# The XLA implementation sees float operands only: INT8 codes are dequantized for it.


def _float_operands(operands: Operands, dtype: DTypeLike) -> AttentionOperands:
    if isinstance(operands, QuantizedOperands):
        return operands.dequantize(compute_dtype(dtype))
    return operands


def _quantize_xla(x: jax.Array, lengths: jax.Array | None, *, center: bool) -> QuantizedRows:
    return quantization.quantize_rows(x, center=center, lengths=lengths)


def _forward_xla(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, jax.Array]:
    out, log_sum_exp = xla.forward(problem, _float_operands(operands, dtype))
    return out.astype(dtype), log_sum_exp


def _backward_xla(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    gradients = _apply_xla(xla.backward, problem, residuals, d_out, d_log_sum_exp)
    d_query, d_key, d_value = (gradient.astype(residuals.out.dtype) for gradient in gradients)
    return d_query, d_key, d_value


def _backward_bias_xla(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    return _apply_xla(xla.backward_bias, problem, residuals, d_out, d_log_sum_exp)


def _apply_xla(
    backward: Callable[..., _Result],
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> _Result:
    operands = _float_operands(residuals.operands, residuals.out.dtype)
    dtype = operands.query.dtype
    return backward(
        problem,
        operands,
        residuals.out.astype(dtype),
        residuals.log_sum_exp,
        d_out.astype(dtype),
        d_log_sum_exp,
    )
