"""`quantize`: float arrays to `QuantizedTensor`s."""

from __future__ import annotations

from typing import get_args

import jax
from jax.typing import ArrayLike

from jax_gluon import _lowering, _native
from jax_gluon._arguments import QuantizeImplementation, check_metal
from jax_gluon._errors import Checker
from jax_gluon._meshes import on_meshes
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from jax_gluon._typing import Float, Integer
from jax_gluon._visible_tokens import tokens_within


def quantize(
    x: Float[ArrayLike, "*B T N H"],
    spec: QuantSpec,
    *,
    lengths: Integer[ArrayLike, "*B"] | None = None,
    implementation: QuantizeImplementation | None = None,
) -> Float[QuantizedTensor, "*B T N H"]:
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
    check = Checker("quantize")
    if not isinstance(spec, QuantSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
        check.type_error("spec", f"a {type(spec).__name__}", "a QuantSpec")
    if isinstance(x, QuantizedTensor):
        check.type_error("x", "a QuantizedTensor", "a float array")
    array = check.float_array("x", x)
    if array.ndim not in (3, 4):
        check.value_error("x", f"of rank {array.ndim}", "rank 3 or 4 (TNH or BTNH)")
    H = array.shape[-1]
    if H == 0:
        check.value_error("x", f"of head dim 0 (shape {array.shape})", "at least 1")
    if spec.bits == 4:
        check.even_head_dim("x", H)
    check.name("implementation", implementation, get_args(QuantizeImplementation))
    if implementation == "metal":
        check_metal(check)
        widest = _native.plugin().METAL_MAX_QUANTIZED_HEAD_DIM
        if widest < H:
            allowed = f'at most {widest} where implementation is "metal"'
            check.value_error("x", f"of head dim {H}", allowed)
    is_batched = array.ndim == 4
    checked = None
    if lengths is not None:
        checked = check.lengths("lengths", lengths, array.shape[:-3], array.shape[-3]).reshape(-1)
    array = jax.lax.stop_gradient(array if is_batched else array[None])
    quantized = on_meshes(_quantize, (spec, implementation), array, array, checked)
    return quantized if is_batched else quantized[0]


def _quantize(
    spec: QuantSpec, implementation: str | None, x: jax.Array, lengths: jax.Array | None
) -> QuantizedTensor:
    visible = None if lengths is None else tokens_within(lengths, x.shape[1])
    return _lowering.quantize(spec, implementation, x, visible)
