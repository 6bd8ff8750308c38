"""Quantization in plain `jax.numpy`: the same codes as the plugin's `jax_gluon.quantize` call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon.formats import QuantizedTensor, QuantSpec, pack, rotation, spread

# A step below this counts as zero: dividing by it, or halving it, might leave the normal numbers.
_LEAST_SCALE = 2.0**-125


def quantize(x: jax.Array, spec: QuantSpec, lengths: jax.Array | None = None) -> QuantizedTensor:
    """Codes of float `x` `[..., T, N, H]`; `lengths` (int32 `[B]`) bounds the tokens of the mean.

    A block with a NaN or an infinity gets a NaN scale and codes of 0, so that it dequantizes to
    NaN; a mean is that of the finite values.
    """
    dtype, H = x.dtype, x.shape[-1]
    x = x.astype(jnp.float32)
    if spec.rotate:
        matrix = jnp.asarray(rotation(H), jnp.float32)
        x = jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)
    mean = None
    if spec.center:
        mean = _token_mean(x, lengths)
        largest = np.finfo(np.float32).max
        # A difference of two finite numbers is kept finite.
        x = jnp.where(jnp.isfinite(x), jnp.clip(x - mean, -largest, largest), x)
    least, most = _extremes(x, spec)
    scale, zero_point, minimum = _parameters(least, most, spec)
    codes = _codes(x, scale, zero_point, minimum, spec)
    return QuantizedTensor(
        pack(codes) if spec.bits == 4 else codes, scale, zero_point, minimum, mean,
        spec, np.dtype(dtype), H,
    )  # fmt: skip


def _token_mean(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    counted = jnp.isfinite(x)
    if lengths is not None:
        token = jnp.arange(x.shape[-3], dtype=jnp.int32)
        inside = token < lengths if x.ndim == 3 else token[None, :] < lengths[:, None]
        counted &= inside[..., None, None]
    count = jnp.sum(counted, axis=-3, keepdims=True, dtype=jnp.int32)
    # Each term is divided before the sum, which can then not overflow.
    terms = jnp.where(counted, x, jnp.zeros_like(x)) / jnp.maximum(count, 1).astype(x.dtype)
    return jnp.sum(terms, axis=-3, keepdims=True)


def _extremes(x: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Least and largest element of each block; NaN where one of them is not finite."""
    shape = spec.scale_shape(x.shape)
    x = jnp.where(jnp.isfinite(x), x, jnp.full_like(x, jnp.nan))
    if 0 in x.shape:
        return jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)
    if spec.granularity == "tensor":
        return jnp.broadcast_to(jnp.min(x), shape), jnp.broadcast_to(jnp.max(x), shape)
    T, N, H = x.shape[-3:]
    token, head = spec.token_block or T, spec.head_block or H
    # A short last block is filled up with its last element.
    widths = [(0, 0)] * (x.ndim - 3) + [(0, -T % token), (0, 0), (0, -H % head)]
    x = jnp.pad(x, widths, mode="edge")
    x = x.reshape(*x.shape[:-3], x.shape[-3] // token, token, N, x.shape[-1] // head, head)
    return jnp.min(x, axis=(-4, -1)), jnp.max(x, axis=(-4, -1))


def _parameters(
    least: jax.Array, most: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Scale, and zero point or minimum, as they are stored."""
    lowest, highest = (jnp.asarray(code, jnp.float32) for code in spec.code_range)
    levels = highest - lowest
    minimum = zero_point = None
    if spec.symmetric:
        scale = jnp.maximum(-least, most) / highest
    elif spec.float_minimum:
        minimum = least
        if spec.scale_dtype == jnp.bfloat16:
            minimum = -_round_up(-least)
        scale = most / levels - minimum / levels
    else:
        least, most = jnp.minimum(least, 0.0), jnp.maximum(most, 0.0)
        scale = most / levels - least / levels
    if spec.scale_dtype == jnp.bfloat16 and spec.bits == 8:
        # Rounded down, the ends of a block would lose up to half of a step; of 15 steps, little.
        scale = _round_up(scale)
    scale = scale.astype(spec.scale_dtype).astype(jnp.float32)
    scale = jnp.where(scale < _LEAST_SCALE, jnp.zeros_like(scale), scale)
    if not spec.symmetric and not spec.float_minimum:
        zero = jnp.clip(jnp.round(lowest - least / _divisor(scale)), lowest, highest)
        zero_point = jnp.where(scale > 0, zero, jnp.zeros_like(zero)).astype(jnp.int8)
    if minimum is not None:
        minimum = minimum.astype(spec.scale_dtype)
    return scale.astype(spec.scale_dtype), zero_point, minimum


def _divisor(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))


def _codes(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    minimum: jax.Array | None,
    spec: QuantSpec,
) -> jax.Array:
    lowest, highest = (jnp.asarray(code, jnp.float32) for code in spec.code_range)
    scale = scale.astype(jnp.float32)
    usable = spread(scale, spec, x.shape) > 0
    divisor = spread(_divisor(scale), spec, x.shape)
    if minimum is not None:
        half = jnp.asarray(0.5, jnp.float32)
        offset = spread(minimum.astype(jnp.float32), spec, x.shape)
        codes = jnp.round((x * half - offset * half) / (divisor * half)) + lowest
    elif zero_point is not None:
        zero = spread(zero_point.astype(jnp.float32), spec, x.shape)
        codes = jnp.round(x / divisor) + zero
    else:
        codes = jnp.round(x / divisor)
    zero_code = jnp.zeros_like(codes) if minimum is None else jnp.full_like(codes, lowest)
    codes = jnp.where(usable, jnp.clip(codes, lowest, highest), zero_code)
    return jnp.where(jnp.isnan(codes), jnp.zeros_like(codes), codes).astype(jnp.int8)


def _round_up(x: jax.Array) -> jax.Array:
    """The least bfloat16 number that is not below finite `x`, as float32; NaN stays NaN."""
    narrow = x.astype(jnp.bfloat16).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(narrow, jnp.int32)
    # The next one: away from 0 where positive, towards it where negative.
    step = jnp.where(narrow < 0, jnp.full_like(bits, -0x10000), jnp.full_like(bits, 0x10000))
    above = jax.lax.bitcast_convert_type(bits + step, jnp.float32)
    rounded = jnp.where(narrow < x, above, narrow)
    largest = jnp.asarray(jnp.finfo(jnp.bfloat16).max, jnp.float32)
    return jnp.where(jnp.isnan(x), x, jnp.clip(rounded, -largest, largest))
