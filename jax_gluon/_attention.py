"""Scaled dot-product attention with a memory-efficient forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_gluon import _lowering, _native
from jax_gluon._arguments import (
    KEYWORDS,
    AttentionKeywords,
    CheckedArguments,
    Implementation,
    check_arguments,
)
from jax_gluon._block_mask import BlockMask
from jax_gluon._cuda import choice
from jax_gluon._derivative_modes import Differentiation, naming_the_argument
from jax_gluon._differentiation import any_order, reverse
from jax_gluon._dimensions import assumed
from jax_gluon._errors import Checker
from jax_gluon._kernels import CpuKernel, Device, KernelWishes, MetalKernel, Pass
from jax_gluon._layouts import swapped, swapped_operands
from jax_gluon._meshes import on_meshes
from jax_gluon._operand_arguments import shape_of
from jax_gluon._plan.choice import KernelQuery, choose_kernel, kernels_of, min_products_of
from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    Layout,
    Operands,
    compute_dtype,
)
from jax_gluon._problem import log_sum_exp as natural_log_sum_exp
from jax_gluon._quantization.formats import (
    AttentionQuantization,
    Operand,
    Preset,
    QuantizedTensor,
)
from jax_gluon._typing import Array, BoolOrInteger, Float, Integer, Key, Real, UInt32


@overload
def dot_product_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    *,
    return_residual: Literal[False] = False,
    **keywords: Unpack[AttentionKeywords],
) -> Float[Array, "*B T N V"]: ...


@overload
def dot_product_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    *,
    return_residual: Literal[True],
    **keywords: Unpack[AttentionKeywords],
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]: ...


def dot_product_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    *,
    scale: Real[ArrayLike, ""] | Real[ArrayLike, " N"] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[ArrayLike, "*B"] | None = None,
    key_value_seq_lengths: Integer[ArrayLike, "*B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    key_value_mask: BoolOrInteger[ArrayLike, "*#B S"] | None = None,
    query_offset: Integer[ArrayLike, ""] | Integer[ArrayLike, "*B"] | None = None,
    query_segment_ids: Integer[ArrayLike, "*#B T"] | None = None,
    key_value_segment_ids: Integer[ArrayLike, "*#B S"] | None = None,
    query_positions: Integer[ArrayLike, "*#B T"] | None = None,
    key_value_positions: Integer[ArrayLike, "*#B S"] | None = None,
    quantization: Preset | AttentionQuantization | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Key[Array, ""] | UInt32[Array, " words"] | None = None,
    broadcast_dropout: bool = False,
    sinks: Float[ArrayLike, " N"] | None = None,
    layout: Layout = "BTNH",
    implementation: Implementation | None = None,
    kernel: KernelWishes = None,
    differentiation: Differentiation | None = None,
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Attention `softmax(scale * query key^T + bias) value`, as `jax.nn.dot_product_attention`.

    The logits are `logits_soft_cap(scale * q k^T + bias)`; masks hide keys after that. A row to
    which every key is hidden gives 0 and takes no gradient. Nothing that is hidden, NaN and
    infinity included, reaches the result. Time is that of the visible blocks and memory O(T), by
    the online softmax of FlashAttention-2 (https://arxiv.org/abs/2307.08691).

    **Arguments:**

    - `query`: `[B, T, N, H]`, float32, bfloat16, float16 or float64 (float64 runs in the XLA
      implementation), or a `QuantizedTensor`, through which no gradient flows; so may be key and
      value. Here and everywhere, B may be any number of batch axes, or none.
    - `key`, `value`: `[B, S, K, H]` and `[B, S, K, V]`, of query's batch axes and dtype (unlike
      dtypes are refused with the cast to write). K divides N, and query head n reads kv head
      `n // (N // K)`.
    - `bias`: float, broadcasts to `[B, N, T, S]`, in logit units; -inf, or float32's least number,
      hides a key, but not under a soft cap.
    - `mask`: bool or integers, broadcasts to `[B, N, T, S]`; True and nonzero are visible. Or a
      `BlockMask`, as `block_mask` makes of a predicate.
    - `scale`: default `1 / sqrt(H)`; may be an array, a scalar or one for each query head, `[N]`,
      which then takes a gradient; 16-bit operands are then kept for backward in float32.
    - `is_causal`: key j is visible to query i where `j <= i`, whatever T and S are, or where key's
      position is at most query's.
    - `query_seq_lengths`, `key_value_seq_lengths`: integers `[B]`, clamped to `[0, T]` and
      `[0, S]`; rows and keys at and past them are hidden.
    - `key_value_mask`: bool or integers, `[B, S]` or `[S]`, as a tokenizer's attention mask; keys
      that it has False or 0 for, such as padding, are hidden, and blocks of them are skipped.
    - `local_window_size`: `(left, right)`, or one int for both: key j is visible to query i where
      `i - left <= j <= i + right`, or where their positions are so.
    - `query_offset`: an int, or integers `[B]`: row i stands at position `i + query_offset`.
    - `query_positions`, `key_value_positions`: int32 `[B, T]` and `[B, S]` (or `[T]` and `[S]`), of
      any value and in any order: what `is_causal` and `local_window_size` compare, in place of the
      indices. One of them stands for both where T is S.
    - `query_segment_ids`, `key_value_segment_ids`: likewise; a row sees the keys whose id is its
      own: sequences that are packed into one row of the batch do not see each other.
    - `return_residual`: also return the log-sum-exp of each row.
    - `quantization`: `"int8"`, `"int4"` or an `AttentionQuantization`: how the float arrays among
      query, key and value are quantized first. The gradient is straight through, the exact one at
      the dequantized operands, and backward keeps the codes. A name leaves float keys and values,
      and the query, in float where T is at most 4: a step of generation would make codes of all
      keys to use them once. An `AttentionQuantization` quantizes whatever T is. None computes with
      the operands as given.
    - `logits_soft_cap`: positive c, which turns a logit x into `c * tanh(x / c)`.
    - `sinks`: float `[N]`, a logit for each query head that is in the denominator of the softmax
      alone, after scale and soft cap: `P = exp(x) / (exp(sink) + sum exp(x))`. It takes a gradient.
      -inf is no sink.
    - `dropout_rate`, `dropout_rng`: the part of the probabilities, in `[0, 1)`, that is dropped
      after the softmax, and the key that says which, as `dropout_mask` does; the others are divided
      by `1 - dropout_rate`. The log-sum-exp is that of all. With `broadcast_dropout` all heads of
      all batch entries drop alike.
    - `layout`: `"BTNH"`, or `"BNTH"` for heads before tokens: query `[B, N, T, H]`, key and value
      `[B, K, S, H]`, the output like query, the log-sum-exp `[B, N, T]`. Nothing else changes, and
      the plugin transposes nothing: kernels read and write through strides.
    - `implementation`: `"cpu"` (the plugin's kernels), `"metal"` (a GPU, from buffers of JAX's CPU
      platform; head dims to 256), `"xla"`, `"cudnn"` (an NVIDIA GPU's fused kernels, for 16 bits;
      to them a hidden NaN is not absent where it is causal masking or a window that hides it),
      `"pallas"` (products of INT8 codes in forward, on Hopper GPUs, head dim 128; cuDNN's
      backward), or None, which takes the plugin on the CPU, cuDNN on NVIDIA GPUs where it takes the
      problem, `"pallas"` there for INT8 of 4,096 tokens and more, and XLA elsewhere and for
      float64.
    - `kernel`: the kernel of the plugin, whatever the problem: `"baseline"`; `"gluon"`, which takes
      the softmax in subtiles and fills keys and values ahead of their use; `"decode"` or `"small"`,
      where the problem is of few queries, or of few keys of floats; or a `CpuKernel` or
      `MetalKernel`, for that device alone, with sizes of blocks, which forward takes; or a pair of
      these, for forward and for backward. Without a pair backward takes the kernel of that name if
      it has one. None chooses when the call is traced: by the environment variable
      JAX_GLUON_KERNEL, by the problem where a kernel is made for it, by the table of
      `jax-gluon tune`, else by the size of the problem. `explain` says which and why.

    - `differentiation`: `"reverse"`, first derivatives, by `jax.custom_vjp`; or `"any"`, forward
      mode and every order, by primitives. None takes that of `default_differentiation`, else
      `"reverse"`.

    Under `jax.checkpoint` backward runs forward again, but for what a policy saves by name:
    `jax.checkpoint_policies.save_only_these_names(*jax_gluon.CHECKPOINT_NAMES)` saves all that
    backward takes from forward, which then runs once.

    **Returns:** the output, query's shape with V for H and query's dtype; with `return_residual` a
    pair of it and the natural log-sum-exp `[B, T, N]` (or `[T, N]`) of key's dtype, with the sink
    among its terms, -inf where a row has none, through which no gradient flows
    (`attention_with_log_sum_exp` has one that it does flow through).

    **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
    allowed; `RuntimeError` for a device that there is not; `ImportError` where the plugin is needed
    and can't be loaded.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> query = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> key = value = jax.random.normal(jax.random.key(1), (2, 128, 2, 64))
    >>> jax_gluon.dot_product_attention(query, key, value, is_causal=True).shape
    (2, 128, 8, 64)
    """
    check = Checker("dot_product_attention")
    check.flag("return_residual", return_residual)
    arguments = check_arguments(
        check,
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        key_value_mask=key_value_mask,
        local_window_size=local_window_size,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        query_positions=query_positions,
        key_value_positions=key_value_positions,
        quantization=quantization,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        sinks=sinks,
        layout=layout,
        implementation=implementation,
        kernel=kernel,
        differentiation=differentiation,
    )
    out, log_sum_exp = run(arguments, False)
    if not return_residual:
        return out
    residual = _show_empty_rows(jax.lax.stop_gradient(log_sum_exp))
    return out, residual.astype(arguments.operands.key.dtype)


def attention_with_log_sum_exp(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | BlockMask | None = None,
    **keywords: Unpack[AttentionKeywords],
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Attention and its differentiable log-sum-exp, which merging partial results needs.

    Results over disjoint parts of the keys merge as in section 3.1 of FlashAttention-2
    (https://arxiv.org/abs/2307.08691): weights `exp(log_sum_exp_i - logaddexp(...))`.

    **Arguments:** those of `dot_product_attention` but `return_residual`.

    **Returns:** the output of `dot_product_attention`, and the natural log-sum-exp of each row,
    float32 (float64 for float64 operands) `[B, T, N]` or `[T, N]`: -inf, with gradient 0, where a
    row sees no key, but the sink where there is one.

    **Raises:** as `dot_product_attention`.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(x, x, x)
    >>> log_sum_exp.shape
    (2, 128, 8)
    """
    check = Checker("attention_with_log_sum_exp")
    check.keywords(keywords, KEYWORDS)
    arguments = check_arguments(check, query, key, value, bias, mask, **keywords)
    out, log_sum_exp = run(arguments, True)
    return out, _show_empty_rows(log_sum_exp)


@dataclass(frozen=True)
class Plan:
    """What a call of `dot_product_attention` runs, and why.

    `forward`, `backward` and `backward_bias` are the kernels of the passes; None where XLA
    generates the code, and where there is no bias. `reasons` are those of the implementation, then
    of the kernels that there are, in that order. `jax_gluon.debug.kernels` says what ran.
    """

    implementation: Implementation
    forward: CpuKernel | MetalKernel | None
    backward: CpuKernel | MetalKernel | None
    backward_bias: CpuKernel | MetalKernel | None
    reasons: tuple[str, ...]


def explain(
    query: Float[Operand | jax.ShapeDtypeStruct, "*B T N H"],
    key: Float[Operand | jax.ShapeDtypeStruct, "*B S K H"],
    value: Float[Operand | jax.ShapeDtypeStruct, "*B S K V"],
    bias: Float[ArrayLike | jax.ShapeDtypeStruct, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike | jax.ShapeDtypeStruct, "*#BNTS"] | BlockMask | None = None,
    *,
    return_residual: bool = False,
    **keywords: Any,
) -> Plan:
    """The plan for these arguments of `dot_product_attention`, without running it.

    **Arguments:** those of `dot_product_attention`, arrays or `jax.ShapeDtypeStruct`s.

    **Returns:** a `Plan`; where the choice is left to the platform, the one for
    `jax.default_backend()`.

    **Raises:** as `dot_product_attention`.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jax.ShapeDtypeStruct((2, 128, 8, 64), jnp.float32)
    >>> jax_gluon.explain(x, x, x, implementation="xla").implementation
    'xla'
    """
    checker = Checker("explain")
    checker.flag("return_residual", return_residual)
    checker.keywords(keywords, KEYWORDS)
    arguments: dict[str, Any] = {
        "query": query, "key": key, "value": value, "bias": bias, "mask": mask, **keywords
    }  # fmt: skip
    shapes = {
        name: argument
        for name, argument in arguments.items()
        if isinstance(argument, jax.ShapeDtypeStruct)
    }
    plans: list[Plan] = []

    def check(arrays: dict[str, Any]) -> None:
        checked = check_arguments(checker, **(arguments | arrays))
        plans.append(_plan(checked, arguments.get("implementation")))

    jax.eval_shape(check, shapes)
    return plans[0]


def _plan(arguments: CheckedArguments, implementation: Implementation | None) -> Plan:
    platform = jax.default_backend()
    device: Device | None = "cpu"
    operands = scaled_operands(arguments)
    if implementation is not None:
        reason = f'implementation="{implementation}" was asked for'
        if implementation in choice.IMPLEMENTATIONS:
            _check_cuda(arguments, operands)
            return Plan(implementation, None, None, None, (reason, _ON_CUDA[implementation]))
        device = None if implementation == "xla" else implementation
    elif arguments.operands.query.dtype == jnp.float64:
        device, reason = None, "only the XLA implementation takes float64"
    elif platform == "cpu":
        device, reason = _device_by_size(arguments)
    elif platform == "gpu":
        device, reason = None, _ARRAY_SCALE
        if arguments.scale is None:
            problem = arguments.problem
            chosen, reason = choice.chosen(problem, swapped_operands(problem, operands))
            if chosen != "xla":
                return Plan(chosen, None, None, None, (reason, _ON_CUDA[chosen]))
    else:
        device, reason = None, f'the plugin has no kernels for platform "{platform}"'
    if arguments.left_in_float is not None:
        reason = f"{reason}; {arguments.left_in_float}"
    if device is None:
        reasons = (reason, "XLA generates the code: no kernel to choose")
        return Plan("xla", None, None, None, reasons)
    if device == "metal":
        reason = f'{reason}; it runs on "{_native.metal_device()[0]}"'
    elif refusal := _native.plugin().cpu_isa_refusal():
        reason = f"{reason}; {refusal}"
    query = KernelQuery.of(arguments.problem, operands)
    passes: tuple[Pass, ...] = ("forward", "backward")
    if operands.bias is not None:
        passes = (*passes, "backward_bias")
    chosen = {
        each: choose_kernel(arguments.check, query, each, device, arguments.kernel)
        for each in passes
    }
    kernels = {each: kernel for each, (kernel, _) in chosen.items()}
    reasons = (reason, *(f"{each}: {why}" for each, (_, why) in chosen.items()))
    bias_kernel = kernels.get("backward_bias")
    return Plan(device, kernels["forward"], kernels["backward"], bias_kernel, reasons)


def scaled_operands(arguments: CheckedArguments) -> Operands:
    """The operands of the call, an array scale multiplied into the query."""
    operands = arguments.operands
    if arguments.scale is None:
        return operands
    query = operands.query
    if isinstance(query, QuantizedTensor):
        query = query.dequantize(jnp.float32)
    # In 16 bits the product may overflow, and float operands share a dtype.
    wide = compute_dtype(operands.query.dtype)
    key, value = (
        x if isinstance(x, QuantizedTensor) else x.astype(wide)
        for x in (operands.key, operands.value)
    )
    scale = arguments.scale.astype(wide)
    if scale.ndim:
        is_head_major = arguments.problem.layout == "BNTH"
        scale = scale.reshape((1, -1, 1, 1) if is_head_major else (1, 1, -1, 1))
    return operands._replace(query=query.astype(wide) * scale, key=key, value=value)


def run(
    arguments: CheckedArguments, differentiates_log_sum_exp: bool
) -> tuple[jax.Array, jax.Array]:
    """Output and natural log-sum-exp, finite in empty rows, in the caller's rank."""
    dtype = arguments.operands.query.dtype
    operands = scaled_operands(arguments)
    is_head_major = arguments.problem.layout == "BNTH"
    T, N, _ = shape_of(operands.query, is_head_major)
    S, _, V = shape_of(operands.value, is_head_major)
    B = operands.query.shape[0]
    if 0 in (B, T, S):
        query = jax.tree.leaves(operands.query)[0]
        out = jnp.zeros_like(query, dtype, (B, T, N, V))
        empty = jnp.full_like(
            query, EMPTY_ROW_LOG_SUM_EXP, jnp.promote_types(dtype, "float32"), (B, T, N)
        )
        log_sum_exp = natural_log_sum_exp(jnp.zeros_like(empty), empty, operands.sinks, 1.0)
        out, log_sum_exp = swapped(arguments.problem, (out, log_sum_exp))
    else:
        problem = arguments.problem
        is_any = arguments.differentiation == "any"
        if is_any:  # its formulas know of one layout
            operands = swapped_operands(problem, operands)
            problem = replace(problem, layout="BTNH")
        query = operands.query
        if problem.implementation in choice.IMPLEMENTATIONS:
            _check_cuda(arguments, operands)
        elif problem.implementation != "xla" and _native.has_plugin():
            kernels = kernels_of(arguments.check, problem, operands, arguments.kernel)
            problem = replace(problem, kernels=kernels)
        attend = any_order.attend if is_any else reverse.attend
        with naming_the_argument():
            out, log_sum_exp = on_meshes(
                attend,
                (problem, differentiates_log_sum_exp),
                query.data if isinstance(query, QuantizedTensor) else query,
                operands,
            )
        if is_any:
            out, log_sum_exp = swapped(arguments.problem, (out, log_sum_exp))
        out = out.astype(dtype)
    return arguments.unflatten(out), arguments.unflatten(log_sum_exp)


_ARRAY_SCALE = "cuDNN takes a scale that is a Python number"
_ON_CUDA: dict[str, str] = {
    "cudnn": "cuDNN chooses its kernels",
    "pallas": "forward multiplies codes for Q K^T; backward is cuDNN's, of what they stand for",
}


def _check_cuda(arguments: CheckedArguments, operands: Operands) -> None:
    """Raises where what was asked for, of an NVIDIA GPU, does not take the problem."""
    problem, refusal = arguments.problem, _ARRAY_SCALE
    if arguments.scale is None:
        refusal = choice.refusal(problem, swapped_operands(problem, operands))
    if refusal is not None:
        found = f'"{problem.implementation}", but {refusal}'
        arguments.check.value_error("implementation", found, 'None, "cpu", "metal", "xla"')


# Jitted, because debug_infs looks at every intermediate result outside of jit, constants included.
@_lowering.jit()
def _show_empty_rows(log_sum_exp: jax.Array) -> jax.Array:
    empty = log_sum_exp == jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, log_sum_exp.dtype)
    return jnp.where(empty, jnp.full_like(log_sum_exp, -jnp.inf), log_sum_exp)


def _device_by_size(arguments: CheckedArguments) -> tuple[Device, str]:
    """What the plugin's handlers take where they may choose, and why."""
    query, key, value = arguments.operands[:3]
    is_head_major = arguments.problem.layout == "BNTH"
    B, (T, N, H) = assumed(query.shape[0]), map(assumed, shape_of(query, is_head_major))
    S, V = assumed(shape_of(key, is_head_major)[0]), value.shape[-1]
    products = B * N * T * S * (H + V)
    on_cpu = "the plugin's kernels run on the CPU platform"
    if not _native.may_be_metal():
        return "cpu", on_cpu
    name, why = _native.metal_device()
    if not name:
        return "cpu", f"{on_cpu}; {why}"
    if not _native.takes_metal():
        return "cpu", f"{on_cpu}; the GPU is not used: {_native.metal_refusal()}"
    min_products, why = min_products_of(arguments.problem, arguments.operands)
    if _native.plugin().prefers_metal(products, max(H, V), min_products):
        return "metal", f"{products} multiply-accumulates are enough for the GPU ({why})"
    return "cpu", f"{products} multiply-accumulates are too few for the GPU ({why})"
