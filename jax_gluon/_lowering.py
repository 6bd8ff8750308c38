"""From a problem to what runs it: the plugin's custom calls, cuDNN, or the XLA implementation.

Every function here is jitted with the problem static, so that a call outside `jax.jit` compiles
once per problem and shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint

from jax_gluon import _ffi, _native
from jax_gluon._cuda import choice, cudnn, int8
from jax_gluon._derivative_modes import not_differentiated
from jax_gluon._layouts import swapped, swapped_operands, swapped_residuals
from jax_gluon._operands import quantize_operands, with_codes
from jax_gluon._pages import in_one_piece
from jax_gluon._problem import AttentionProblem, Operands, Residuals, Tangents
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from jax_gluon._sharding.partitioned import partitioned
from jax_gluon._sharding.split import (
    KEY,
    LOGITS,
    QUERY,
    ROWS,
    TOKENS,
    WHOLE,
    Split,
    axes_of_operands,
    axes_of_residuals,
    codes_span_devices,
    gradients_of_all,
    own_kv_heads,
    own_operands,
    own_residuals,
    summed,
)
from jax_gluon._xla import implementation as xla
from jax_gluon._xla import quantize as xla_quantize

#: Names, for policies of `jax.checkpoint`, of what forward makes and backward reads: the output;
#: the log-sum-exp and its parts; the codes made of float operands.
OUT_NAME = "jax_gluon.attention_out"
LOG_SUM_EXP_NAME = "jax_gluon.attention_log_sum_exp"
CODES_NAME = "jax_gluon.attention_codes"
CHECKPOINT_NAMES = (OUT_NAME, LOG_SUM_EXP_NAME, CODES_NAME)

_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(*static_argnums: int) -> Callable[[_Function], _Function]:
    """`jax.jit`, inlined into the caller's program, for a function that keeps its type."""

    def decorate(function: _Function) -> _Function:
        return cast(_Function, jax.jit(function, static_argnums=static_argnums, inline=True))

    return decorate


@jit(0, 1)
def quantize(
    spec: QuantSpec, implementation: str | None, x: jax.Array, visible: jax.Array | None
) -> QuantizedTensor:
    """The codes of float `x` `[B, T, N, H]`; `visible` (bool `[B, T]`): tokens that can be seen."""
    if x.dtype == jnp.float64:
        dtype = x.dtype
        quantized = quantize(spec, implementation, x.astype(jnp.float32), visible)
        return dataclasses.replace(quantized, dtype=dtype)
    static = (spec, implementation)
    return partitioned(_quantize, static, (QUERY, TOKENS), QUERY, x, visible)


def _quantize(
    spec: QuantSpec,
    implementation: str | None,
    split: Split,
    x: jax.Array,
    visible: jax.Array | None,
) -> QuantizedTensor:
    def in_plugin(x: jax.Array, visible: jax.Array | None) -> QuantizedTensor:
        return _ffi.quantize(implementation, x, spec, visible)

    def in_xla(x: jax.Array, visible: jax.Array | None) -> QuantizedTensor:
        return xla_quantize.quantize(x, spec, visible, split.batch + split.heads)

    if split != WHOLE and spec.granularity == "tensor":
        # The plugin does not know the extremes of other devices' parts; codes are the same.
        return in_xla(x, visible)
    return on_platform(implementation, in_plugin, in_xla, x, visible)


@jit(0, 1)
def forward(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    """The natural log-sum-exp `[B, T, N]`, and what backward takes, with the output among it.

    The output `[B, T, N, V]` is of `dtype`; the operands are those that were multiplied, codes
    where `problem.quantization` asks for them. The log-sum-exp is left in two parts: a maximum of
    each row's logits, and the logarithm of the sum of their exponentials relative to it; one number
    could not hold the second beside a maximum of -1e9. They are in the base in which the
    implementation has its logits, since a change of base rounds: 2 in the plugin, e in XLA.
    All that the call makes has its name of `CHECKPOINT_NAMES`.
    """
    log_sum_exp, residuals = forward_part(problem, dtype, operands)
    return with_names(problem, swapped(problem, log_sum_exp), swapped_residuals(problem, residuals))


@jit(0, 1)
def forward_part(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    """The same without names, with tokens before heads."""
    operands = swapped_operands(problem, not_differentiated(operands))
    log_sum_exp, codes, out, row_maximum, log_sum = partitioned(
        _forward,
        (problem, dtype),
        (axes_of_operands(operands),),
        (ROWS, [QUERY, KEY, KEY], QUERY, ROWS, ROWS),
        operands,
    )
    return log_sum_exp, Residuals(with_codes(operands, codes), out, row_maximum, log_sum)


def _forward(
    problem: AttentionProblem, dtype: np.dtype[Any], split: Split, operands: Operands
) -> tuple[jax.Array, list[QuantizedTensor | None], jax.Array, jax.Array, jax.Array]:
    left = problem
    if codes_span_devices(problem, split, operands):

        def quantize(x: jax.Array, spec: QuantSpec, visible: jax.Array | None) -> QuantizedTensor:
            return _quantize(spec, problem.implementation, split, x, visible)

        operands = quantize_operands(problem, operands, quantize, split.heads)
        left = dataclasses.replace(problem, quantization=(None, None, None))
    own = own_operands(split, operands)
    log_sum_exp, residuals = on_platform(
        problem.implementation,
        functools.partial(_ffi.forward, left, dtype),
        functools.partial(xla.forward, left, dtype),
        own,
        on_cuda=_on_cuda(
            problem,
            own,
            functools.partial(int8.forward, left, dtype),
            functools.partial(cudnn.forward, left, dtype),
            functools.partial(xla.forward, left, dtype, tiling=xla.GPU),
        ),
    )
    made = operands if left is not problem else residuals.operands
    codes = [
        None if spec is None else cast(QuantizedTensor, x)
        for x, spec in zip(made[:3], problem.quantization, strict=True)
    ]
    return log_sum_exp, codes, residuals.out, residuals.row_maximum, residuals.log_sum


def with_names(
    problem: AttentionProblem, log_sum_exp: jax.Array, residuals: Residuals
) -> tuple[jax.Array, Residuals]:
    """What forward returns, each under its name of `CHECKPOINT_NAMES`."""
    codes = [
        None if spec is None else _named(CODES_NAME, cast(QuantizedTensor, x))
        for x, spec in zip(residuals.operands[:3], problem.quantization, strict=True)
    ]
    log_sum_exp, row_maximum, log_sum = _named(
        LOG_SUM_EXP_NAME, (log_sum_exp, residuals.row_maximum, residuals.log_sum)
    )
    return log_sum_exp, Residuals(
        with_codes(residuals.operands, codes),
        _named(OUT_NAME, residuals.out),
        row_maximum,
        log_sum,
    )


def _named(name: str, tree: _Result) -> _Result:
    # JAX 0.5 names arrays alone, no trees of them.
    return jax.tree.map(
        functools.partial(cast(Any, ad_checkpoint).checkpoint_name, name=name), tree
    )


@jit(0)
def backward(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value (of what its codes stand for), of the output's dtype.

    `d_log_sum_exp` is the cotangent of the natural-log form.
    """
    given = _swapped_cotangents(problem, residuals, d_out, d_log_sum_exp)
    axes, result_axes = (axes_of_residuals(given[0]), QUERY, ROWS), (QUERY, KEY, KEY)
    return swapped(problem, partitioned(_backward, (problem,), axes, result_axes, *given))


def _backward(
    problem: AttentionProblem, split: Split, residuals: Residuals, *cotangents: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    own = own_residuals(split, residuals)
    gradients = on_platform(
        problem.implementation,
        functools.partial(_ffi.backward, problem),
        functools.partial(xla.backward, problem),
        own,
        *cotangents,
        on_cuda=_on_cuda(
            problem,
            own.operands,
            functools.partial(cudnn.backward, problem),
            functools.partial(cudnn.backward, problem),
            functools.partial(xla.backward, problem, tiling=xla.GPU),
        ),
    )
    return gradients_of_all(split, residuals.operands, gradients)


@jit(0)
def backward_bias(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    """Gradient of the bias. A call of its own, so that XLA drops it when nobody asks for it."""
    bias = residuals.operands.bias
    assert bias is not None
    is_shared = bias.shape[0] == 1, bias.shape[1] == 1
    given = _swapped_cotangents(problem, residuals, d_out, d_log_sum_exp)
    axes = axes_of_residuals(given[0]), QUERY, ROWS
    return partitioned(_backward_bias, (problem, is_shared), axes, LOGITS, *given)


def _backward_bias(
    problem: AttentionProblem,
    is_shared: tuple[bool, bool],
    split: Split,
    residuals: Residuals,
    *cotangents: jax.Array | None,
) -> jax.Array:
    gradient = on_platform(
        problem.implementation,
        functools.partial(_ffi.backward_bias, problem),
        functools.partial(xla.backward_bias, problem),
        own_residuals(split, residuals),
        *cotangents,
    )
    by_batch, by_head = is_shared
    return summed(gradient, split.batch * by_batch + split.heads * by_head)


@jit(0)
def backward_sinks(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    """Gradient of the sinks, which takes no kernel."""
    return on_platform(
        problem.implementation,
        _ffi.backward_sinks,
        xla.backward_sinks,
        *_swapped_cotangents(problem, residuals, d_out, d_log_sum_exp),
    )


def _swapped_cotangents(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[Residuals, jax.Array, jax.Array | None]:
    residuals, d_out, d_log_sum_exp = not_differentiated((residuals, d_out, d_log_sum_exp))
    residuals = residuals._replace(operands=in_one_piece(residuals.operands))
    return swapped_residuals(problem, residuals), *swapped(problem, (d_out, d_log_sum_exp))


@jit(0)
def tangent(
    problem: AttentionProblem,
    log_sum_exp: jax.Array,
    residuals: Residuals,
    tangents: Tangents,
) -> tuple[jax.Array, Residuals, jax.Array, jax.Array]:
    """What forward keeps, and tangents of the output and of the natural log-sum-exp.

    `tangents` are those of query, key and value (of what codes stand for), bias and sinks; None:
    zero. The plugin computes anew what forward kept, in the same pass.
    """
    axes = ROWS, axes_of_residuals(residuals), axes_of_operands(tangents)
    log_sum_exp, kept, d_out, d_log_sum_exp = partitioned(
        _tangent,
        (problem,),
        axes,
        (ROWS, (QUERY, ROWS, ROWS), QUERY, ROWS),
        log_sum_exp,
        residuals,
        tangents,
    )
    return log_sum_exp, Residuals(residuals.operands, *kept), d_out, d_log_sum_exp


def _tangent(
    problem: AttentionProblem,
    split: Split,
    log_sum_exp: jax.Array,
    residuals: Residuals,
    tangents: Tangents,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array]:
    def in_plugin(log_sum_exp: jax.Array, residuals: Residuals, tangents: Tangents) -> Any:
        return _ffi.tangent(problem, residuals.out.dtype, residuals.operands, tangents)

    def in_xla(log_sum_exp: jax.Array, residuals: Residuals, tangents: Tangents) -> Any:
        return log_sum_exp, residuals, *xla.tangent(problem, residuals, tangents)

    own = own_residuals(split, residuals), own_kv_heads(split, residuals.operands, tangents)
    log_sum_exp, kept, d_out, d_log_sum_exp = on_platform(
        problem.implementation, in_plugin, in_xla, log_sum_exp, *own
    )
    kept = kept.out, kept.row_maximum, kept.log_sum
    return log_sum_exp, kept, d_out, d_log_sum_exp


def _on_cuda(
    problem: AttentionProblem,
    operands: Operands,
    in_pallas: _Function,
    in_cudnn: _Function,
    in_xla: _Function,
) -> _Function | None:
    """What runs on NVIDIA GPUs; None where programs can't get there, or are kept from it.

    `in_xla` are the large tiles of XLA's implementation.
    """
    implementation = problem.implementation
    if implementation in ("cpu", "metal"):
        return None
    if implementation in (None, "xla") and cudnn.missing():
        return None
    if implementation is None:
        implementation = choice.chosen(problem, operands)[0]
    return {"pallas": in_pallas, "cudnn": in_cudnn, "xla": in_xla}[implementation]


def on_platform(
    implementation: str | None,
    native: Callable[..., _Result],
    in_xla: Callable[..., _Result],
    *operands: Any,
    on_cuda: Callable[..., _Result] | None = None,
) -> _Result:
    """`native` where the plugin runs, cuDNN's or XLA's function where they do."""
    if implementation in ("cudnn", "pallas"):
        return (on_cuda or in_xla)(*operands)
    if implementation not in ("xla", None):
        _native.plugin()
        return native(*operands)
    platforms = {} if on_cuda is None else {"cuda": on_cuda}
    # Where programs run elsewhere by default, nobody misses the plugin.
    if implementation is None and (jax.default_backend() == "cpu" or _native.has_plugin()):
        _native.plugin()
        platforms["cpu"] = native
    if not platforms:
        return in_xla(*operands)
    return cast(_Result, jax.lax.platform_dependent(*operands, default=in_xla, **platforms))
