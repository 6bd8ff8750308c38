"""INT8 rows: the format of the quantized operands, in plain `jax.numpy`.

One float32 scale belongs to every (batch, token, head); the CPU plugin's `jax_gluon.quantize` call
computes the same codes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_gluon.problem import AttentionOperands

PRESETS = ("int8",)

_LARGEST_CODE = 127


class QuantizedRows(NamedTuple):
    """INT8 codes of `[B, S, K, H]`: element = `data * scale + mean`.

    `data` is int8 `[B, S, K, H]`, `scale` float32 `[B, S, K]`, and `mean`, where the rows were
    centred, float32 `[B, 1, K, H]`.
    """

    data: jax.Array
    scale: jax.Array
    mean: jax.Array | None = None


class QuantizedOperands(NamedTuple):
    """The operands of quantized attention: `AttentionOperands` with rows for the float arrays."""

    query: QuantizedRows
    key: QuantizedRows
    value: QuantizedRows
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> AttentionOperands:
        """The float operands that these codes stand for."""
        return AttentionOperands(
            dequantize(self.query, dtype),
            dequantize(self.key, dtype),
            dequantize(self.value, dtype),
            self.bias,
            self.mask,
            self.query_seq_lengths,
            self.key_value_seq_lengths,
        )


def quantize_rows(
    x: jax.Array, *, center: bool = False, lengths: jax.Array | None = None
) -> QuantizedRows:
    """INT8 codes with one scale per row: `scale = max|x| / 127`, `data = round(x / scale)`.

    Halves round to even. A row of zeros has scale 0; a row with a NaN or an infinity has a scale
    that is one too, so that it dequantizes to NaN.

    **Arguments:** `x` is float `[B, S, K, H]`. With `center` the mean over tokens, of the finite
    values among the first `lengths[b]` tokens (int32 `[B]`, default all), is subtracted first; it
    is 0 where there are none.
    """
    x = x.astype(jnp.float32)
    mean = None
    if center:
        mean = _token_mean(x, lengths)
        x = x - mean
    scale = jnp.max(jnp.abs(x), axis=-1, initial=0.0) / _LARGEST_CODE
    usable = (scale > 0) & jnp.isfinite(scale)
    # Dividing by the scale: its reciprocal overflows where the row is tiny.
    divisor = jnp.where(usable, scale, jnp.ones_like(scale))[..., None]
    codes = jnp.clip(jnp.round(x / divisor), -_LARGEST_CODE, _LARGEST_CODE)
    data = jnp.where(usable[..., None], codes, jnp.zeros_like(codes)).astype(jnp.int8)
    return QuantizedRows(data, scale, mean)


def dequantize(rows: QuantizedRows, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The float array `[B, S, K, H]` that INT8 rows stand for."""
    x = rows.data.astype(dtype) * rows.scale.astype(dtype)[..., None]
    return x if rows.mean is None else x + rows.mean.astype(dtype)


def _token_mean(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    counted = jnp.isfinite(x)
    if lengths is not None:
        token = jnp.arange(x.shape[1], dtype=jnp.int32)
        counted &= (token[None, :] < lengths[:, None])[:, :, None, None]
    count = jnp.sum(counted, axis=1, keepdims=True, dtype=jnp.int32)
    # Each term is divided before the sum, which can then not overflow.
    terms = jnp.where(counted, x, jnp.zeros_like(x)) / jnp.maximum(count, 1).astype(x.dtype)
    return jnp.sum(terms, axis=1, keepdims=True)
