"""The public arguments, checked at trace time and brought to one canonical form."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import warnings
from typing import Any, NoReturn, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_gluon import _native
from jax_gluon._lengths import checked_lengths
from jax_gluon._plan import kernels
from jax_gluon._plan.selection import PIPELINES, KernelConfig
from jax_gluon._problem import AttentionOperands, AttentionProblem, Operands
from jax_gluon._quantization.formats import (
    PRESETS,
    AttentionQuantization,
    QuantizedTensor,
    QuantSpec,
    check_parts,
    preset,
)

IMPLEMENTATIONS = ("cpu", "metal", "xla")
_WIDEST_ROW_OF_METAL = 256

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_KERNEL_BIAS_DTYPES = ("float32", "bfloat16", "float16")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# What masks made of biases hold, or less; 8 bits do not hold it exactly.
_MASKING_BIAS = -1e9 * (1 - 2**-8)

# NumPy's scalars beside Python's, as `Any`: their own generic types say nothing here.
_ARRAYS: Any = np.ndarray
_BOOLS: Any = (bool, np.bool_)
_INTEGERS: Any = (int, np.integer)
_NUMBERS: Any = (numbers.Real, np.number)
_NOT_REAL: Any = (bool, np.bool_, np.complexfloating)


class AttentionKeywords(TypedDict, total=False):
    """Keywords of `dot_product_attention`, which describes them."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    quantization: str | AttentionQuantization | None
    logits_soft_cap: float | None
    dropout_rate: float
    dropout_rng: jax.Array | None
    sinks: ArrayLike | None
    implementation: str | None
    kernel: kernels.Wishes


@dataclasses.dataclass(frozen=True)
class CheckedArguments:
    """Arguments that passed every check.

    `scale`, a scalar or `[N]`, is set where the scale is an array: `problem.scale` is then 1.
    `is_batched` is False for rank-3 arrays, to which `operands` adds a batch axis of extent 1.
    """

    problem: AttentionProblem
    operands: Operands
    scale: jax.Array | None
    is_batched: bool


@dataclasses.dataclass(frozen=True)
class _Checker:
    """Words every complaint the same way: function, argument, what was found, what is allowed."""

    function: str

    def _text(self, argument: str, found: str, allowed: str) -> str:
        return f"jax_gluon.{self.function}: {argument} is {found}; allowed: {allowed}."

    def fail(self, error: type[Exception], argument: str, found: str, allowed: str) -> NoReturn:
        raise error(self._text(argument, found, allowed))

    def type_error(self, argument: str, found: str, allowed: str) -> NoReturn:
        raise TypeError(self._text(argument, found, allowed))

    def value_error(self, argument: str, found: str, allowed: str) -> NoReturn:
        raise ValueError(self._text(argument, found, allowed))

    def not_available(self, argument: str, found: str, allowed: str) -> NoReturn:
        raise NotImplementedError(self._text(argument, found, allowed))

    def array(self, argument: str, x: Any) -> jax.Array:
        try:
            array = jnp.asarray(x)
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(
                self._text(argument, f"a {type(x).__name__} ({error})", "an array or a list")
            ) from error
        # Python numbers leave a weak type, which would change what the dtype means later on.
        return jax.lax.convert_element_type(array, array.dtype)

    def operand(self, argument: str, x: Any) -> jax.Array | QuantizedTensor:
        if not isinstance(x, QuantizedTensor):
            return self.array(argument, x)
        wrong = check_parts(x) if x.ndim in (3, 4) else None
        if wrong:
            self.value_error(
                argument, f"a QuantizedTensor whose {wrong}", "parts as jax_gluon.quantize makes"
            )
        return x

    def flag(self, argument: str, x: Any) -> bool:
        if not isinstance(x, _BOOLS):
            self.type_error(argument, f"a {type(x).__name__}", "True or False")
        return bool(x)

    def number(self, argument: str, x: Any) -> float:
        number = x[()] if isinstance(x, _ARRAYS) and x.ndim == 0 else x
        if not isinstance(number, _NUMBERS) or isinstance(number, _NOT_REAL):
            self.type_error(argument, f"a {type(x).__name__}", "a real Python or NumPy number")
        return float(number)

    def name(self, argument: str, x: Any, known: tuple[str, ...]) -> None:
        allowed = ", ".join(["None", *(f'"{name}"' for name in known)])
        if x is not None and not isinstance(x, str):
            self.type_error(argument, f"a {type(x).__name__}", allowed)
        if x is not None and x not in known:
            self.value_error(argument, f'"{x}"', allowed)


def check_keyword_names(function: str, keywords: Any) -> None:
    """Raise `TypeError` on a keyword that `dot_product_attention` does not have."""
    for name in keywords:
        if name not in AttentionKeywords.__annotations__:
            raise TypeError(
                f'jax_gluon.{function}: unexpected keyword argument "{name}"; '
                f"allowed: {', '.join(AttentionKeywords.__annotations__)}."
            )


def check_flag(function: str, argument: str, x: Any) -> bool:
    """`x` as a bool; `TypeError` where it is anything else, a traced bool included."""
    return _Checker(function).flag(argument, x)


def check_arguments(
    function: str,
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    quantization: str | AttentionQuantization | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    sinks: ArrayLike | None = None,
    implementation: str | None = None,
    kernel: kernels.Wishes = None,
) -> CheckedArguments:
    """Check the arguments of the public function named `function`.

    **Raises:** `TypeError` and `ValueError` that name the function, the argument, what was found
    and what is allowed; `NotImplementedError` for dropout and sinks; `RuntimeError` for
    `implementation="metal"`. Warns of a concrete bias that a soft cap keeps from hiding keys.
    """
    check = _Checker(function)
    del dropout_rng  # Only read where dropout_rate > 0, which raises.
    _check_names(check, quantization, implementation, kernel)
    _check_dropout(check, dropout_rate)
    if sinks is not None:
        check.not_available("sinks", "set", "None: attention sinks are not supported")

    named = (("query", query), ("key", key), ("value", value))
    arrays = {name: check.operand(name, x) for name, x in named}
    is_batched = _check_ranks(check, arrays) == 4
    q, k, v = (x if is_batched else _with_batch_axis(x) for x in arrays.values())
    _check_shapes(check, q, k, v)
    is_float64 = _check_dtypes(check, arrays, implementation)
    specs = _specs(check, quantization, arrays)

    B, T, N, H = q.shape
    S = k.shape[1]
    static_scale, scale_array = _scale(check, scale, N, H, is_float64)
    operands = AttentionOperands(
        q,
        k,
        v,
        _bias(check, bias, (B, N, T, S), is_float64),
        _mask(check, mask, (B, N, T, S)),
        _lengths(check, "query_seq_lengths", query_seq_lengths, B, T),
        _lengths(check, "key_value_seq_lengths", key_value_seq_lengths, B, S),
    )
    problem = AttentionProblem(
        scale=static_scale,
        is_causal=check.flag("is_causal", is_causal),
        local_window=_window(check, local_window_size, T, S),
        soft_cap=_soft_cap(check, logits_soft_cap),
        quantization=specs,
        implementation="xla" if is_float64 else implementation,
    )
    if problem.soft_cap is not None:
        _warn_of_visible_keys(check, bias, mask, problem.soft_cap)
    if problem.implementation != "xla" and _native.has_plugin():
        if refused := kernels.refused(problem, operands, kernel):
            check.value_error("kernel", *refused)
        problem = dataclasses.replace(
            problem,
            forward_kernels=kernels.of_devices(problem, operands, "forward", kernel),
            backward_kernels=kernels.of_devices(problem, operands, "backward", kernel),
        )
    return CheckedArguments(problem, operands, scale_array, is_batched)


def _with_batch_axis(x: jax.Array | QuantizedTensor) -> jax.Array | QuantizedTensor:
    def expanded(part: jax.Array) -> jax.Array:
        return jnp.expand_dims(part, 0)

    return jax.tree.map(expanded, x)


def check_metal(function: str) -> None:
    """Raises `RuntimeError` where there is no Metal device."""
    name, why = _native.metal_device()
    if not name:
        raise RuntimeError(
            f'jax_gluon.{function}: implementation is "metal", but {why}; allowed: None, "cpu", '
            '"xla".'
        )


def _check_names(check: _Checker, quantization: Any, implementation: Any, kernel: Any) -> None:
    if not isinstance(quantization, AttentionQuantization):
        names = ", ".join(f'"{name}"' for name in PRESETS)
        allowed = f"None, {names}, an AttentionQuantization"
        if quantization is not None and not isinstance(quantization, str):
            check.type_error("quantization", f"a {type(quantization).__name__}", allowed)
        if quantization is not None and quantization not in PRESETS:
            check.value_error("quantization", f'"{quantization}"', allowed)
    if implementation == "metal":
        check_metal(check.function)
    check.name("implementation", implementation, IMPLEMENTATIONS)
    _check_kernel(check, kernel, implementation)


def _check_kernel(check: _Checker, kernel: Any, implementation: Any) -> None:
    if isinstance(kernel, tuple) and len(cast(tuple[Any, ...], kernel)) != 2:
        check.value_error(
            "kernel", f"of length {len(cast(tuple[Any, ...], kernel))}",
            "a pair, of forward and of backward",
        )  # fmt: skip
    wishes = cast(tuple[Any, ...], kernel) if isinstance(kernel, tuple) else (kernel,)
    for wish in wishes:
        if isinstance(wish, KernelConfig):
            if wish.pipeline not in PIPELINES:
                check.value_error("kernel", f"{wish}", "pipelines " + " and ".join(PIPELINES))
        elif wish is not None and not isinstance(wish, str):
            allowed = 'None, "baseline", "gluon", a KernelConfig, or a pair of these'
            check.type_error("kernel", f"a {type(wish).__name__}", allowed)
        else:
            check.name("kernel", wish, PIPELINES)
        is_gluon = "gluon" in (wish, getattr(wish, "pipeline", None))
        if is_gluon and implementation == "xla":
            check.value_error(
                "kernel", '"gluon"', 'None, "baseline": XLA has no kernels to choose from'
            )


def _specs(
    check: _Checker, quantization: Any, arrays: dict[str, jax.Array | QuantizedTensor]
) -> tuple[QuantSpec | None, QuantSpec | None, QuantSpec | None]:
    """What is still to be quantized: a `QuantizedTensor` stays as it is."""
    specs = preset(quantization) or AttentionQuantization()
    left = {
        name: None if isinstance(x, QuantizedTensor) else getattr(specs, name)
        for name, x in arrays.items()
    }
    for name, spec in left.items():
        if spec is not None and spec.bits == 4 and arrays[name].shape[-1] % 2:
            check.value_error(
                name, f"of head dim {arrays[name].shape[-1]}", "an even one, which 4 bits need"
            )
    return left["query"], left["key"], left["value"]


def _check_dropout(check: _Checker, dropout_rate: Any) -> None:
    rate = check.number("dropout_rate", dropout_rate)
    if not 0.0 <= rate < 1.0:
        check.value_error("dropout_rate", f"{rate}", "a number in [0, 1)")
    if rate > 0.0:
        check.not_available("dropout_rate", f"{rate}", "0: dropout is not supported")


def _check_ranks(check: _Checker, arrays: dict[str, jax.Array | QuantizedTensor]) -> int:
    for name, x in arrays.items():
        if x.ndim not in (3, 4):
            layout = "TNH or BTNH" if name == "query" else "SKH or BSKH"
            check.value_error(name, f"of rank {x.ndim}", f"rank 3 or 4 ({layout})")
    rank = arrays["query"].ndim
    for name, x in arrays.items():
        if x.ndim != rank:
            check.value_error(name, f"of rank {x.ndim}", f"query's rank, {rank}")
    return rank


def _check_shapes(
    check: _Checker,
    q: jax.Array | QuantizedTensor,
    k: jax.Array | QuantizedTensor,
    v: jax.Array | QuantizedTensor,
) -> None:
    B, _, N, H = q.shape
    _, S, K, _ = k.shape
    for name, x in (("query", q), ("key", k), ("value", v)):
        for axis, letter in ((2, "heads"), (3, "head dim")):
            if x.shape[axis] == 0:
                check.value_error(name, f"of {letter} 0 (shape {x.shape})", "at least 1")
    for name, x in (("key", k), ("value", v)):
        if x.shape[0] != B:
            check.value_error(name, f"of batch {x.shape[0]}", f"query's batch, {B}")
    if k.shape[3] != H:
        check.value_error("key", f"of head dim {k.shape[3]}", f"query's head dim, {H}")
    if v.shape[1] != S:
        check.value_error("value", f"of length {v.shape[1]}", f"key's length, {S}")
    if v.shape[2] != K:
        check.value_error("value", f"of {v.shape[2]} heads", f"key's number of heads, {K}")
    if N % K:
        check.value_error("query", f"of {N} heads", f"a multiple of key's {K} heads")


def _check_dtypes(
    check: _Checker,
    arrays: dict[str, jax.Array | QuantizedTensor],
    implementation: str | None,
) -> bool:
    """Whether the operands are float64. Float arrays share a dtype; codes go with any."""
    floats = {name: x for name, x in arrays.items() if not isinstance(x, QuantizedTensor)}
    first = next(iter(floats), "query")
    dtype = arrays[first].dtype
    for name, x in floats.items():
        if x.dtype.name not in _FLOATS:
            check.type_error(name, f"of dtype {x.dtype.name}", ", ".join(_FLOATS))
        if x.dtype != dtype:
            check.type_error(name, f"of dtype {x.dtype.name}", f"{first}'s dtype, {dtype.name}")
    is_float64 = jnp.float64 in (dtype, arrays["query"].dtype)
    if is_float64 and implementation in ("cpu", "metal"):
        check.value_error(
            "implementation",
            f'"{implementation}" for float64 operands, which its kernels do not take',
            'None or "xla" for float64',
        )
    widest = max(arrays[name].shape[-1] for name in ("query", "value"))
    if implementation == "metal" and widest > _WIDEST_ROW_OF_METAL:
        check.value_error(
            "implementation",
            f'"metal" for a head dim of {widest}',
            f'None, "cpu" or "xla" for head dims over {_WIDEST_ROW_OF_METAL}',
        )
    return is_float64


def _scale(
    check: _Checker, scale: Any, heads: int, head_dim: int, is_float64: bool
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


def _soft_cap(check: _Checker, soft_cap: Any) -> float | None:
    if soft_cap is None:
        return None
    number = check.number("logits_soft_cap", soft_cap)
    # Tiny caps would become 0 in float32, where 0 stands for no cap.
    if not float(np.finfo(np.float32).tiny) <= number <= _FLOAT32_MAX:
        check.value_error(
            "logits_soft_cap", f"{number}", "None or a positive number that is finite in float32"
        )
    return number


def _window(check: _Checker, size: Any, T: int, S: int) -> tuple[int, int] | None:
    if size is None:
        return None
    allowed = "an int >= 0, a pair (left, right) of them, or None"
    if isinstance(size, tuple | list):
        sides: list[Any] = list(size)  # pyright: ignore[reportUnknownArgumentType]
        if len(sides) != 2:
            check.value_error("local_window_size", f"{size}", allowed)
    else:
        sides = [size, size]
    window: list[int] = []
    for side in sides:
        if isinstance(side, _BOOLS) or not isinstance(side, _INTEGERS):
            check.type_error("local_window_size", f"{size!r}", allowed)
        window.append(operator.index(side))
        if window[-1] < 0:
            check.value_error("local_window_size", f"{size}", allowed)
    # A longer window hides nothing more; clipped, positions plus window fit into 32 bits.
    return min(window[0], T), min(window[1], S)


def _bias(
    check: _Checker, bias: Any, extents: tuple[int, ...], is_float64: bool
) -> jax.Array | None:
    if bias is None:
        return None
    array = check.array("bias", bias)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        check.type_error("bias", f"of dtype {array.dtype.name}", "a floating dtype")
    array = _expand_to_logits(check, "bias", array, extents)
    if is_float64:
        return array.astype(jnp.float64)
    return array if array.dtype.name in _KERNEL_BIAS_DTYPES else array.astype(jnp.float32)


def _warn_of_visible_keys(check: _Checker, bias: Any, mask: Any, soft_cap: float) -> None:
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


def _mask(check: _Checker, mask: Any, extents: tuple[int, ...]) -> jax.Array | None:
    if mask is None:
        return None
    array = check.array("mask", mask)
    if array.dtype != jnp.bool_:
        check.type_error("mask", f"of dtype {array.dtype.name}", "bool (True: visible)")
    return _expand_to_logits(check, "mask", array, extents)


def _expand_to_logits(
    check: _Checker, argument: str, array: jax.Array, extents: tuple[int, ...]
) -> jax.Array:
    fits = array.ndim <= 4 and all(
        extent in (1, full) for extent, full in zip(array.shape[::-1], extents[::-1], strict=False)
    )
    if not fits:
        allowed = f"a shape that broadcasts to [B, N, T, S] = {list(extents)}"
        check.value_error(argument, f"of shape {list(array.shape)}", allowed)
    return jnp.expand_dims(array, tuple(range(4 - array.ndim)))


def _lengths(
    check: _Checker, argument: str, lengths: Any, batch: int, limit: int
) -> jax.Array | None:
    if lengths is None:
        return None

    def fail(error: type[Exception], found: str, allowed: str) -> NoReturn:
        check.fail(error, argument, found, allowed)

    return checked_lengths(lengths, (batch,), limit, f"shape [B] = [{batch}]", fail)


def _is_integer(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))
