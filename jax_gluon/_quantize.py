"""`quantize`: float arrays to `QuantizedTensor`s."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_gluon import _lowering
from jax_gluon._arguments import check_metal
from jax_gluon._lengths import checked_lengths
from jax_gluon._meshes import on_meshes
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from jax_gluon._visible_tokens import tokens_within

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_IMPLEMENTATIONS = (None, "cpu", "metal", "xla")
# That its quantizer has room for.
_WIDEST_ROW_OF_METAL = 512


def quantize(
    x: ArrayLike,
    spec: QuantSpec,
    *,
    lengths: ArrayLike | None = None,
    implementation: str | None = None,
) -> QuantizedTensor:
    """The integer codes of `x`, with the scales and what else `spec` asks for.

    Codes are those of `x` rounded to float32. A block with a NaN or an infinity dequantizes to NaN;
    every finite block to finite numbers. No gradient flows through it (that of
    `dot_product_attention(..., quantization=...)` is straight through).

    **Arguments:**

    - `x`: float32, bfloat16, float16 or float64, `[B, T, N, H]` or `[T, N, H]`; H must be even for
      4 bits.
    - `spec`: the format.
    - `lengths`: integers `[B]` (or a scalar for rank 3), clamped to `[0, T]`: the tokens at and
      past `lengths[b]` are hidden. They count in no scale and no center, whatever they hold, and
      are coded as zeros.
    - `implementation`: `"cpu"` (the plugin), `"metal"` (the GPU), `"xla"`, or None, which takes the
      plugin on the CPU.

    **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
    allowed; `ImportError` where the plugin is needed and can't be loaded.

    >>> import jax, jax_gluon
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> quantized = jax_gluon.quantize(x, jax_gluon.QuantSpec(bits=4, granularity="group"))
    >>> quantized.data.shape, quantized.scale.shape
    ((2, 128, 8, 32), (2, 128, 8, 2))
    """
    if not isinstance(spec, QuantSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(_text("spec", f"a {type(spec).__name__}", "a QuantSpec"))
    if isinstance(x, QuantizedTensor):
        raise TypeError(_text("x", "a QuantizedTensor", "a float array"))
    array = jnp.asarray(x)
    if array.dtype.name not in _FLOATS:
        raise TypeError(_text("x", f"of dtype {array.dtype.name}", ", ".join(_FLOATS)))
    if array.ndim not in (3, 4):
        raise ValueError(_text("x", f"of rank {array.ndim}", "rank 3 or 4 (TNH or BTNH)"))
    if array.shape[-1] == 0:
        raise ValueError(_text("x", f"of head dim 0 (shape {array.shape})", "at least 1"))
    if spec.bits == 4 and array.shape[-1] % 2:
        raise ValueError(
            _text("x", f"of head dim {array.shape[-1]}", "an even head dim where spec.bits is 4")
        )
    if implementation not in _IMPLEMENTATIONS:
        allowed = 'None, "cpu", "metal", "xla"'
        raise ValueError(_text("implementation", repr(implementation), allowed))
    if implementation == "metal":
        check_metal("quantize")
        if array.shape[-1] > _WIDEST_ROW_OF_METAL:
            allowed = f'at most {_WIDEST_ROW_OF_METAL} where implementation is "metal"'
            raise ValueError(_text("x", f"of head dim {array.shape[-1]}", allowed))
    is_batched = array.ndim == 4
    checked = None
    if lengths is not None:
        shape = array.shape[:-3]
        checked = checked_lengths(lengths, shape, array.shape[-3], f"shape {shape}", _fail_lengths)
    array = jax.lax.stop_gradient(array if is_batched else array[None])
    if checked is not None:
        checked = checked.reshape(-1)
    quantized = on_meshes(_quantize, (spec, implementation), array, array, checked)
    return quantized if is_batched else quantized[0]


def _quantize(
    spec: QuantSpec, implementation: str | None, x: jax.Array, lengths: jax.Array | None
) -> QuantizedTensor:
    visible = None if lengths is None else tokens_within(lengths, x.shape[1])
    return _lowering.quantize(spec, implementation, x, visible)


def _fail_lengths(error: type[Exception], found: str, allowed: str) -> NoReturn:
    raise error(_text("lengths", found, allowed))


def _text(argument: str, found: Any, allowed: str) -> str:
    return f"jax_gluon.quantize: {argument} is {found}; allowed: {allowed}."
