"""Attention under `jax.custom_vjp`: derivatives in reverse mode, of the first order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax

from jax_gluon import _lowering
from jax_gluon._problem import AttentionOperands, AttentionProblem, Operands, Residuals
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec

# The log-sum-exp is an output of both forms, for the residual; only where the static flag is set
# does its cotangent reach the backward call.


def _primal(
    problem: AttentionProblem, differentiates_log_sum_exp: bool, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    return _forward(problem, differentiates_log_sum_exp, operands)[0]


def _forward(
    problem: AttentionProblem, differentiates_log_sum_exp: bool, operands: Operands
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    del differentiates_log_sum_exp
    log_sum_exp, residuals = _lowering.forward(problem, operands.query.dtype, operands)
    return (residuals.out, log_sum_exp), residuals


def _backward(
    problem: AttentionProblem,
    differentiates_log_sum_exp: bool,
    residuals: Residuals,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Any]:
    d_out, d_natural = cotangents
    d_log_sum_exp = d_natural if differentiates_log_sum_exp else None
    gradients = _lowering.backward(problem, residuals, d_out, d_log_sum_exp)

    def of(
        x: jax.Array | QuantizedTensor, spec: QuantSpec | None, gradient: jax.Array
    ) -> jax.Array | None:
        # None, which is zero, for operands that came as codes.
        is_given = isinstance(x, QuantizedTensor) and spec is None
        return None if is_given else gradient.astype(x.dtype)

    d_query, d_key, d_value = map(of, residuals.operands[:3], problem.quantization, gradients)
    d_bias = d_sinks = None
    if residuals.operands.bias is not None:
        d_bias = _lowering.backward_bias(problem, residuals, d_out, d_log_sum_exp)
    if residuals.operands.sinks is not None:
        d_sinks = _lowering.backward_sinks(problem, residuals, d_out, d_log_sum_exp)
    return (cast(Any, AttentionOperands)(d_query, d_key, d_value, d_bias, sinks=d_sinks),)


_with_gradient = cast(Any, jax.custom_vjp(_primal, nondiff_argnums=(0, 1)))
_with_gradient.defvjp(_forward, _backward)
attend = cast(
    Callable[[AttentionProblem, bool, Operands], tuple[jax.Array, jax.Array]],
    _with_gradient,
)
