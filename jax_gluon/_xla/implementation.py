"""The passes in XLA, of float operands and of codes, which are dequantized for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_gluon._operands import quantize_operands
from jax_gluon._pages import in_one_piece
from jax_gluon._problem import (
    AttentionProblem,
    FloatOperands,
    Operands,
    Residuals,
    Tangents,
    compute_dtype,
    log_sum_exp,
    sinks_gradient,
)
from jax_gluon._quantization.formats import QuantizedTensor
from jax_gluon._xla import attention, forward_mode
from jax_gluon._xla.quantize import quantize
from jax_gluon._xla.tiles import Tiling, all_finite

_Result = TypeVar("_Result")


#: Of GPUs: few large products, which P and dP of half a gigabyte each make room for.
GPU = Tiling(rows=2048, keys=2048, scores=2**27, kept=2**27, kept_rows=2048, is_plain=True)


def _float_operands(
    operands: Operands, dtype: DTypeLike, tiling: Tiling | None = None
) -> FloatOperands:
    compute = compute_dtype(dtype) if tiling is None else dtype
    if not any(isinstance(x, QuantizedTensor) for x in operands[:3]):
        return cast(FloatOperands, operands)
    query, key, value = (
        x.dequantize(compute) if isinstance(x, QuantizedTensor) else x.astype(compute)
        for x in (operands.query, operands.key, operands.value)
    )
    return FloatOperands(query, key, value, *operands[3:])


def _tiled(
    tiling: Tiling | None,
    operands: Operands,
    dtype: DTypeLike,
    run: Callable[..., _Result],
    *cotangents: jax.Array,
) -> _Result:
    """`run(floats, tiling)`; with small tiles where an operand or a cotangent is not finite."""
    small = _float_operands(operands, dtype)
    if tiling is None:
        return run(small, None)
    floats = _float_operands(operands, dtype, tiling)
    is_finite = functools.reduce(jnp.logical_and, map(all_finite, (*floats[:3], *cotangents)))
    return cast(Any, jax.lax.cond)(is_finite, lambda: run(floats, tiling), lambda: run(small, None))


def forward(
    problem: AttentionProblem,
    dtype: np.dtype[Any],
    operands: Operands,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, Residuals]:
    operands = quantize_operands(problem, operands, quantize)

    def run(floats: FloatOperands, tiling: Tiling | None) -> tuple[jax.Array, ...]:
        return attention.forward(problem, floats, dtype, tiling)

    out, row_maximum, log_sum = _tiled(tiling, in_one_piece(operands), dtype, run)
    residuals = Residuals(operands, out, row_maximum, log_sum)
    return log_sum_exp(row_maximum, log_sum, operands.sinks, 1.0), residuals


def backward(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def run(floats: FloatOperands, tiling: Tiling | None) -> tuple[jax.Array, ...]:
        differentiate = functools.partial(attention.backward, tiling=tiling)
        return _apply_xla(differentiate, problem, floats, residuals, d_out, d_log_sum_exp)

    dtype = residuals.out.dtype
    d_query, d_key, d_value = _tiled(tiling, residuals.operands, dtype, run, d_out)
    return d_query, d_key, d_value


def backward_bias(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    floats = _float_operands(residuals.operands, residuals.out.dtype)
    return _apply_xla(attention.backward_bias, problem, floats, residuals, d_out, d_log_sum_exp)


def compute_operands(operands: Operands) -> FloatOperands:
    """The operands as floats that sums are made of, codes dequantized."""
    dtype = compute_dtype(operands.query.dtype)
    floats = _float_operands(operands, dtype)
    query, key, value = (x.astype(dtype) for x in floats[:3])
    bias = None if floats.bias is None else floats.bias.astype(dtype)
    return floats._replace(query=query, key=key, value=value, bias=bias)


def tangent(
    problem: AttentionProblem, residuals: Residuals, tangents: Tangents
) -> tuple[jax.Array, jax.Array]:
    """Tangents of the output and of the natural log-sum-exp."""
    operands = _float_operands(residuals.operands, residuals.out.dtype)
    d_out, d_log_sum_exp = forward_mode.tangent(
        problem, residuals._replace(operands=operands), _of_any_values(tangents)
    )
    return d_out.astype(residuals.out.dtype), d_log_sum_exp


def backward_sinks(
    residuals: Residuals, d_out: jax.Array, d_log_sum_exp: jax.Array | None
) -> jax.Array:
    return sinks_gradient(residuals, d_out, d_log_sum_exp, 1.0)


@jax.custom_jvp
def _barrier(x: Any) -> Any:
    return cast(Any, jax.lax.optimization_barrier)(x)


# Older JAX does not differentiate the barrier itself.
@_barrier.defjvp
def _barrier_jvp(primals: Any, tangents: Any) -> Any:
    return _barrier(*primals), tangents[0]


def _of_any_values(x: _Result) -> _Result:
    """The same to all but XLA's simplifier.

    Where a tangent or cotangent is constant, as that of a sum is, it takes sums of transposed rows
    for ones in another layout, on the CPU.
    """
    return cast(_Result, _barrier(x))


def _apply_xla(
    backward: Callable[..., _Result],
    problem: AttentionProblem,
    operands: FloatOperands,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> _Result:
    dtype = operands.query.dtype
    d_out, d_log_sum_exp = _of_any_values((d_out, d_log_sum_exp))
    return backward(
        problem,
        operands,
        residuals.out,
        residuals.row_maximum,
        residuals.log_sum,
        d_out.astype(dtype),
        d_log_sum_exp,
    )
