"""Scaled dot-product attention with a memory-efficient forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Unpack, cast, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_gluon import _lowering, _native
from jax_gluon._arguments import (
    AttentionKeywords,
    CheckedArguments,
    check_arguments,
    check_flag,
    check_keyword_names,
)
from jax_gluon._meshes import on_meshes
from jax_gluon._plan import kernels
from jax_gluon._plan.selection import KernelConfig
from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    AttentionOperands,
    AttentionProblem,
    Operands,
    Residuals,
    compute_dtype,
)
from jax_gluon._quantization.formats import AttentionQuantization, QuantizedTensor, QuantSpec


@overload
def dot_product_attention(
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[False] = False,
    **keywords: Unpack[AttentionKeywords],
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[True],
    **keywords: Unpack[AttentionKeywords],
) -> tuple[jax.Array, jax.Array]: ...


def dot_product_attention(
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    quantization: str | AttentionQuantization | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    sinks: ArrayLike | None = None,
    implementation: str | None = None,
    kernel: kernels.Wishes = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention `softmax(scale * query key^T + bias) value`, as `jax.nn.dot_product_attention`.

    The logits are `logits_soft_cap(scale * q k^T + bias)`; masks hide keys after that. A row to
    which every key is hidden gives 0 and takes no gradient. Nothing that is hidden, NaN and
    infinity included, reaches the result. Time is that of the visible blocks and memory O(T), by
    the online softmax of FlashAttention-2 (https://arxiv.org/abs/2307.08691).

    **Arguments:**

    - `query`: `[B, T, N, H]` or `[T, N, H]`, float32, bfloat16, float16 or float64 (float64 runs
      in the XLA implementation), or a `QuantizedTensor`, through which no gradient flows; so may be
      key and value.
    - `key`, `value`: `[B, S, K, H]` and `[B, S, K, V]`, of query's rank and dtype. K divides N, and
      query head n reads kv head `n // (N // K)`.
    - `bias`: float, broadcasts to `[B, N, T, S]`, in logit units; -inf, or float32's least number,
      hides a key, but not under a soft cap.
    - `mask`: bool, broadcasts to `[B, N, T, S]`; True is visible.
    - `scale`: default `1 / sqrt(H)`; may be an array, a scalar or one for each query head, `[N]`,
      which then takes a gradient; 16-bit operands are then kept for backward in float32.
    - `is_causal`: key j is visible to query i where `j <= i`, whatever T and S are.
    - `query_seq_lengths`, `key_value_seq_lengths`: integers `[B]`, clamped to `[0, T]` and
      `[0, S]`; rows and keys at and past them are hidden.
    - `local_window_size`: `(left, right)`, or one int for both: key j is visible to query i where
      `i - left <= j <= i + right`.
    - `return_residual`: also return the log-sum-exp of each row.
    - `quantization`: `"int8"`, `"int4"` or an `AttentionQuantization`: how the float arrays among
      query, key and value are quantized first. The gradient is straight through, the exact one at
      the dequantized operands, and backward keeps the codes. None computes with the operands as
      given.
    - `logits_soft_cap`: positive c, which turns a logit x into `c * tanh(x / c)`.
    - `dropout_rate`, `dropout_rng`, `sinks`: only 0, anything and None are supported.
    - `implementation`: `"cpu"` (the plugin's kernels), `"metal"` (a GPU, from buffers of JAX's CPU
      platform; head dims to 256), `"xla"`, or None, which takes the plugin on the CPU and XLA
      elsewhere and for float64.
    - `kernel`: the pipeline of the plugin's kernels: `"baseline"`; `"gluon"`, which takes the
      softmax in subtiles and fills keys and values ahead of their use; or a `KernelConfig`, a
      pipeline with sizes of blocks, which forward takes (backward its pipeline alone); or a pair of
      these, for forward and for backward. None chooses when the call is traced: by the environment
      variable JAX_GLUON_KERNEL, by the table of `jax-gluon tune`, else by the problem. Few
      queries, and the gradient of a bias, have kernels of their own. `explain` says which.

    Under `jax.checkpoint` backward runs forward again, but for what a policy saves by name:
    `jax.checkpoint_policies.save_only_these_names(*jax_gluon.CHECKPOINT_NAMES)` saves all that
    backward takes from forward, which then runs once.

    **Returns:** the output, query's shape with V for H and query's dtype; with `return_residual` a
    pair of it and the natural log-sum-exp `[B, T, N]` (or `[T, N]`) of key's dtype, -inf where a
    row sees no key, through which no gradient flows (`attention_with_log_sum_exp` has one that it
    does flow through).

    **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
    allowed; `NotImplementedError` and `RuntimeError` for choices that this build does not have;
    `ImportError` where the plugin is needed and can't be loaded.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> query = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> key = value = jax.random.normal(jax.random.key(1), (2, 128, 2, 64))
    >>> jax_gluon.dot_product_attention(query, key, value, is_causal=True).shape
    (2, 128, 8, 64)
    """
    function = "dot_product_attention"
    check_flag(function, "return_residual", return_residual)
    arguments = check_arguments(
        function,
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        quantization=quantization,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        sinks=sinks,
        implementation=implementation,
        kernel=kernel,
    )
    out, log_sum_exp = run(arguments, False)
    if not return_residual:
        return out
    residual = _show_empty_rows(jax.lax.stop_gradient(log_sum_exp))
    return out, residual.astype(arguments.operands.key.dtype)


def attention_with_log_sum_exp(
    query: ArrayLike | QuantizedTensor,
    key: ArrayLike | QuantizedTensor,
    value: ArrayLike | QuantizedTensor,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **keywords: Unpack[AttentionKeywords],
) -> tuple[jax.Array, jax.Array]:
    """Attention and its differentiable log-sum-exp, which merging partial results needs.

    Results over disjoint parts of the keys merge as in section 3.1 of FlashAttention-2
    (https://arxiv.org/abs/2307.08691): weights `exp(log_sum_exp_i - logaddexp(...))`.

    **Arguments:** those of `dot_product_attention` but `return_residual`.

    **Returns:** the output of `dot_product_attention`, and the natural log-sum-exp of each row,
    float32 (float64 for float64 operands) `[B, T, N]` or `[T, N]`: -inf, with gradient 0, where a
    row sees no key.

    **Raises:** as `dot_product_attention`.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(x, x, x)
    >>> log_sum_exp.shape
    (2, 128, 8)
    """
    function = "attention_with_log_sum_exp"
    check_keyword_names(function, keywords)
    arguments = check_arguments(function, query, key, value, bias, mask, **keywords)
    out, log_sum_exp = run(arguments, True)
    return out, _show_empty_rows(log_sum_exp)


@dataclass(frozen=True)
class Plan:
    """What a call of `dot_product_attention` runs, and why.

    `forward` and `backward` are the kernels of the passes, None where XLA generates the code; few
    queries have kernels of their own. `reasons` are those of the implementation,
    of the forward kernel and of the backward kernel.
    """

    implementation: str
    forward: KernelConfig | None
    backward: KernelConfig | None
    reasons: tuple[str, ...]


def explain(
    query: ArrayLike | QuantizedTensor | jax.ShapeDtypeStruct,
    key: ArrayLike | QuantizedTensor | jax.ShapeDtypeStruct,
    value: ArrayLike | QuantizedTensor | jax.ShapeDtypeStruct,
    bias: ArrayLike | jax.ShapeDtypeStruct | None = None,
    mask: ArrayLike | jax.ShapeDtypeStruct | None = None,
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
    function = "explain"
    check_flag(function, "return_residual", return_residual)
    check_keyword_names(function, keywords)
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
        checked = check_arguments(function, **(arguments | arrays))
        plans.append(_plan(checked, arguments.get("implementation"), arguments.get("kernel")))

    jax.eval_shape(check, shapes)
    return plans[0]


def _plan(arguments: CheckedArguments, implementation: str | None, kernel: kernels.Wishes) -> Plan:
    platform = jax.default_backend()
    if implementation is not None:
        reason = f'implementation="{implementation}" was asked for'
    elif arguments.operands.query.dtype == jnp.float64:
        implementation, reason = "xla", "only the XLA implementation takes float64"
    elif platform == "cpu":
        implementation, reason = _device_by_size(arguments)
    else:
        implementation, reason = "xla", f'the plugin has no kernels for platform "{platform}"'
    if implementation == "xla":
        reasons = (reason, "XLA generates the code: no kernel to choose")
        return Plan(implementation, None, None, reasons)
    if implementation == "metal":
        reason = f'{reason}; it runs on "{_native.metal_device()[0]}"'
    forward, backward = (
        kernels.choose(
            kernels.kernel_problem(arguments.problem, arguments.operands, direction),
            implementation,
            kernel,
        )
        for direction in ("forward", "backward")
    )
    reasons = (reason, f"forward: {forward[1]}", f"backward: {backward[1]}")
    return Plan(implementation, forward[0], backward[0], reasons)


def run(
    arguments: CheckedArguments, differentiates_log_sum_exp: bool
) -> tuple[jax.Array, jax.Array]:
    """Output and natural log-sum-exp, finite in empty rows, in the caller's rank."""
    operands = arguments.operands
    dtype = operands.query.dtype
    if arguments.scale is not None:
        query = operands.query
        if isinstance(query, QuantizedTensor):
            query = query.dequantize(jnp.float32)
        # In 16 bits the product may overflow, and float operands share a dtype.
        wide = compute_dtype(dtype)
        key, value = (
            x if isinstance(x, QuantizedTensor) else x.astype(wide)
            for x in (operands.key, operands.value)
        )
        scale = arguments.scale.astype(wide)
        if scale.ndim:
            scale = scale.reshape(1, 1, -1, 1)
        query = query.astype(wide) * scale
        operands = operands._replace(query=query, key=key, value=value)
    B, T, N, _ = operands.query.shape
    _, S, _, V = operands.value.shape
    if 0 in (B, T, S):
        query = jax.tree.leaves(operands.query)[0]
        out = jnp.zeros_like(query, dtype, (B, T, N, V))
        log_sum_exp = jnp.full_like(
            query, EMPTY_ROW_LOG_SUM_EXP, jnp.promote_types(dtype, "float32"), (B, T, N)
        )
    else:
        query = operands.query
        out, log_sum_exp = on_meshes(
            _attend,
            (arguments.problem, differentiates_log_sum_exp),
            query.data if isinstance(query, QuantizedTensor) else query,
            operands,
        )
        out = out.astype(dtype)
    return (out, log_sum_exp) if arguments.is_batched else (out[0], log_sum_exp[0])


# Jitted, because debug_infs looks at every intermediate result outside of jit, constants included.
@_lowering.jit()
def _show_empty_rows(log_sum_exp: jax.Array) -> jax.Array:
    empty = log_sum_exp == jnp.asarray(EMPTY_ROW_LOG_SUM_EXP, log_sum_exp.dtype)
    return jnp.where(empty, jnp.full_like(log_sum_exp, -jnp.inf), log_sum_exp)


# The log-sum-exp is an output of both forms, for the residual; only where the static flag is set
# does its cotangent reach the backward call.


def _attend_primal(
    problem: AttentionProblem, differentiates_log_sum_exp: bool, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(problem, differentiates_log_sum_exp, operands)[0]


def _attend_forward(
    problem: AttentionProblem, differentiates_log_sum_exp: bool, operands: Operands
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    del differentiates_log_sum_exp
    log_sum_exp, residuals = _lowering.forward(problem, operands.query.dtype, operands)
    return (residuals.out, log_sum_exp), residuals


def _attend_backward(
    problem: AttentionProblem,
    differentiates_log_sum_exp: bool,
    residuals: Residuals,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Any]:
    d_out, d_natural = cotangents
    d_log_sum_exp = d_natural if differentiates_log_sum_exp else None
    gradients = _lowering.backward(problem, residuals, d_out, d_log_sum_exp)

    def of(
        x: jax.Array | QuantizedTensor, spec: QuantSpec | None, gradient: jax.Array
    ) -> jax.Array | None:
        # None, which is zero, for operands that came as codes.
        is_given = isinstance(x, QuantizedTensor) and spec is None
        return None if is_given else gradient.astype(x.dtype)

    d_query, d_key, d_value = map(of, residuals.operands[:3], problem.quantization, gradients)
    d_bias = None
    if residuals.operands.bias is not None:
        d_bias = _lowering.backward_bias(problem, residuals, d_out, d_log_sum_exp)
    return (cast(Any, AttentionOperands)(d_query, d_key, d_value, d_bias),)


_with_gradient = cast(Any, jax.custom_vjp(_attend_primal, nondiff_argnums=(0, 1)))
_with_gradient.defvjp(_attend_forward, _attend_backward)
_attend = cast(
    Callable[[AttentionProblem, bool, Operands], tuple[jax.Array, jax.Array]],
    _with_gradient,
)


def _device_by_size(arguments: CheckedArguments) -> tuple[str, str]:
    """What the plugin's handlers take where they may choose, and why."""
    query, key, value = arguments.operands[:3]
    B, T, N, H = query.shape
    S, V = key.shape[1], value.shape[-1]
    products = B * N * T * S * (H + V)
    if _native.plugin().prefers_metal(products, max(H, V)) and _native.metal_device()[0]:
        return "metal", f"{products} multiply-accumulates are enough for the GPU"
    return "cpu", "the plugin's kernels run on the CPU platform"
