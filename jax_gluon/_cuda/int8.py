"""Forward of INT8 operands on Hopper; backward is cuDNN's, of what the codes stand for."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._cuda import cudnn, int8_forward, mosaic, quantizer
from jax_gluon._operands import quantize_operands
from jax_gluon._problem import AttentionProblem, Operands, Residuals
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec

_LOG_2 = math.log(2)


def missing() -> str | None:
    """Why there is no kernel here, or None. Its backward is cuDNN's."""
    return mosaic.missing() or cudnn.missing()


def refusal(problem: AttentionProblem, operands: Operands) -> str | None:
    """Why the kernel does not take a problem, or None."""
    query, key = _specs(problem, operands)
    if query is None or not quantizer.is_plain(query) or query.granularity != "row" or query.center:
        return f"the kernel takes a query of symmetric INT8 rows without a center, not {query}"
    is_shared = key is not None and key.granularity == "block"
    if key is None or not quantizer.is_plain(key) or not (is_shared or key.granularity == "row"):
        return f"the kernel takes a key of symmetric INT8 rows or blocks, not {key}"
    if is_shared and key.block_size % int8_forward.KEYS:
        step = int8_forward.KEYS
        return f"the kernel takes blocks of a multiple of {step} keys, not of {key.block_size}"
    if (reason := cudnn.refusal(problem, operands)) is not None:
        return reason
    if (H := operands.query.shape[-1]) != int8_forward.HEAD_DIM:
        return f"the kernel takes a head dim of {int8_forward.HEAD_DIM}, not {H}"
    for name in ("bias", "query_seq_lengths", "key_value_seq_lengths"):
        if getattr(operands, name) is not None:
            return f"the kernel takes no {name}"
    if problem.local_window is not None:
        return "the kernel takes no window"
    if problem.is_partial:
        return "the kernel's output is of 16 bits, which parts are not added up in"
    return None


def _specs(problem: AttentionProblem, operands: Operands) -> tuple[QuantSpec | None, ...]:
    """Of query and key."""
    given = zip(operands[:2], problem.quantization[:2], strict=True)
    return tuple(x.spec if isinstance(x, QuantizedTensor) else spec for x, spec in given)


def forward(
    problem: AttentionProblem, dtype: np.dtype[Any], operands: Operands
) -> tuple[jax.Array, Residuals]:
    """As `_xla.implementation.forward`."""
    operands = quantize_operands(problem, operands, quantizer.quantize)
    query, key = cast(QuantizedTensor, operands.query), cast(QuantizedTensor, operands.key)
    narrow, value = cudnn.dtype_of(operands), operands.value
    out, sums = int8_forward.forward(
        _codes(query),
        _codes(key),
        value.dequantize(narrow) if isinstance(value, QuantizedTensor) else value.astype(narrow),
        factor=problem.scale / _LOG_2,
        is_causal=problem.is_causal,
        chunks_of_scale=key.spec.block_size // int8_forward.KEYS
        if key.spec.granularity == "block"
        else 0,
    )
    log_sum_exp = jnp.swapaxes(sums, 1, 2) * np.float32(_LOG_2)
    if key.center is not None:  # which adds to all logits of a row alike
        log_sum_exp += np.float32(problem.scale) * _of_center(query, key.center)
    residuals = Residuals(operands, out.astype(dtype), log_sum_exp, jnp.zeros_like(log_sum_exp))
    return log_sum_exp, residuals


def _codes(x: QuantizedTensor) -> int8_forward.Codes:
    scale = jnp.swapaxes(x.scale[..., 0], 1, 2).astype(jnp.float32)
    return int8_forward.Codes(x.data, scale)


def _of_center(query: QuantizedTensor, center: jax.Array) -> jax.Array:
    """The products of rows with the center of their keys, `[B, T, N]`."""
    B, T, N, H = query.shape
    K = center.shape[-2]
    rows = query.dequantize(jnp.float32).reshape(B, T, K, N // K, H)
    products = jnp.sum(rows * center[:, :, :, None], axis=-1)
    return products.reshape(B, T, N)
