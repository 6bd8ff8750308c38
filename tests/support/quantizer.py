"""Codes in NumPy: what the quantizer's kernels should store, and what codes stand for."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jax_gluon._quantization.codes import rotation
from jax_gluon._quantization.formats import CENTER_TOKENS, QuantizedTensor, QuantSpec

MIN_SCALE = np.float32(2.0**-125)


def _blocks(x: np.ndarray[Any, Any], spec: QuantSpec) -> np.ndarray[Any, Any]:
    """`x` [B, T, N, H] as [B, T', token block, N, H', head block], filled up with edges."""
    _, T, _, H = x.shape
    token, head = spec.token_block or T, spec.head_block or H
    x = np.pad(x, [(0, 0), (0, -T % token), (0, 0), (0, -H % head)], mode="edge")
    B, T, N, H = x.shape
    return x.reshape(B, T // token, token, N, H // head, head)


def spread(cells: np.ndarray[Any, Any], spec: QuantSpec, shape: tuple[int, ...]) -> Any:
    """Entries for blocks spread over the elements."""
    _, T, _, H = shape
    if spec.token_block > 1:
        cells = np.repeat(cells, spec.token_block, axis=1)[:, :T]
    if spec.head_block > 1:
        cells = np.repeat(cells, spec.head_block, axis=3)[..., :H]
    return np.broadcast_to(cells, shape)


def _bfloat16_up(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The least bfloat16 number that is not below."""
    near = x.astype(ml_dtypes.bfloat16)
    return np.where(near.astype(np.float32) < x, np.nextafter(near, near.dtype.type(np.inf)), near)


def token_center(x: np.ndarray[Any, Any], visible: Any = None) -> np.ndarray[Any, Any]:
    """The lower medians of the finite values of the first tokens that can be seen."""
    B, _, N, H = x.shape
    out = np.zeros((B, 1, N, H), np.float32)
    for b in range(B):
        seen = x[b] if visible is None else x[b][visible[b]]
        for n, h in np.ndindex(N, H):
            column = seen[:CENTER_TOKENS, n, h].astype(np.float32)
            column = np.sort(column[np.isfinite(column)])
            if column.size:
                out[b, 0, n, h] = column[(column.size - 1) // 2]
    return out


def token_powers(x: Any, visible: Any) -> Any:
    """Exponents of 4 `[B, T, N, 1]` that centered tokens are divided by."""
    norms = np.sum(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
    powers = np.zeros(norms.shape, np.int32)
    for b, n in np.ndindex(x.shape[0], x.shape[2]):
        first = norms[b, :, n, 0][visible[b]][:CENTER_TOKENS]
        first = np.sort(first[np.isfinite(first)])
        ordinary = first[(first.size - 1) // 2] if first.size else 0.0
        if ordinary >= 2.0**-100:
            with np.errstate(all="ignore"):
                ratio = np.sqrt(norms[b, :, n, 0] / ordinary)
                reached = ratio[:, None] >= 4.0 ** np.arange(1, 8)
            powers[b, :, n, 0] = np.where(np.isfinite(ratio), reached.sum(1), 0)
    return powers


def power_cells(powers: Any, spec: QuantSpec) -> Any:
    """Five tokens a number, from the lowest bits on; see `jax_gluon._quantization.codes`."""
    block, (B, T, N, _) = spec.block_size, powers.shape
    cells = np.zeros((B, -(-T // block), N, spec.power_cells), np.uint16)
    for b, t, n in np.ndindex(B, T, N):
        place = t % block
        cells[b, t // block, n, place // 5] |= int(powers[b, t, n, 0]) << 3 * (place % 5)
    bits = cells & 0x3FFF | (cells & 0x4000) << 1 | (~cells & 0x2000) << 1
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16)


def powers_of_cells(cells: Any, spec: QuantSpec, x: QuantizedTensor) -> Any:
    """The inverse of `power_cells`."""
    B, T, N, _ = x.shape
    bits = cells.view(np.uint16)
    bits = bits & 0x3FFF | bits >> 1 & 0x4000
    powers = np.zeros((B, T, N, 1), np.int32)
    for b, t, n in np.ndindex(B, T, N):
        place = t % spec.block_size
        powers[b, t, n, 0] = (
            int(bits[b, t // spec.block_size, n, place // 5]) >> 3 * (place % 5) & 7
        )
    return powers


def quantize(x: Any, spec: QuantSpec, center: Any = None, visible: Any = None) -> QuantizedTensor:
    """Codes of `x` in float32, with `center` in place of the tokens' center where it is given.

    `visible` (bool `[B, T]`) hides tokens, whatever they hold.
    """
    dtype, H = np.dtype(x.dtype), x.shape[-1]
    x = np.asarray(x).astype(np.float32)
    if spec.rotate:
        x = (x.astype(np.float64) @ rotation(H)).astype(np.float32)
    if spec.center:
        if center is None:
            center = token_center(x, visible)
        x = x - center
    if visible is None:
        visible = np.ones(x.shape[:2], bool)
    seen = np.broadcast_to(visible[..., None, None], x.shape)
    x = np.where(seen, x, np.float32(0))
    powers = np.zeros((*x.shape[:3], 1), np.int32)
    if spec.token_powers:
        powers = token_powers(x, visible)
        x = np.ldexp(x, -2 * powers)
    axes = (0, 1, 2, 3, 4, 5) if spec.granularity == "tensor" else (2, 5)
    least, most = (
        f(_blocks(np.where(seen, x, hidden), spec), axis=axes, keepdims=True)[:, :, 0, ..., 0]
        for f, hidden in ((np.min, np.float32(np.inf)), (np.max, np.float32(-np.inf)))
    )
    least, most = (np.where(least > most, np.float32(0), y) for y in (least, most))
    least, most = (np.broadcast_to(y, spec.block_shape(x.shape)) for y in (least, most))
    lowest, highest = (np.float32(code) for code in spec.code_range)
    levels, minimum, zero_point = highest - lowest, None, None
    is_bfloat16 = np.dtype(spec.scale_dtype) == ml_dtypes.bfloat16
    if spec.symmetric:
        scale = np.maximum(-least, most) / highest
    elif spec.float_minimum:
        minimum = -_bfloat16_up(-least) if is_bfloat16 else least
        scale = most / levels - minimum.astype(np.float32) / levels
    else:
        least, most = np.minimum(least, 0), np.maximum(most, 0)
        scale = most / levels - least / levels
    if is_bfloat16:
        scale = scale.astype(ml_dtypes.bfloat16) if spec.bits == 4 else _bfloat16_up(scale)
    scale = np.where(scale.astype(np.float32) < MIN_SCALE, scale.dtype.type(0), scale)
    wide = scale.astype(np.float32)
    divisor = np.where(wide > 0, wide, np.float32(np.inf))
    if not spec.symmetric and not spec.float_minimum:
        zero = np.clip(np.rint(lowest - least / divisor), lowest, highest)
        zero_point = np.where(wide > 0, zero, 0).astype(np.int8)
    divisor = spread(divisor, spec, x.shape)
    if minimum is not None:
        half = np.float32(0.5)
        distance = x * half - spread(minimum.astype(np.float32), spec, x.shape) * half
        codes = np.rint(distance / (divisor * half)) + lowest
    else:
        codes = np.rint(x / divisor)
        if zero_point is not None:
            codes = codes + spread(zero_point.astype(np.float32), spec, x.shape)
    codes = np.clip(codes, lowest, highest).astype(np.int8)
    if spec.bits == 4:
        biased = (codes + 8).astype(np.uint8)
        codes = biased[..., 0::2] | biased[..., 1::2] << 4
    if spec.token_powers:
        scale = np.concatenate([scale, power_cells(powers, spec)], axis=-1)
    kept = center if spec.center else None
    return QuantizedTensor(codes, scale, zero_point, minimum, kept, spec, dtype, H)


def dequantize(x: QuantizedTensor) -> np.ndarray[Any, Any]:
    """What the codes stand for, in float64; still rotated."""
    spec, codes = x.spec, np.asarray(x.data).astype(np.float64)
    if spec.bits == 4:
        data = np.asarray(x.data)
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(x.shape).astype(np.float64) - 8
    scales = spec.block_shape(x.shape)[-1]
    scale = spread(np.asarray(x.scale, np.float64)[..., :scales], spec, x.shape)
    if x.minimum is not None:
        codes = (codes - spec.code_range[0]) * scale
        codes += spread(np.asarray(x.minimum, np.float64), spec, x.shape)
    elif x.zero_point is not None:
        codes = (codes - spread(np.asarray(x.zero_point, np.float64), spec, x.shape)) * scale
    else:
        codes = codes * scale
    if spec.token_powers:
        codes = np.ldexp(codes, 2 * powers_of_cells(np.asarray(x.scale)[..., scales:], spec, x))
    return codes if x.center is None else codes + np.asarray(x.center, np.float64)


def values(x: Any) -> np.ndarray[Any, Any]:
    """The array that `x`, codes or floats, stands for, in float64; not rotated."""
    if not isinstance(x, QuantizedTensor):
        return np.asarray(x).astype(np.float64)
    restored = dequantize(x)
    return restored @ rotation(x.head_dim).T if x.spec.rotate else restored
