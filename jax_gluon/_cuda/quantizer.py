"""INT8 codes in one pass over 16-bit floats: a scale for each row, or for blocks of 128 tokens.

A warpgroup takes some tokens of a head: a thread reads 16 bytes of a row at a time, and keeps them
in registers until their codes are written. XLA reads the floats twice, once for the scales.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_gluon._cuda import mosaic
from jax_gluon._dimensions import ceil_div, is_static
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from jax_gluon._xla import quantize as xla

_HEAD_DIM = 128
#: Tokens that share a scale, where they do.
BLOCK = 128
_ROWS = 64
# To a float of at most 2^22 this adds what has no bits below the units.
_UNITS = 1.5 * 2.0**23
# From a bfloat16 number to the next: between half a unit of its last place and one and a half.
_NEXT = 1 + 1.5 * 2.0**-8
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)


def quantize(x: jax.Array, spec: QuantSpec, visible: jax.Array | None) -> QuantizedTensor:
    """As `_xla.quantize.quantize`; of an element that is half way between two codes, either."""
    if not _takes(x, spec) or visible is not None or mosaic.missing():
        return xla.quantize(x, spec, visible)
    center = xla.token_center(x.astype(jnp.float32), None) if spec.center else None
    codes, scale = quantize_tokens(x, center, spec.token_block)
    scale = jnp.swapaxes(scale, 1, 2)[..., None].astype(spec.scale_dtype)
    return QuantizedTensor(codes, scale, None, None, center, spec, np.dtype(x.dtype), x.shape[-1])


def _takes(x: jax.Array, spec: QuantSpec) -> bool:
    is_shared = spec.granularity == "block" and spec.block_size == BLOCK
    is_narrow = x.dtype.itemsize == 2 and x.shape[-1] == _HEAD_DIM
    is_whole = x.ndim == 4 and 0 not in x.shape and is_static(*x.shape)
    return is_plain(spec) and (spec.granularity == "row" or is_shared) and is_narrow and is_whole


def is_plain(spec: QuantSpec) -> bool:
    """Whether codes are of 8 bits, symmetric, and not of rotated rows."""
    return spec.bits == 8 and spec.symmetric and not spec.rotate and not spec.token_powers


def quantize_tokens(
    x: jax.Array, center: jax.Array | None, block: int
) -> tuple[jax.Array, jax.Array]:
    """Codes `[B, T, N, H]` of `x` less its center, and the scales of blocks, `[B, N, blocks]`."""
    pl, plgpu = mosaic.modules()
    B, T, N, H = x.shape
    size = _ROWS if block == 1 else block
    blocks = ceil_div(T, size)
    padded = (B, blocks * size, N, H)
    if T % size:
        x = jnp.pad(x, ((0, 0), (0, padded[1] - T), (0, 0), (0, 0)))
    # A thread holds 8 elements of a row that follow each other.
    layout = plgpu.Layout.WGMMA_UPCAST_4X

    def body(*refs: Any) -> None:
        source, *centers, codes_ref, scale_ref = refs
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        index = lax.axis_index("block")
        tokens = pl.ds(index * size, size)
        rows = plgpu.load(source.at[batch, tokens, head], layout=layout, optimized=False)
        rows = rows.astype(jnp.float32)
        for each in centers:
            of_head = each.at[batch, 0, head]
            of_head = plgpu.load(of_head, layout=layout.reduce(0), optimized=False)
            rows -= lax.broadcast_in_dim(of_head, rows.shape, (1,))
            if T % size:  # nothing is not as far from 0 as the center
                token = plgpu.broadcasted_iota(jnp.int32, rows.shape, 0, layout=layout)
                rows = jnp.where(token + index * size < T, rows, _ZERO)
        scale = jnp.abs(rows).max(axis=1) / np.float32(127)
        if block > 1:
            # Of vectors along both axes: Mosaic reduces none of these layouts to a number.
            wide = size, 32
            largest = lax.broadcast_in_dim(scale, wide, (0,)).max(axis=0)
            scale = _round_up(lax.broadcast_in_dim(largest, wide, (1,)).max(axis=1))
        scale, inverse = _scales(scale)
        scale_ref.at[batch, head, tokens][...] = scale
        codes = rows * lax.broadcast_in_dim(inverse, rows.shape, (0,)) + np.float32(_UNITS)
        codes_ref.at[batch, tokens, head][...] = (codes - np.float32(_UNITS)).astype(jnp.int8)

    codes, scale = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(padded, jnp.int8),
            jax.ShapeDtypeStruct((B, N, padded[1]), jnp.float32),
        ),
        grid=(N, blocks, B),
        grid_names=("head", "block", "batch"),
        num_threads=1,
        thread_name="warpgroup",
    )(x, *(() if center is None else (center,)))
    return codes[:, :T], scale[..., :T:block]


def _scales(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales as they are kept, and what to multiply with: NaN and 0 of one that is not finite."""
    is_finite = scale < _INFINITY
    scale = jnp.where(scale < np.float32(xla.MIN_SCALE), _ZERO, scale)
    is_used = is_finite & (scale > _ZERO)
    inverse = jnp.where(is_used, _ONE / jnp.where(is_used, scale, _ONE), _ZERO)
    return jnp.where(is_finite, scale, np.float32(np.nan)), inverse


def _round_up(scale: jax.Array) -> jax.Array:
    """The least bfloat16 number that is not below it."""
    narrow = scale.astype(jnp.bfloat16).astype(jnp.float32)
    above = (narrow * np.float32(_NEXT)).astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.where(narrow < scale, above, narrow)
