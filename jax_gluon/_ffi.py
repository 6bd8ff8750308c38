"""The plugin's custom calls: their attributes, operands and results.

Handlers take the leading axes that vmap adds, of extent 1 where an operand is not mapped, so
nothing is copied to broadcast it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon import _native
from jax_gluon._block_mask import BlockMask
from jax_gluon._dimensions import assumed
from jax_gluon._dropout import threshold_of
from jax_gluon._kernels import Kernels
from jax_gluon._layouts import swapped, swapped_operands, swapped_residuals
from jax_gluon._meshes import vary_like
from jax_gluon._operands import quantize_operands, with_codes
from jax_gluon._pages import in_one_piece, key_value_length, page_tokens
from jax_gluon._problem import (
    AttentionProblem,
    Layout,
    Operands,
    Residuals,
    Tangents,
    log_sum_exp,
    sinks_gradient,
)
from jax_gluon._quantization.codes import rotated, unrotated
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from jax_gluon._visible_tokens import mask_as_segments, visible_tokens

_Result = TypeVar("_Result")

_ATTENTION_FORWARD = "jax_gluon.attention_forward"
_QUANTIZE = "jax_gluon.quantize"
# The calls' attribute `device`; None lets the plugin choose by the size of the problem.
_DEVICES = {"cpu": np.int64(0), "metal": np.int64(1), None: np.int64(2)}


def _ffi_call(target: str, results: Any) -> Callable[..., Any]:
    call = cast(Any, jax.ffi.ffi_call(target, results, vmap_method="expand_dims"))

    def varying(*operands: Any, **attributes: Any) -> Any:
        # JAX takes the call's results for the same on all devices of a `shard_map`.
        return vary_like(operands, call(*operands, **attributes))

    return varying


def _problem_attributes(problem: AttentionProblem, operands: Operands) -> dict[str, Any]:
    left, right = problem.local_window or (-1, -1)
    return {
        "causal": np.int64(problem.is_causal),
        "window_left": np.int64(left),
        "window_right": np.int64(right),
        "has_bias": np.int64(operands.bias is not None),
        "has_mask": np.int64(operands.mask is not None),
        "mask_block": np.int64(
            operands.mask.block_size if isinstance(operands.mask, BlockMask) else 0
        ),
        "has_query_seq_lengths": np.int64(operands.query_seq_lengths is not None),
        "has_key_value_seq_lengths": np.int64(operands.key_value_seq_lengths is not None),
        "has_query_offset": np.int64(operands.query_offset is not None),
        "has_segment_ids": np.int64(
            operands.segment_ids is not None or operands.key_value_mask is not None
        ),
        "has_positions": np.int64(operands.positions is not None),
        "dropout_threshold": np.int64(threshold_of(problem.dropout_rate)),
        "page_tokens": np.int64(page_tokens(operands)),
        "table_pages": np.int64(
            0 if operands.page_table is None else operands.page_table.shape[-1]
        ),
        **_format_attributes("query", operands.query),
        **_format_attributes("key", operands.key),
        **_format_attributes("value", operands.value),
    }


def _attributes(problem: AttentionProblem, kernels: Kernels, operands: Operands) -> dict[str, Any]:
    return {
        "device": _DEVICES[problem.implementation],
        "cpu_kernel": kernels.cpu.name,
        "cpu_block_k": np.int64(kernels.cpu.block_k or 0),
        "cpu_subtile": np.int64(kernels.cpu.subtile or 0),
        "cpu_stages": np.int64(kernels.cpu.stages or 0),
        "metal_kernel": kernels.metal.name,
        "metal_min_products": np.int64(kernels.metal_min_products),
        "scale": np.float32(problem.scale),
        "soft_cap": np.float32(problem.soft_cap or 0.0),
        "head_major": np.int64(problem.layout == "BNTH"),
        "dropout_scale": np.float32(1.0 / (1.0 - problem.dropout_rate)),
        **_problem_attributes(problem, operands),
        "has_sinks": np.int64(operands.sinks is not None),
    }


def kernel_query(
    problem: AttentionProblem, operands: Operands
) -> tuple[dict[str, int], dict[str, str]]:
    """The numbers and names by which the plugin says what kernels it has: of what is multiplied."""
    if problem.layout != "BTNH":
        operands = jax.eval_shape(functools.partial(swapped_operands, problem), operands)
    codes = [
        None if spec is None else _codes(spec, cast(jax.Array, x))
        for x, spec in zip(operands[:3], problem.quantization, strict=True)
    ]
    given = with_codes(operands, codes)
    if any(isinstance(x, QuantizedTensor) and x.spec.rotate for x in given[:3]):
        given = jax.eval_shape(_unrotated, given)
    _, T, N, H = given.query.shape
    K, V, S = given.key.shape[2], given.value.shape[-1], key_value_length(given)
    extents = {"T": assumed(T), "S": assumed(S), "N": N, "K": K, "H": H, "V": V}
    attributes = _problem_attributes(problem, given)
    names = {
        f"{name}_dtype": (x.data if isinstance(x, QuantizedTensor) else x).dtype.name
        for name, x in zip(Operands._fields, given[:3], strict=False)
    }
    return extents | {name: int(value) for name, value in attributes.items()}, names


def _format_attributes(name: str, x: jax.Array | QuantizedTensor) -> dict[str, np.int64]:
    """How the handler reads operand `name`: bits 0 is float; block 0 is the whole axis."""
    is_quantized = isinstance(x, QuantizedTensor)
    offset = 0 if not is_quantized else 1 if x.zero_point is not None else 2 * x.spec.float_minimum
    return {
        f"{name}_bits": np.int64(x.spec.bits if is_quantized else 0),
        f"{name}_token_block": np.int64(x.spec.token_block if is_quantized else 0),
        f"{name}_head_block": np.int64(x.spec.head_block if is_quantized else 0),
        f"{name}_offset": np.int64(offset),
        f"{name}_has_center": np.int64(is_quantized and x.center is not None),
        f"{name}_has_powers": np.int64(is_quantized and x.spec.token_powers),
    }


def _arguments(operands: Operands) -> list[jax.Array]:
    # The leaves of a QuantizedTensor are data, scale, zero point or minimum, center; those of a
    # BlockMask index and tiles. A page table is the last.
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

    if is_rotated(operands.key) or is_rotated(operands.value):
        operands = in_one_piece(operands)
    query, key, value = operands[:3]
    if not (is_rotated(query) and is_rotated(key)):
        query, key = plain(query), plain(key)
    return operands._replace(query=query, key=key, value=plain(value))


def _makes_codes(problem: AttentionProblem) -> bool:
    """Whether the forward call quantizes too: one command buffer instead of up to four.

    Codes of an operand that vmap does not map are then copied to each entry, so the CPU, which
    gains nothing, quantizes in calls of its own.
    """
    if problem.implementation is None:
        return _native.may_be_metal()
    return problem.implementation == "metal"


def forward(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    specs: list[QuantSpec | None] = list(problem.quantization)
    # Rotated rows may have to be made floats again, which the call does not do.
    if not _makes_codes(problem) or any(spec is not None and spec.rotate for spec in specs):
        operands = quantize_operands(
            problem,
            operands,
            functools.partial(quantize, problem.implementation or "cpu", layout=problem.layout),
        )
        specs = [None] * 3
    given = _unrotated(mask_as_segments(operands))
    rows = given.query.shape[:-1]
    results = _shapes_as_stored(
        problem,
        jax.ShapeDtypeStruct((*rows, given.value.shape[-1]), dtype),
        jax.ShapeDtypeStruct(rows, jnp.float32),
        jax.ShapeDtypeStruct(rows, jnp.float32),
    )
    codes = [
        None if spec is None else _codes(spec, cast(jax.Array, x))
        for x, spec in zip(given[:3], specs, strict=True)
    ]
    made, unflatten = _flatten(codes)
    attributes = _attributes(problem, problem.kernels.forward, with_codes(given, codes))
    for name, spec in zip(Operands._fields, specs, strict=False):
        attributes[f"{name}_is_made"] = np.int64(spec is not None)
        attributes[f"{name}_per_tensor"] = np.int64(
            spec is not None and spec.granularity == "tensor"
        )
    visible = visible_tokens(problem, operands) if any(specs) else (None, None)
    for name, tokens in zip(("query", "key_value"), visible, strict=True):
        attributes[f"has_{name}_visible"] = np.int64(tokens is not None)
    stored = swapped_operands(problem, given)
    out, row_maximum, log2_sum, *made = _ffi_call(_ATTENTION_FORWARD, [*results, *made])(
        *_arguments(stored), *(x for x in visible if x is not None), **attributes
    )
    out, row_maximum, log2_sum = swapped(problem, (out, row_maximum, log2_sum))
    residuals = Residuals(with_codes(operands, unflatten(made)), out, row_maximum, log2_sum)
    return log_sum_exp(row_maximum, log2_sum, operands.sinks, math.log(2.0)), residuals


def _backward_call(
    direction: Literal["backward", "backward_bias"],
    results: Any,
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> Any:
    operands = _unrotated(mask_as_segments(residuals.operands))
    residuals = swapped_residuals(problem, residuals._replace(operands=operands))
    cotangents = [d_out] if d_log_sum_exp is None else [d_out, d_log_sum_exp]
    cotangents = swapped(problem, cotangents)
    return _ffi_call(f"jax_gluon.attention_{direction}", results)(
        *_arguments(residuals.operands),
        residuals.out,
        residuals.row_maximum,
        residuals.log_sum,
        *cotangents,
        **_attributes(problem, getattr(problem.kernels, direction), operands),
        has_d_log_sum_exp=np.int64(d_log_sum_exp is not None),
        is_partial=np.int64(problem.is_partial),
    )


def backward(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype = residuals.out.dtype
    results = _shapes_as_stored(
        problem, *(jax.ShapeDtypeStruct(x.shape, dtype) for x in residuals.operands[:3])
    )
    gradients = _backward_call("backward", results, problem, residuals, d_out, d_log_sum_exp)
    gradients = swapped(problem, gradients)
    # The gradient of a rotated array, back to the array.
    d_query, d_key, d_value = (
        unrotated(gradient.astype(jnp.float32)).astype(dtype)
        if isinstance(x, QuantizedTensor) and x.spec.rotate
        else gradient
        for gradient, x in zip(gradients, _unrotated(residuals.operands)[:3], strict=True)
    )
    return d_query, d_key, d_value


def backward_bias(
    problem: AttentionProblem,
    residuals: Residuals,
    d_out: jax.Array,
    d_log_sum_exp: jax.Array | None,
) -> jax.Array:
    bias = residuals.operands.bias
    assert bias is not None
    result = jax.ShapeDtypeStruct(bias.shape, bias.dtype)
    return _backward_call("backward_bias", result, problem, residuals, d_out, d_log_sum_exp)


def backward_sinks(
    residuals: Residuals, d_out: jax.Array, d_log_sum_exp: jax.Array | None
) -> jax.Array:
    return sinks_gradient(residuals, d_out, d_log_sum_exp, math.log(2.0))


def tangent(
    problem: AttentionProblem,
    dtype: np.dtype[Any],
    operands: Operands,
    tangents: Tangents,
) -> tuple[jax.Array, Residuals, jax.Array, jax.Array]:
    """What forward returns, and the tangents of the output and of the natural log-sum-exp.

    Codes are made already; tangents are those of what they stand for.
    """
    given = _unrotated(mask_as_segments(operands))

    def of_rows(x: jax.Array | QuantizedTensor, tangent: jax.Array | None) -> jax.Array | None:
        if tangent is None:
            return None
        if isinstance(x, QuantizedTensor) and x.spec.rotate:
            tangent = rotated(tangent.astype(jnp.float32))
        return tangent.astype(dtype)

    leaves = dict(
        query=of_rows(given.query, tangents.query),
        key=of_rows(given.key, tangents.key),
        value=of_rows(given.value, tangents.value),
        bias=tangents.bias,
        sinks=tangents.sinks,
    )
    rows = given.query.shape[:-1]
    out = jax.ShapeDtypeStruct((*rows, given.value.shape[-1]), dtype)
    row = jax.ShapeDtypeStruct(rows, jnp.float32)
    out, row_maximum, log2_sum, tangent_out, tangent_log_sum_exp = _ffi_call(
        "jax_gluon.attention_tangent", [out, row, row, out, row]
    )(
        *_arguments(given),
        *(x for x in leaves.values() if x is not None),
        **_attributes(problem, Kernels(), given),
        **{f"has_{name}_tangent": np.int64(x is not None) for name, x in leaves.items()},
    )
    residuals = Residuals(operands, out, row_maximum, log2_sum)
    natural = log_sum_exp(row_maximum, log2_sum, operands.sinks, math.log(2.0))
    return natural, residuals, tangent_out, tangent_log_sum_exp


def quantize(
    implementation: str | None,
    x: jax.Array,
    spec: QuantSpec,
    visible: jax.Array | None,
    layout: Layout = "BTNH",
) -> QuantizedTensor:
    """The codes of float `x`; `visible` (bool `[B, T]`): tokens that can be seen.

    The call reads `x` in `layout`.
    """
    results, unflatten = _flatten(_codes(spec, x))
    x = jnp.swapaxes(x, 1, 2) if layout == "BNTH" else x
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
        token_powers=np.int64(spec.token_powers),
        rotate=np.int64(spec.rotate),
        head_major=np.int64(layout == "BNTH"),
        has_visible=np.int64(visible is not None),
    )
    return unflatten(leaves)


def _shapes_as_stored(
    problem: AttentionProblem, *shapes: jax.ShapeDtypeStruct
) -> list[jax.ShapeDtypeStruct]:
    return jax.eval_shape(functools.partial(swapped, problem), list(shapes))


def _flatten(tree: _Result) -> tuple[list[Any], Callable[[Any], _Result]]:
    """The leaves of `tree`, and what makes such a tree of others."""
    leaves, structure = cast(tuple[list[Any], Any], jax.tree.flatten(tree))
    return leaves, functools.partial(jax.tree.unflatten, structure)


def _codes(spec: QuantSpec, x: jax.Array) -> QuantizedTensor:
    """The shapes and dtypes of the codes of `x`."""
    *leading, H = x.shape
    array = jax.ShapeDtypeStruct
    scale = array(spec.scale_shape(x.shape), spec.scale_dtype)
    blocks = spec.block_shape(x.shape)
    data = array((*leading, H // 2), jnp.uint8) if spec.bits == 4 else array(x.shape, jnp.int8)
    zero_point = minimum = center = None
    if spec.float_minimum:
        minimum = array(blocks, spec.scale_dtype)
    elif not spec.symmetric:
        zero_point = array(blocks, jnp.int8)
    if spec.center:
        center = array((x.shape[0], 1, *x.shape[2:]), jnp.float32)
    make = cast(Any, QuantizedTensor)
    return make(data, scale, zero_point, minimum, center, spec, x.dtype, H)
