"""From a problem to what runs it: the plugin's XLA FFI calls, or the XLA implementation.

Every function here is jitted with the problem static, so that a call outside `jax.jit` compiles
once per problem and shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint
from jax.typing import DTypeLike

from jax_gluon import xla, xla_quantize
from jax_gluon.formats import AttentionQuantization, QuantizedTensor, QuantSpec, rotation
from jax_gluon.meshes import vary_like
from jax_gluon.problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    AttentionProblem,
    FloatOperands,
    Kernels,
    Operands,
)
from jax_gluon.visible_tokens import visible_tokens


class Residuals(NamedTuple):
    """What forward leaves for backward; the last two are the parts that `forward` returns."""

    operands: Operands
    out: jax.Array
    row_maximum: jax.Array
    log_sum: jax.Array


#: Names, for policies of `jax.checkpoint`, of what forward makes and backward reads: the output;
#: the log-sum-exp and its parts; the codes made of float operands.
OUT_NAME = "jax_gluon.attention_out"
LOG_SUM_EXP_NAME = "jax_gluon.attention_log_sum_exp"
CODES_NAME = "jax_gluon.attention_codes"
CHECKPOINT_NAMES = (OUT_NAME, LOG_SUM_EXP_NAME, CODES_NAME)

_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_ATTENTION_FORWARD = "jax_gluon.attention_forward"
_ATTENTION_BACKWARD = "jax_gluon.attention_backward"
_ATTENTION_BACKWARD_BIAS = "jax_gluon.attention_backward_bias"
_QUANTIZE = "jax_gluon.quantize"
# The calls' attribute `device`; None lets the plugin choose by the size of the problem.
_DEVICES = {"cpu": np.int64(0), "metal": np.int64(1), None: np.int64(2)}


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


def has_plugin() -> bool:
    """Whether the compiled plugin is there."""
    try:
        plugin()
    except ImportError:
        return False
    return True


def metal_device() -> tuple[str, str]:
    """Name of the Metal device, or "" and why there is none."""
    try:
        return plugin().metal_device()
    except ImportError as error:
        return "", str(error)


def register() -> None:
    """Register the custom calls; a missing plugin is reported by the first call that needs it."""
    with contextlib.suppress(ImportError):
        plugin()


@jit(0, 1)
def quantize(
    spec: QuantSpec, implementation: str | None, x: jax.Array, visible: jax.Array | None
) -> QuantizedTensor:
    """The codes of float `x` `[B, T, N, H]`; `visible` (bool `[B, T]`): tokens that can be seen."""
    if x.dtype == jnp.float64:
        dtype = x.dtype
        quantized = quantize(spec, implementation, x.astype(jnp.float32), visible)
        return dataclasses.replace(quantized, dtype=dtype)
    return _on_platform(
        implementation,
        functools.partial(_quantize_plugin, spec, implementation),
        functools.partial(_quantize_xla, spec),
        x,
        visible,
    )


def _quantize_operands(
    problem: AttentionProblem, implementation: str, operands: Operands
) -> Operands:
    """The operands with those that `problem.quantization` names as codes.

    Codes know nothing of hidden tokens; a `QuantizedTensor` stays what it is.
    """
    query_spec, key_spec, value_spec = specs = _specs(problem, operands)
    if not any(specs):
        return operands
    query_visible, key_value_visible = visible_tokens(problem, operands)

    def codes(x: Any, spec: QuantSpec | None, visible: jax.Array | None) -> Any:
        return x if spec is None else quantize(spec, implementation, x, visible)

    return operands._replace(
        query=codes(operands.query, query_spec, query_visible),
        key=codes(operands.key, key_spec, key_value_visible),
        value=codes(operands.value, value_spec, key_value_visible),
    )


def _specs(problem: AttentionProblem, operands: Operands) -> list[QuantSpec | None]:
    """How query, key and value are to be quantized; None where they stay what they are."""
    specs = problem.quantization or AttentionQuantization()
    return [
        None if isinstance(x, QuantizedTensor) else spec
        for x, spec in zip(operands[:3], (specs.query, specs.key, specs.value), strict=True)
    ]


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
    log_sum_exp, residuals = _on_platform(
        problem.implementation,
        functools.partial(_forward_plugin, problem, dtype),
        functools.partial(_forward_xla, problem, dtype),
        operands,
    )
    codes = [
        None if spec is None else _named(CODES_NAME, cast(QuantizedTensor, x))
        for x, spec in zip(residuals.operands[:3], _specs(problem, operands), strict=True)
    ]
    log_sum_exp, row_maximum, log_sum = _named(
        LOG_SUM_EXP_NAME, (log_sum_exp, residuals.row_maximum, residuals.log_sum)
    )
    return log_sum_exp, Residuals(
        _with_codes(residuals.operands, codes),
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
    return _on_platform(
        problem.implementation,
        functools.partial(_backward_plugin, problem),
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
        problem.implementation,
        functools.partial(_backward_bias_plugin, problem),
        functools.partial(_backward_bias_xla, problem),
        residuals,
        d_out,
        d_log_sum_exp,
    )


def _on_platform(
    implementation: str | None,
    native: Callable[..., _Result],
    xla: Callable[..., _Result],
    *operands: Any,
) -> _Result:
    if implementation == "xla":
        return xla(*operands)
    plugin()
    if implementation is not None:
        return native(*operands)
    return cast(_Result, jax.lax.platform_dependent(*operands, cpu=native, default=xla))


# The plugin. Its handlers take the leading axes that vmap adds, of extent 1 where an operand is not
# mapped, so nothing is copied to broadcast it.


def _ffi_call(target: str, results: Any) -> Callable[..., Any]:
    call = cast(Any, jax.ffi.ffi_call(target, results, vmap_method="expand_dims"))

    def varying(*operands: Any, **attributes: Any) -> Any:
        # JAX takes the call's results for the same on all devices of a `shard_map`.
        return vary_like(operands, call(*operands, **attributes))

    return varying


def _attributes(problem: AttentionProblem, kernels: Kernels, operands: Operands) -> dict[str, Any]:
    left, right = problem.local_window or (-1, -1)
    return {
        "device": _DEVICES[problem.implementation],
        "cpu_pipeline": np.int64(kernels.cpu.pipeline == "gluon"),
        "cpu_block_k": np.int64(kernels.cpu.block_k),
        "cpu_subtile": np.int64(kernels.cpu.subtile),
        "cpu_stages": np.int64(kernels.cpu.stages),
        "metal_pipeline": np.int64(kernels.metal.pipeline == "gluon"),
        "scale": np.float32(problem.scale),
        "soft_cap": np.float32(problem.soft_cap or 0.0),
        "causal": np.int64(problem.is_causal),
        "window_left": np.int64(left),
        "window_right": np.int64(right),
        "has_bias": np.int64(operands.bias is not None),
        "has_mask": np.int64(operands.mask is not None),
        "has_query_seq_lengths": np.int64(operands.query_seq_lengths is not None),
        "has_key_value_seq_lengths": np.int64(operands.key_value_seq_lengths is not None),
        "has_query_offset": np.int64(operands.query_offset is not None),
        **_format_attributes("query", operands.query),
        **_format_attributes("key", operands.key),
        **_format_attributes("value", operands.value),
    }


def _format_attributes(name: str, x: jax.Array | QuantizedTensor) -> dict[str, np.int64]:
    """How the handler reads operand `name`: bits 0 is float; block 0 is the whole axis."""
    is_quantized = isinstance(x, QuantizedTensor)
    offset = 0 if not is_quantized else 1 if x.zero_point is not None else 2 * x.spec.float_minimum
    return {
        f"{name}_bits": np.int64(x.spec.bits if is_quantized else 0),
        f"{name}_token_block": np.int64(x.spec.token_block if is_quantized else 0),
        f"{name}_head_block": np.int64(x.spec.head_block if is_quantized else 0),
        f"{name}_offset": np.int64(offset),
        f"{name}_has_mean": np.int64(is_quantized and x.mean is not None),
    }


def _arguments(operands: Operands) -> list[jax.Array]:
    # The leaves of a QuantizedTensor are data, scale, zero point or minimum, mean.
    return jax.tree.leaves(operands)


def _unrotated(operands: Operands) -> Operands:
    """Operands that the kernels can multiply as they are.

    They know nothing of rotations: query and key that are both rotated keep their product; else the
    rotated one is dequantized.
    """

    def is_rotated(x: jax.Array | QuantizedTensor) -> bool:
        return isinstance(x, QuantizedTensor) and x.spec.rotate

    def plain(x: jax.Array | QuantizedTensor) -> jax.Array | QuantizedTensor:
        return x.dequantize(jnp.float32) if isinstance(x, QuantizedTensor) and is_rotated(x) else x

    query, key, value = operands[:3]
    if not (is_rotated(query) and is_rotated(key)):
        query, key = plain(query), plain(key)
    return operands._replace(query=query, key=key, value=plain(value))


def _log_sum_exp(row_maximum: jax.Array, log_sum: jax.Array, unit: float) -> jax.Array:
    """The natural log-sum-exp of parts in multiples of `unit`; finite where a row sees no key."""
    empty = jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, log_sum.dtype)
    natural = (row_maximum + log_sum) * jnp.asarray(unit, log_sum.dtype)
    return jnp.where(log_sum == empty, empty, natural)


def _makes_codes(problem: AttentionProblem) -> bool:
    """Whether the forward call quantizes too: one command buffer instead of up to four.

    Codes of an operand that vmap does not map are then copied to each entry, so the CPU, which
    gains nothing, quantizes in calls of its own.
    """
    may_be_metal = problem.implementation is None and sys.platform == "darwin"
    return may_be_metal or problem.implementation == "metal"


def _with_codes(operands: Operands, codes: list[QuantizedTensor | None]) -> Operands:
    """The operands with those codes, of query, key and value, that are not None."""
    query, key, value = (y or x for x, y in zip(operands[:3], codes, strict=True))
    return operands._replace(query=query, key=key, value=value)


def _forward_plugin(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    specs = _specs(problem, operands)
    # Rotated rows may have to be made floats again, which the call does not do.
    if not _makes_codes(problem) or any(spec is not None and spec.rotate for spec in specs):
        operands = _quantize_operands(problem, problem.implementation or "cpu", operands)
        specs = [None] * 3
    given = _unrotated(operands)
    rows = given.query.shape[:-1]
    results = [
        jax.ShapeDtypeStruct((*rows, given.value.shape[-1]), dtype),
        jax.ShapeDtypeStruct(rows, jnp.float32),
        jax.ShapeDtypeStruct(rows, jnp.float32),
    ]
    codes = [
        None if spec is None else _codes(spec, cast(jax.Array, x))
        for x, spec in zip(given[:3], specs, strict=True)
    ]
    made, unflatten = _flatten(codes)
    attributes = _attributes(problem, problem.forward_kernels, _with_codes(given, codes))
    for name, spec in zip(Operands._fields, specs, strict=False):
        attributes[f"{name}_is_made"] = np.int64(spec is not None)
        attributes[f"{name}_per_tensor"] = np.int64(
            spec is not None and spec.granularity == "tensor"
        )
    visible = visible_tokens(problem, operands) if any(specs) else (None, None)
    for name, tokens in zip(("query", "key_value"), visible, strict=True):
        attributes[f"has_{name}_visible"] = np.int64(tokens is not None)
    out, row_maximum, log2_sum, *made = _ffi_call(_ATTENTION_FORWARD, [*results, *made])(
        *_arguments(given), *(x for x in visible if x is not None), **attributes
    )
    residuals = Residuals(_with_codes(operands, unflatten(made)), out, row_maximum, log2_sum)
    return _log_sum_exp(row_maximum, log2_sum, math.log(2.0)), residuals


def _backward_call(
    target: str,
    results: Any,
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> Any:
    operands = _unrotated(residuals.operands)
    cotangents = [d_out] if d_log_sum_exp is None else [d_out, d_log_sum_exp]
    return _ffi_call(target, results)(
        *_arguments(operands),
        residuals.out,
        residuals.row_maximum,
        residuals.log_sum,
        *cotangents,
        **_attributes(problem, problem.backward_kernels, operands),
        has_d_log_sum_exp=np.int64(d_log_sum_exp is not None),
    )


def _backward_plugin(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype = residuals.out.dtype
    results = [jax.ShapeDtypeStruct(x.shape, dtype) for x in residuals.operands[:3]]
    gradients = _backward_call(
        _ATTENTION_BACKWARD, results, problem, residuals, d_out, d_log_sum_exp
    )
    # The gradient of a rotated array, back to the array.
    d_query, d_key, d_value = (
        _rotated_back(gradient) if isinstance(x, QuantizedTensor) and x.spec.rotate else gradient
        for gradient, x in zip(gradients, _unrotated(residuals.operands)[:3], strict=True)
    )
    return d_query, d_key, d_value


def _rotated_back(x: jax.Array) -> jax.Array:
    matrix = jnp.asarray(rotation(x.shape[-1]).T, jnp.float32)
    rows = jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return rows.astype(x.dtype)


def _backward_bias_plugin(
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


def _quantize_plugin(
    spec: QuantSpec, implementation: str | None, x: jax.Array, visible: jax.Array | None
) -> QuantizedTensor:
    results, unflatten = _flatten(_codes(spec, x))
    leaves = _ffi_call(_QUANTIZE, results)(
        *([x] if visible is None else [x, visible]),
        device=_DEVICES[implementation],
        bits=np.int64(spec.bits),
        symmetric=np.int64(spec.symmetric),
        float_minimum=np.int64(spec.float_minimum),
        token_block=np.int64(spec.token_block),
        head_block=np.int64(spec.head_block),
        per_tensor=np.int64(spec.granularity == "tensor"),
        center=np.int64(spec.center),
        rotate=np.int64(spec.rotate),
        has_visible=np.int64(visible is not None),
    )
    return unflatten(leaves)


def _flatten(tree: _Result) -> tuple[list[Any], Callable[[Any], _Result]]:
    """The leaves of `tree`, and what makes such a tree of others."""
    leaves, structure = cast(tuple[list[Any], Any], jax.tree.flatten(tree))
    return leaves, functools.partial(jax.tree.unflatten, structure)


def _codes(spec: QuantSpec, x: jax.Array) -> QuantizedTensor:
    """The shapes and dtypes of the codes of `x`."""
    *leading, H = x.shape
    array = jax.ShapeDtypeStruct
    scale = array(spec.scale_shape(x.shape), spec.scale_dtype)
    data = array((*leading, H // 2), jnp.uint8) if spec.bits == 4 else array(x.shape, jnp.int8)
    zero_point = minimum = mean = None
    if spec.float_minimum:
        minimum = scale
    elif not spec.symmetric:
        zero_point = array(scale.shape, jnp.int8)
    if spec.center:
        mean = array((x.shape[0], 1, *x.shape[2:]), jnp.float32)
    make = cast(Any, QuantizedTensor)
    return make(data, scale, zero_point, minimum, mean, spec, x.dtype, H)


# The XLA implementation sees float operands only: codes are dequantized for it.


def _float_operands(operands: Operands, dtype: DTypeLike) -> FloatOperands:
    compute = compute_dtype(dtype)
    if not any(isinstance(x, QuantizedTensor) for x in operands[:3]):
        return cast(FloatOperands, operands)
    query, key, value = (
        x.dequantize(compute) if isinstance(x, QuantizedTensor) else x.astype(compute)
        for x in (operands.query, operands.key, operands.value)
    )
    return FloatOperands(query, key, value, *operands[3:])


def _quantize_xla(spec: QuantSpec, x: jax.Array, visible: jax.Array | None) -> QuantizedTensor:
    return xla_quantize.quantize(x, spec, visible)


def _forward_xla(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    operands = _quantize_operands(problem, "xla", operands)
    out, row_maximum, log_sum = xla.forward(problem, _float_operands(operands, dtype))
    residuals = Residuals(operands, out.astype(dtype), row_maximum, log_sum)
    return _log_sum_exp(row_maximum, log_sum, 1.0), residuals


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
        residuals.out,
        residuals.row_maximum,
        residuals.log_sum,
        d_out.astype(dtype),
        d_log_sum_exp,
    )
