"""Arguments that make logits of products, checked: scale, bias, soft cap, mask and sinks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_gluon._block_mask import BlockMask, fitting
from jax_gluon._errors import Checker

_KERNEL_BIAS_DTYPES = ("float32", "bfloat16", "float16")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# What masks made of biases hold, or less; 8 bits do not hold it exactly.
_MASKING_BIAS = -1e9 * (1 - 2**-8)

_ARRAYS: Any = np.ndarray


def bias_of(
    check: Checker,
    bias: Any,
    batch: tuple[int, ...],
    extents: tuple[int, ...],
    is_float64: bool,
) -> jax.Array | None:
    if bias is None:
        return None
    array = check.array("bias", bias)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        check.type_error("bias", f"of dtype {array.dtype.name}", "a floating dtype")
    array = _expand_to_logits(check, "bias", array, batch, extents)
    if is_float64:
        return array.astype(jnp.float64)
    return array if array.dtype.name in _KERNEL_BIAS_DTYPES else array.astype(jnp.float32)


def mask_of(
    check: Checker, mask: Any, batch: tuple[int, ...], extents: tuple[int, ...]
) -> jax.Array | BlockMask | None:
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        return fitting(check, mask, (math.prod(batch), *extents))
    array = check.visibility("mask", mask)
    return _expand_to_logits(check, "mask", array, batch, extents)


def _expand_to_logits(
    check: Checker,
    argument: str,
    array: jax.Array,
    batch: tuple[int, ...],
    extents: tuple[int, ...],
) -> jax.Array:
    """With one batch axis, of extent 1 where all batch entries share the array."""
    whole = (*(batch or (1,)), *extents)
    fits = array.ndim <= len(whole) and all(
        extent in (1, full) for extent, full in zip(array.shape[::-1], whole[::-1], strict=False)
    )
    if not fits:
        axes = "B" if len(batch) < 2 else "..."
        allowed = f"a shape that broadcasts to [{axes}, N, T, S] = {list(whole)}"
        check.value_error(argument, f"of shape {list(array.shape)}", allowed)
    array = jnp.expand_dims(array, tuple(range(len(whole) - array.ndim)))
    own = array.shape[:-3]
    if len(own) == 1:
        return array
    if any(extent != 1 for extent in own):
        array = jnp.broadcast_to(array, (*batch, *array.shape[-3:]))
    return array.reshape(math.prod(array.shape[:-3]), *array.shape[-3:])


def sinks_of(check: Checker, sinks: Any, heads: int, is_float64: bool) -> jax.Array | None:
    if sinks is None:
        return None
    array = check.float_array("sinks", sinks)
    if array.shape != (heads,):
        allowed = f"a logit for each query head, [N] = [{heads}]"
        check.value_error("sinks", f"of shape {list(array.shape)}", allowed)
    # With a batch axis, as vmap's axes come before one in a call of the plugin.
    return jnp.expand_dims(array.astype(jnp.float64 if is_float64 else jnp.float32), 0)


def _is_integer(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def scale_of(
    check: Checker, scale: Any, heads: int, head_dim: int, is_float64: bool
) -> tuple[float, jax.Array | None]:
    if scale is None:
        return 1.0 / math.sqrt(head_dim), None
    is_of_heads = isinstance(scale, _ARRAYS) and scale.ndim > 0
    if is_of_heads or isinstance(scale, jax.Array):
        if scale.shape not in ((), (heads,)):
            allowed = f"a scalar, or a scale for each query head, [N] = [{heads}]"
            check.value_error("scale", f"of shape {list(scale.shape)}", allowed)
        if not (jnp.issubdtype(scale.dtype, jnp.floating) or _is_integer(scale)):
            check.type_error("scale", f"of dtype {scale.dtype.name}", "a real number")
        return 1.0, jnp.asarray(scale)
    number = check.number("scale", scale)
    limit = math.inf if is_float64 else _FLOAT32_MAX
    if not math.isfinite(number) or abs(number) > limit:
        allowed = "a finite number" if is_float64 else "a number that is finite in float32"
        check.value_error("scale", f"{number}", allowed)
    return number, None


def soft_cap_of(check: Checker, soft_cap: Any) -> float | None:
    if soft_cap is None:
        return None
    number = check.number("logits_soft_cap", soft_cap)
    # Tiny caps would become 0 in float32, where 0 stands for no cap.
    if not float(np.finfo(np.float32).tiny) <= number <= _FLOAT32_MAX:
        check.value_error(
            "logits_soft_cap", f"{number}", "None or a positive number that is finite in float32"
        )
    return number


def warn_of_visible_keys(check: Checker, bias: Any, mask: Any, soft_cap: float) -> None:
    """Warn of a concrete bias like -inf: capped, it hides nothing that a mask does not hide."""
    lowest = _concrete(bias)
    if lowest is None or lowest.size == 0:
        return
    limit = _MASKING_BIAS
    if lowest.dtype == np.float16:
        limit = float(np.finfo(np.float16).min)
    # First without an array of the bias's size.
    if not np.min(lowest) <= limit:
        return
    if mask is not None:
        visible = _concrete(mask)
        if visible is None or not np.any(visible & (lowest <= limit)):
            return
    # Said of the caller of the public function.
    warnings.warn(
        f"jax_gluon.{check.function}: bias is as low as {float(np.min(lowest)):.3g}, but with "
        f"logits_soft_cap {soft_cap:g} these keys stay visible, with a logit of {-soft_cap:g}; "
        "allowed: mask, to hide keys.",
        UserWarning,
        stacklevel=4,
    )


def _concrete(x: Any) -> Any:
    """The values of an array that are at hand, as NumPy's; None where they are traced or far."""
    if isinstance(x, jax.Array):
        return None if isinstance(x, Tracer) or not x.is_fully_addressable else np.asarray(x)
    return x if isinstance(x, _ARRAYS) else None
