"""Quantization in plain `jax.numpy`: the same codes as the plugin's `jax_gluon.quantize` call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._dimensions import ceil_div, min_extent
from jax_gluon._quantization.codes import (
    LARGEST_POWER,
    pack,
    power_cells,
    power_of_four,
    rotated,
    spread,
    without_center,
)
from jax_gluon._quantization.formats import CENTER_TOKENS, QuantizedTensor, QuantSpec

#: A step below this counts as zero: dividing by it, or halving it, might leave the normal numbers.
MIN_SCALE = 2.0**-125
# A center above this counts as zero: differences from it might not be finite.
_LARGEST_CENTER = 2.0**100
# A squared norm below this counts as zero: squares of its elements might not be normal.
_MIN_ORDINARY_NORM = 2.0**-100


def quantize(
    x: jax.Array,
    spec: QuantSpec,
    visible: jax.Array | None = None,
    over: tuple[str, ...] = (),
) -> QuantizedTensor:
    """Codes of float `x` `[..., T, N, H]`; `visible`, bool `[..., T]`, says what can be seen.

    `x` is a part of the batch and heads, which are split over these axes of a mesh.
    A hidden token counts in no extreme and in no center, and is coded as zeros. A block with a NaN
    or an infinity gets a NaN scale and codes of 0, so that it dequantizes to NaN.
    """
    dtype, H = x.dtype, x.shape[-1]
    x = x.astype(jnp.float32)
    if spec.rotate:
        x = rotated(x)
    center = None
    if spec.center:
        center = token_center(x, visible)
        x = without_center(x, center)
    hidden = None if visible is None else ~visible[..., None, None]
    if hidden is not None:
        x = jnp.where(hidden, jnp.zeros_like(x), x)
    powers = None
    if spec.token_powers:
        x, powers = divide_large_tokens(x, ordinary_norm(x, visible))
    least, most = _extremes(x, hidden, spec, over)
    scale, zero_point, minimum = _parameters(least, most, spec)
    codes = _codes(x, scale, zero_point, minimum, spec)
    if powers is not None:
        scale = jnp.concatenate([scale, power_cells(powers, spec)], axis=-1)
    return QuantizedTensor(
        pack(codes) if spec.bits == 4 else codes, scale, zero_point, minimum, center,
        spec, np.dtype(dtype), H,
    )  # fmt: skip


def token_center(x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """The lower median of each head and channel over the first `CENTER_TOKENS` visible tokens.

    Of the finite values; 0 where there is none, or where a difference from it might overflow. It
    depends on no later token, so neither the future of a causal row nor the order in which a cache
    gets its tokens moves it, and an outlier does not either.

    **Arguments:** `x`: float32 `[..., T, N, H]`; `visible`: bool `[..., T]`, or None for all.

    **Returns:** float32 `[..., 1, N, H]`.
    """
    if x.shape[-3] == 0:
        return jnp.zeros((*x.shape[:-3], 1, *x.shape[-2:]), x.dtype)
    return _lower_median(_first_visible(x, visible))


def ordinary_norm(x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """The squared norm of an ordinary token of `x` `[..., T, N, H]`, `[..., 1, N, 1]`.

    The lower median over the tokens that the center is taken from; 0 where there is none.
    """
    if x.shape[-3] == 0:
        return jnp.zeros((*x.shape[:-3], 1, x.shape[-2], 1), x.dtype)
    middle = _lower_median(_first_visible(_squared_norms(x), visible))
    return jnp.where(middle >= _MIN_ORDINARY_NORM, middle, jnp.zeros_like(middle))


def divide_large_tokens(x: jax.Array, ordinary: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` `[..., T, N, H]` with each token divided by 4^p, and p, int32 `[..., T, N, 1]`.

    That is the largest power of 4, up to 4^7, that the token is at least, in ordinary ones. A token
    that is not finite is not divided.
    """
    norms = _squared_norms(x)
    usable = jnp.isfinite(norms) & (ordinary > 0)
    powers = jnp.zeros(norms.shape, jnp.int32)
    for power in range(1, LARGEST_POWER + 1):
        reached = norms >= ordinary * jnp.asarray(16.0**power, norms.dtype)
        powers += (usable & reached).astype(jnp.int32)
    return x * power_of_four(-powers), powers


def _squared_norms(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x, axis=-1, keepdims=True)


def _first_visible(x: jax.Array, visible: jax.Array | None) -> jax.Array:
    """The first tokens that can be seen, at least one; infinities where there are fewer."""
    count = min_extent(CENTER_TOKENS, x.shape[-3])
    if visible is None:
        return x[..., :count, :, :]
    first = jnp.argsort(~visible, axis=-1, stable=True)[..., :count]
    taken = jnp.take_along_axis(visible, first, axis=-1)[..., None, None]
    x = jnp.take_along_axis(x, first[..., None, None], axis=-3)
    return jnp.where(taken, x, jnp.full_like(x, jnp.inf))


def _lower_median(x: jax.Array) -> jax.Array:
    """Of the finite numbers along the tokens; 0 where there are none, or where it is too large."""
    finite = jnp.isfinite(x)
    x = jnp.where(finite, x, jnp.full_like(x, jnp.inf))
    number = jnp.sum(finite, axis=-3, keepdims=True, dtype=jnp.int32)
    at = jnp.maximum(number - 1, 0) // 2
    # The least element that more than `at` are not above. So few are not sorted: that takes a GPU
    # longer than all comparisons, which are one program.
    pads = [(0, 0)] * x.ndim
    pads[-3] = 0, CENTER_TOKENS - x.shape[-3]
    x = jnp.pad(x, pads, constant_values=jnp.inf)
    count = jnp.zeros(x.shape, jnp.int32)
    for token in range(CENTER_TOKENS):
        count += (x[..., token : token + 1, :, :] <= x).astype(jnp.int32)
    above = jnp.where(count > at, x, jnp.full_like(x, jnp.inf))
    middle = jnp.min(above, axis=-3, keepdims=True)
    # An infinity, where there is none, is too large too.
    return jnp.where(jnp.abs(middle) <= _LARGEST_CENTER, middle, jnp.zeros_like(middle))


def _extremes(
    x: jax.Array, hidden: jax.Array | None, spec: QuantSpec, over: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Least and largest element of each block; NaN where one of them is not finite.

    Hidden tokens do not count; a block of nothing else has 0 for both.
    """
    shape = spec.block_shape(x.shape)
    if 0 in x.shape:
        return jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype)
    T, N, H = x.shape[-3:]
    token, head = spec.token_block or T, spec.head_block or H
    if spec.granularity == "tensor":
        blocked, axes = x.shape, None
    else:
        blocked = (*x.shape[:-3], shape[-3], token, N, shape[-1], head)
        axes = (-4, -1)

    def reduced(reduce: Callable[..., jax.Array], x: jax.Array, neutral: Any) -> jax.Array:
        if hidden is not None:
            x = jnp.where(hidden, jnp.full_like(x, neutral), x)
        # A short last block is filled up with what changes nothing.
        missing = ceil_div(T, token) * token - T, 0, ceil_div(H, head) * head - H
        widths = [(0, 0)] * (x.ndim - 3) + [(0, extent) for extent in missing]
        x = jnp.pad(x, widths, constant_values=neutral)
        return jnp.broadcast_to(reduce(x.reshape(blocked), axis=axes), shape)

    least, most = reduced(jnp.min, x, jnp.inf), reduced(jnp.max, x, -jnp.inf)
    # XLA's minimum and maximum drop a NaN on the CPU.
    is_finite = reduced(jnp.all, jnp.isfinite(x), True)
    if over and spec.granularity == "tensor":
        least = cast(Any, jax.lax.pmin)(least, over)
        most = cast(Any, jax.lax.pmax)(most, over)
        is_finite = cast(Any, jax.lax.pmin)(is_finite.astype(jnp.int32), over) > 0
    nan = jnp.full_like(least, jnp.nan)
    # So would a block of NaN alone be taken for one of nothing.
    is_empty = is_finite & (least > most)
    least, most = (
        jnp.where(is_empty, jnp.zeros_like(x), jnp.where(is_finite, x, nan)) for x in (least, most)
    )
    return least, most


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
    if spec.scale_dtype == jnp.bfloat16:
        scale = _narrowed(scale)
    scale = jnp.where(scale < MIN_SCALE, jnp.zeros_like(scale), scale)
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


def _narrowed(x: jax.Array) -> jax.Array:
    """Float32 `x` rounded to bfloat16's precision: on GPUs XLA drops a cast there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _round_up(x: jax.Array) -> jax.Array:
    """The least bfloat16 number that is not below finite `x`, as float32; NaN stays NaN."""
    narrow = _narrowed(x)
    bits = jax.lax.bitcast_convert_type(narrow, jnp.int32)
    # The next one: away from 0 where positive, towards it where negative.
    step = jnp.where(narrow < 0, jnp.full_like(bits, -0x10000), jnp.full_like(bits, 0x10000))
    above = jax.lax.bitcast_convert_type(bits + step, jnp.float32)
    rounded = jnp.where(narrow < x, above, narrow)
    largest = jnp.asarray(jnp.finfo(jnp.bfloat16).max, jnp.float32)
    return jnp.where(jnp.isnan(x), x, jnp.clip(rounded, -largest, largest))
