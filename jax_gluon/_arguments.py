"""The public arguments, checked at trace time and brought to one canonical form."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, Literal, TypedDict, cast, get_args

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_gluon import _native
from jax_gluon._block_mask import BlockMask
from jax_gluon._derivative_modes import Differentiation, differentiation_of
from jax_gluon._dimensions import is_static
from jax_gluon._errors import Checker
from jax_gluon._kernels import KERNEL_NAMES, CpuKernel, KernelWishes, MetalKernel
from jax_gluon._logit_arguments import (
    bias_of,
    mask_of,
    scale_of,
    sinks_of,
    soft_cap_of,
    warn_of_visible_keys,
)
from jax_gluon._operand_arguments import (
    check_batch,
    check_dtypes,
    check_shapes,
    one_batch_axis,
    operand,
    shape_of,
)
from jax_gluon._problem import AttentionOperands, AttentionProblem, Layout, Operands
from jax_gluon._quantization.formats import (
    PRESETS,
    AttentionQuantization,
    Preset,
    QuantizedTensor,
    QuantSpec,
    preset,
)
from jax_gluon._token_arguments import (
    dropout_seeds,
    lengths_of_batch,
    mask_of_keys,
    offset_of_queries,
    pair_of_tokens,
)
from jax_gluon._typing import Array, BoolOrInteger, Float, Integer, Key, Real, UInt32

#: What quantizes.
QuantizeImplementation = Literal["cpu", "metal", "xla"]
Implementation = Literal[QuantizeImplementation, "cudnn", "pallas"]
#: Those in which there are no kernels to choose from.
WITHOUT_KERNELS = ("xla", "cudnn", "pallas")

#: Queries up to which a preset leaves float keys and values in float: each step of generation would
#: quantize all of them for one pass over them. On two cores of an AMD EPYC (Zen 4), with 4096 keys,
#: 8 query heads, 4 kv heads and head dim 64, "int8" took 1.5 times as long as float for 1 or 2
#: queries, 1.3 times for 4 and 0.7 times for 5, which the kernel for few queries does not take;
#: "int4" took 5.8, 4.8 and 3.7 times as long.
MAX_QUERIES_IN_FLOAT = 4

_INT32_MAX = int(np.iinfo(np.int32).max)

_BOOLS: Any = (bool, np.bool_)
_INTEGERS: Any = (int, np.integer)


class AttentionKeywords(TypedDict, total=False):
    """Keywords of `dot_product_attention`, which describes them."""

    scale: Real[ArrayLike, ""] | Real[ArrayLike, " N"] | None
    is_causal: bool
    query_seq_lengths: Integer[ArrayLike, "*B"] | None
    key_value_seq_lengths: Integer[ArrayLike, "*B"] | None
    key_value_mask: BoolOrInteger[ArrayLike, "*#B S"] | None
    local_window_size: int | tuple[int, int] | None
    query_offset: Integer[ArrayLike, ""] | Integer[ArrayLike, "*B"] | None
    query_segment_ids: Integer[ArrayLike, "*#B T"] | None
    key_value_segment_ids: Integer[ArrayLike, "*#B S"] | None
    query_positions: Integer[ArrayLike, "*#B T"] | None
    key_value_positions: Integer[ArrayLike, "*#B S"] | None
    quantization: Preset | AttentionQuantization | None
    logits_soft_cap: float | None
    dropout_rate: float
    dropout_rng: Key[Array, ""] | UInt32[Array, " words"] | None
    broadcast_dropout: bool
    sinks: Float[ArrayLike, " N"] | None
    layout: Layout
    implementation: Implementation | None
    kernel: KernelWishes
    differentiation: Differentiation | None


KEYWORDS = tuple(AttentionKeywords.__annotations__)


@dataclasses.dataclass(frozen=True)
class CheckedArguments:
    """Arguments that passed every check.

    `kernel` is the caller's wish. `scale`, a scalar or `[N]`, is set where the scale is an array:
    `problem.scale` is then 1. `left_in_float` says why a preset quantizes nothing.
    `batch` are the caller's batch axes, any number of them, which `operands` has as one.
    """

    check: Checker
    problem: AttentionProblem
    operands: Operands
    scale: jax.Array | None
    batch: tuple[int, ...]
    kernel: KernelWishes
    differentiation: Differentiation
    left_in_float: str | None = None

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
    key_value_mask: ArrayLike | None = None,
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
    layout: Layout = "BTNH",
    implementation: Implementation | None = None,
    kernel: KernelWishes = None,
    differentiation: Differentiation | None = None,
) -> CheckedArguments:
    """Check the arguments of the public function that `check` names.

    **Raises:** `TypeError` and `ValueError` that name the function, the argument, what was found
    and what is allowed; `RuntimeError` for `implementation="metal"`. Warns of a concrete bias that
    a soft cap keeps from hiding keys.
    """
    check_names(check, quantization, implementation, kernel)
    if not isinstance(cast(Any, layout), str) or layout not in get_args(Layout):
        check.value_error("layout", f"{layout!r}", '"BTNH", "BNTH"')
    is_head_major = layout == "BNTH"

    named = (("query", query), ("key", key), ("value", value))
    arrays = {name: operand(check, name, x) for name, x in named}
    batch = check_batch(check, arrays, is_head_major)
    q, k, v = (one_batch_axis(x, batch) for x in arrays.values())
    T, N, H = shape_of(q, is_head_major)
    S, _, _ = shape_of(k, is_head_major)
    check_shapes(check, q, k, v, is_head_major)
    is_float64 = check_dtypes(check, arrays, implementation)
    specs = _specs(check, quantization, arrays)
    left_in_float = _left_in_float(quantization, arrays, T)
    if left_in_float is not None:
        specs = None, None, None

    B = q.shape[0]
    static_scale, scale_array = scale_of(check, scale, N, H, is_float64)
    operands = AttentionOperands(
        q,
        k,
        v,
        bias_of(check, bias, batch, (N, T, S), is_float64),
        mask_of(check, mask, batch, (N, T, S)),
        lengths_of_batch(check, "query_seq_lengths", query_seq_lengths, batch, T),
        lengths_of_batch(check, "key_value_seq_lengths", key_value_seq_lengths, batch, S),
        mask_of_keys(check, key_value_mask, batch, S),
        offset_of_queries(check, query_offset, batch),
        sinks_of(check, sinks, N, is_float64),
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
        local_window=window_of(check, local_window_size, (T, S) if stands_at_index else None),
        soft_cap=soft_cap_of(check, logits_soft_cap),
        quantization=specs,
        dropout_rate=0.0 if operands.dropout_seeds is None else float(dropout_rate),
        layout=layout,
        implementation="xla" if is_float64 else implementation,
    )
    if problem.soft_cap is not None:
        warn_of_visible_keys(check, bias, mask, problem.soft_cap)
    for wish in kernel if isinstance(kernel, tuple) else (kernel,):
        if isinstance(wish, CpuKernel | MetalKernel) and not concerned(problem, wish):
            found = f"{wish} for implementation {problem.implementation!r}"
            check.value_error("kernel", found, "one of a device that the call may run on")
    mode = differentiation_of(check, differentiation)
    return CheckedArguments(
        check, problem, operands, scale_array, batch, kernel, mode, left_in_float
    )


def concerned(problem: AttentionProblem, wish: CpuKernel | MetalKernel) -> bool:
    """Whether a call may run on the device of a wish."""
    device = "metal" if isinstance(wish, MetalKernel) else "cpu"
    return problem.implementation in (device, None)


def check_metal(check: Checker) -> None:
    """Raises `RuntimeError` where there is no Metal device."""
    name, why = _native.metal_device()
    if not name:
        raise RuntimeError(
            f'jax_gluon.{check.function}: implementation is "metal", but {why}; allowed: None, '
            '"cpu", "xla".'
        )
    if refusal := _native.metal_refusal():
        raise RuntimeError(
            f'jax_gluon.{check.function}: implementation is "metal", but {refusal}; allowed: None, '
            '"cpu", "xla".'
        )


def check_names(check: Checker, quantization: Any, implementation: Any, kernel: Any) -> None:
    """Raises for values of these arguments that no call takes."""
    if not isinstance(quantization, AttentionQuantization):
        check.name("quantization", quantization, tuple(PRESETS), "an AttentionQuantization")
    if implementation == "metal":
        check_metal(check)
    check.name("implementation", implementation, get_args(Implementation))
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
        if name not in (None, "baseline") and implementation in WITHOUT_KERNELS:
            allowed = f'None, "baseline": "{implementation}" has no kernels to choose from'
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


def _left_in_float(
    quantization: Any, arrays: dict[str, jax.Array | QuantizedTensor], T: int
) -> str | None:
    """Why a preset's name leaves floats what they are. Specs are taken at their word."""
    if not isinstance(quantization, str) or not is_static(T) or T > MAX_QUERIES_IN_FLOAT:
        return None
    if all(isinstance(arrays[name], QuantizedTensor) for name in ("key", "value")):
        return None
    return (
        f'quantization="{quantization}" leaves keys and values in float for {T} of at most '
        f"{MAX_QUERIES_IN_FLOAT} queries: making codes takes longer than reading floats"
    )


def window_of(check: Checker, size: Any, extents: tuple[int, int] | None) -> tuple[int, int] | None:
    """Left and right; `extents` are those of rows and keys that stand at their index."""
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
    left, right = extents if extents and is_static(*extents) else (_INT32_MAX, _INT32_MAX)
    return min(window[0], left), min(window[1], right)
