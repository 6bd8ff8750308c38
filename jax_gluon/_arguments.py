"""The public arguments, checked at trace time and brought to one canonical form."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from typing import Any, Literal, TypedDict, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_gluon import _native
from jax_gluon._block_mask import BlockMask, fitting
from jax_gluon._errors import FLOATS, Checker
from jax_gluon._kernels import KERNEL_NAMES, CpuKernel, KernelWishes, MetalKernel
from jax_gluon._problem import AttentionOperands, AttentionProblem, Operands
from jax_gluon._quantization.formats import (
    PRESETS,
    AttentionQuantization,
    Preset,
    QuantizedTensor,
    QuantSpec,
    check_parts,
    preset,
)
from jax_gluon._token_arguments import (
    dropout_seeds,
    lengths_of_batch,
    offset_of_queries,
    pair_of_tokens,
)

Implementation = Literal["cpu", "metal", "xla"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

_KERNEL_BIAS_DTYPES = ("float32", "bfloat16", "float16")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_INT32_MAX = int(np.iinfo(np.int32).max)
# What masks made of biases hold, or less; 8 bits do not hold it exactly.
_MASKING_BIAS = -1e9 * (1 - 2**-8)

_ARRAYS: Any = np.ndarray
_BOOLS: Any = (bool, np.bool_)
_INTEGERS: Any = (int, np.integer)


class AttentionKeywords(TypedDict, total=False):
    """Keywords of `dot_product_attention`, which describes them."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int, int] | None
    query_offset: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    query_positions: ArrayLike | None
    key_value_positions: ArrayLike | None
    quantization: Preset | AttentionQuantization | None
    logits_soft_cap: float | None
    dropout_rate: float
    dropout_rng: jax.Array | None
    broadcast_dropout: bool
    sinks: ArrayLike | None
    implementation: Implementation | None
    kernel: KernelWishes


KEYWORDS = tuple(AttentionKeywords.__annotations__)


@dataclasses.dataclass(frozen=True)
class CheckedArguments:
    """Arguments that passed every check.

    `kernel` is the caller's wish. `scale`, a scalar or `[N]`, is set where the scale is an array:
    `problem.scale` is then 1.
    `batch` are the caller's batch axes, any number of them, which `operands` has as one.
    """

    check: Checker
    problem: AttentionProblem
    operands: Operands
    scale: jax.Array | None
    batch: tuple[int, ...]
    kernel: KernelWishes

    def unflatten(self, x: jax.Array) -> jax.Array:
        """A result with the caller's batch axes in place of one."""
        return x if len(self.batch) == 1 else x.reshape(*self.batch, *x.shape[1:])


def check_arguments(
    check: Checker,
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None,
    mask: ArrayLike | BlockMask | None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    key_value_positions: ArrayLike | None = None,
    quantization: Preset | AttentionQuantization | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    broadcast_dropout: bool = False,
    sinks: ArrayLike | None = None,
    implementation: Implementation | None = None,
    kernel: KernelWishes = None,
) -> CheckedArguments:
    """Check the arguments of the public function that `check` names.

    **Raises:** `TypeError` and `ValueError` that name the function, the argument, what was found
    and what is allowed; `RuntimeError` for `implementation="metal"`. Warns of a concrete bias that
    a soft cap keeps from hiding keys.
    """
    _check_names(check, quantization, implementation, kernel)

    named = (("query", query), ("key", key), ("value", value))
    arrays = {name: _operand(check, name, x) for name, x in named}
    batch = _check_batch(check, arrays)
    q, k, v = (_one_batch_axis(x, batch) for x in arrays.values())
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
        _bias(check, bias, batch, (N, T, S), is_float64),
        _mask(check, mask, batch, (N, T, S)),
        lengths_of_batch(check, "query_seq_lengths", query_seq_lengths, batch, T),
        lengths_of_batch(check, "key_value_seq_lengths", key_value_seq_lengths, batch, S),
        offset_of_queries(check, query_offset, batch),
        _sinks(check, sinks, N, is_float64),
        pair_of_tokens(
            check, "segment_ids", query_segment_ids, key_value_segment_ids, batch, (T, S)
        ),
        pair_of_tokens(check, "positions", query_positions, key_value_positions, batch, (T, S)),
        dropout_seeds(check, dropout_rate, dropout_rng, broadcast_dropout, B),
    )
    stands_at_index = operands.query_offset is None and operands.positions is None
    if operands.query_offset is not None and operands.positions is not None:
        check.value_error("query_offset", "set beside query_positions", "one of the two")
    problem = AttentionProblem(
        scale=static_scale,
        is_causal=check.flag("is_causal", is_causal),
        local_window=_window(check, local_window_size, (T, S) if stands_at_index else None),
        soft_cap=_soft_cap(check, logits_soft_cap),
        quantization=specs,
        dropout_rate=0.0 if operands.dropout_seeds is None else float(dropout_rate),
        implementation="xla" if is_float64 else implementation,
    )
    if problem.soft_cap is not None:
        _warn_of_visible_keys(check, bias, mask, problem.soft_cap)
    for wish in kernel if isinstance(kernel, tuple) else (kernel,):
        if isinstance(wish, CpuKernel | MetalKernel) and not concerned(problem, wish):
            found = f"{wish} for implementation {problem.implementation!r}"
            check.value_error("kernel", found, "one of a device that the call may run on")
    return CheckedArguments(check, problem, operands, scale_array, batch, kernel)


def concerned(problem: AttentionProblem, wish: CpuKernel | MetalKernel) -> bool:
    """Whether a call may run on the device of a wish."""
    device = "metal" if isinstance(wish, MetalKernel) else "cpu"
    return problem.implementation in (device, None)


def _operand(check: Checker, argument: str, x: Any) -> jax.Array | QuantizedTensor:
    if not isinstance(x, QuantizedTensor):
        return check.array(argument, x)
    wrong = check_parts(x) if x.ndim in (3, 4) else None
    if wrong:
        found = f"a QuantizedTensor whose {wrong}"
        check.value_error(argument, found, "parts as jax_gluon.quantize makes")
    return x


def _one_batch_axis(
    x: jax.Array | QuantizedTensor, batch: tuple[int, ...]
) -> jax.Array | QuantizedTensor:
    if len(batch) == 1:
        return x

    def reshaped(part: jax.Array) -> jax.Array:
        return part.reshape(math.prod(batch), *part.shape[len(batch) :])

    return jax.tree.map(reshaped, x)


def check_metal(check: Checker) -> None:
    """Raises `RuntimeError` where there is no Metal device."""
    name, why = _native.metal_device()
    if not name:
        raise RuntimeError(
            f'jax_gluon.{check.function}: implementation is "metal", but {why}; allowed: None, '
            '"cpu", "xla".'
        )


def _check_names(check: Checker, quantization: Any, implementation: Any, kernel: Any) -> None:
    if not isinstance(quantization, AttentionQuantization):
        check.name("quantization", quantization, tuple(PRESETS), "an AttentionQuantization")
    if implementation == "metal":
        check_metal(check)
    check.name("implementation", implementation, IMPLEMENTATIONS)
    _check_kernel(check, kernel, implementation)


def _check_kernel(check: Checker, kernel: Any, implementation: Any) -> None:
    wishes = cast(tuple[Any, ...], kernel) if isinstance(kernel, tuple) else (kernel,)
    if isinstance(kernel, tuple) and len(wishes) != 2:
        found = f"of length {len(wishes)}"
        check.value_error("kernel", found, "a pair, of forward and of backward")
    for wish in wishes:
        others = ("a CpuKernel", "a MetalKernel", "a pair of these")
        name = wish.name if isinstance(wish, CpuKernel | MetalKernel) else wish
        check.name("kernel", name, KERNEL_NAMES, *others)
        for size in ("block_k", "subtile", "stages"):
            if getattr(wish, size, None) is not None:
                allowed = "an int of at least 1"
                check.integer(f"kernel.{size}", getattr(wish, size), 1, allowed)
        if name not in (None, "baseline") and implementation == "xla":
            allowed = 'None, "baseline": XLA has no kernels to choose from'
            check.value_error("kernel", f'"{name}"', allowed)


def _specs(
    check: Checker, quantization: Any, arrays: dict[str, jax.Array | QuantizedTensor]
) -> tuple[QuantSpec | None, QuantSpec | None, QuantSpec | None]:
    """What is still to be quantized: a `QuantizedTensor` stays as it is."""
    specs = preset(quantization) or AttentionQuantization()
    left = {
        name: None if isinstance(x, QuantizedTensor) else getattr(specs, name)
        for name, x in arrays.items()
    }
    for name, spec in left.items():
        if spec is not None and spec.bits == 4:
            check.even_head_dim(name, arrays[name].shape[-1])
    return left["query"], left["key"], left["value"]


def _check_batch(check: Checker, arrays: dict[str, jax.Array | QuantizedTensor]) -> tuple[int, ...]:
    """The batch axes, which the operands share: unlike ones of equal product are not paired."""
    for name, x in arrays.items():
        if x.ndim < 3:
            layout = "[..., T, N, H]" if name == "query" else "[..., S, K, H]"
            check.value_error(name, f"of rank {x.ndim}", f"rank 3 or more, {layout}")
    query = arrays["query"]
    for name, x in arrays.items():
        if x.ndim != query.ndim:
            check.value_error(name, f"of rank {x.ndim}", f"query's rank, {query.ndim}")
        if x.shape[:-3] != query.shape[:-3]:
            own, allowed = list(x.shape[:-3]), list(query.shape[:-3])
            check.value_error(name, f"of batch axes {own}", f"query's, {allowed}")
    return tuple(query.shape[:-3])


def _check_shapes(
    check: Checker,
    q: jax.Array | QuantizedTensor,
    k: jax.Array | QuantizedTensor,
    v: jax.Array | QuantizedTensor,
) -> None:
    _, _, N, H = q.shape
    _, S, K, _ = k.shape
    for name, x in (("query", q), ("key", k), ("value", v)):
        for axis, letter in ((2, "heads"), (3, "head dim")):
            if x.shape[axis] == 0:
                check.value_error(name, f"of {letter} 0 (shape {x.shape})", "at least 1")
    if k.shape[3] != H:
        check.value_error("key", f"of head dim {k.shape[3]}", f"query's head dim, {H}")
    if v.shape[1] != S:
        check.value_error("value", f"of length {v.shape[1]}", f"key's length, {S}")
    if v.shape[2] != K:
        check.value_error("value", f"of {v.shape[2]} heads", f"key's number of heads, {K}")
    if N % K:
        check.value_error("query", f"of {N} heads", f"a multiple of key's {K} heads")


def _check_dtypes(
    check: Checker,
    arrays: dict[str, jax.Array | QuantizedTensor],
    implementation: Implementation | None,
) -> bool:
    """Whether the operands are float64. Float arrays share a dtype; codes go with any."""
    floats = {name: x for name, x in arrays.items() if not isinstance(x, QuantizedTensor)}
    first = next(iter(floats), "query")
    dtype = arrays[first].dtype
    for name, x in floats.items():
        if x.dtype.name not in FLOATS:
            check.type_error(name, f"of dtype {x.dtype.name}", ", ".join(FLOATS))
        if x.dtype != dtype:
            check.type_error(name, f"of dtype {x.dtype.name}", f"{first}'s dtype, {dtype.name}")
    is_float64 = jnp.float64 in (dtype, arrays["query"].dtype)
    if is_float64 and implementation in ("cpu", "metal"):
        check.value_error(
            "implementation",
            f'"{implementation}" for float64 operands, which its kernels do not take',
            'None or "xla" for float64',
        )
    if implementation == "metal":
        widest = max(arrays[name].shape[-1] for name in ("query", "value"))
        limit = _native.plugin().METAL_MAX_HEAD_DIM
        if widest > limit:
            check.value_error(
                "implementation",
                f'"metal" for a head dim of {widest}',
                f'None, "cpu" or "xla" for head dims over {limit}',
            )
    return is_float64


def _scale(
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


def _soft_cap(check: Checker, soft_cap: Any) -> float | None:
    if soft_cap is None:
        return None
    number = check.number("logits_soft_cap", soft_cap)
    # Tiny caps would become 0 in float32, where 0 stands for no cap.
    if not float(np.finfo(np.float32).tiny) <= number <= _FLOAT32_MAX:
        check.value_error(
            "logits_soft_cap", f"{number}", "None or a positive number that is finite in float32"
        )
    return number


def _window(check: Checker, size: Any, extents: tuple[int, int] | None) -> tuple[int, int] | None:
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
    # A longer window hides nothing more; clipped, indices plus window fit into 32 bits.
    left, right = extents or (_INT32_MAX, _INT32_MAX)
    return min(window[0], left), min(window[1], right)


def _bias(
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


def _warn_of_visible_keys(check: Checker, bias: Any, mask: Any, soft_cap: float) -> None:
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


def _mask(
    check: Checker, mask: Any, batch: tuple[int, ...], extents: tuple[int, ...]
) -> jax.Array | BlockMask | None:
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        return fitting(check, mask, (math.prod(batch), *extents))
    array = check.array("mask", mask)
    if _is_integer(array):
        array = array != 0
    if array.dtype != jnp.bool_:
        allowed = "bool (True: visible), or an integer dtype (nonzero: visible)"
        check.type_error("mask", f"of dtype {array.dtype.name}", allowed)
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


def _sinks(check: Checker, sinks: Any, heads: int, is_float64: bool) -> jax.Array | None:
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
