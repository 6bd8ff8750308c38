"""Query, key and value, checked."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_gluon import _native
from jax_gluon._errors import FLOATS, Checker
from jax_gluon._quantization.formats import QuantizedTensor, check_parts


def operand(check: Checker, argument: str, x: Any) -> jax.Array | QuantizedTensor:
    if not isinstance(x, QuantizedTensor):
        return check.array(argument, x)
    wrong = check_parts(x) if x.ndim in (3, 4) else None
    if wrong:
        found = f"a QuantizedTensor whose {wrong}"
        check.value_error(argument, found, "parts as jax_gluon.quantize makes")
    return x


def shape_of(x: jax.Array | QuantizedTensor, is_head_major: bool) -> tuple[int, int, int]:
    """Tokens, heads and head dim."""
    first, second, head_dim = x.shape[-3:]
    return (second, first, head_dim) if is_head_major else (first, second, head_dim)


def check_batch(
    check: Checker, arrays: dict[str, jax.Array | QuantizedTensor], is_head_major: bool
) -> tuple[int, ...]:
    """The batch axes, which the operands share: unlike ones of equal product are not paired."""
    for name, x in arrays.items():
        if x.ndim < 3:
            tokens, heads = ("T", "N") if name == "query" else ("S", "K")
            axes = f"{heads}, {tokens}" if is_head_major else f"{tokens}, {heads}"
            check.value_error(name, f"of rank {x.ndim}", f"rank 3 or more, [..., {axes}, H]")
        if is_head_major and isinstance(x, QuantizedTensor):
            check.value_error("layout", f'"BNTH" beside {name} in codes', '"BTNH", as codes are')
    query = arrays["query"]
    for name, x in arrays.items():
        if x.ndim != query.ndim:
            check.value_error(name, f"of rank {x.ndim}", f"query's rank, {query.ndim}")
        if x.shape[:-3] != query.shape[:-3]:
            own, allowed = list(x.shape[:-3]), list(query.shape[:-3])
            check.value_error(name, f"of batch axes {own}", f"query's, {allowed}")
    return tuple(query.shape[:-3])


def one_batch_axis(
    x: jax.Array | QuantizedTensor, batch: tuple[int, ...]
) -> jax.Array | QuantizedTensor:
    if len(batch) == 1:
        return x

    def reshaped(part: jax.Array) -> jax.Array:
        return part.reshape(math.prod(batch), *part.shape[len(batch) :])

    return jax.tree.map(reshaped, x)


def check_shapes(
    check: Checker,
    q: jax.Array | QuantizedTensor,
    k: jax.Array | QuantizedTensor,
    v: jax.Array | QuantizedTensor,
    is_head_major: bool,
) -> None:
    (_, N, H), (S, K, H_k), (S_v, K_v, _) = (shape_of(x, is_head_major) for x in (q, k, v))
    for name, x in (("query", q), ("key", k), ("value", v)):
        for extent, what in zip(shape_of(x, is_head_major)[1:], ("heads", "head dim"), strict=True):
            if extent == 0:
                check.value_error(name, f"of {what} 0 (shape {x.shape})", "at least 1")
    if H_k != H:
        check.value_error("key", f"of head dim {H_k}", f"query's head dim, {H}")
    if S_v != S:
        check.value_error("value", f"of length {S_v}", f"key's length, {S}")
    if K_v != K:
        check.value_error("value", f"of {K_v} heads", f"key's number of heads, {K}")
    if N % K:
        check.value_error("query", f"of {N} heads", f"a multiple of key's {K} heads")


def check_dtypes(
    check: Checker,
    arrays: dict[str, jax.Array | QuantizedTensor],
    implementation: str | None,
) -> bool:
    """Whether the operands are float64. Float arrays share a dtype; codes go with any."""
    floats = {name: x for name, x in arrays.items() if not isinstance(x, QuantizedTensor)}
    first = next(iter(floats), "query")
    dtype = arrays[first].dtype
    for name, x in floats.items():
        if x.dtype.name not in FLOATS:
            check.type_error(name, f"of dtype {x.dtype.name}", ", ".join(FLOATS))
    for name, x in floats.items():
        if x.dtype != dtype:
            # A promotion of its own would copy a cache of keys and values at each step.
            common = jnp.result_type(*floats.values())
            casts = [f"{n}.astype(jnp.{common})" for n, y in floats.items() if y.dtype != common]
            allowed = f"{first}'s dtype, {dtype.name}; write {' and '.join(casts)}"
            check.type_error(name, f"of dtype {x.dtype.name}", allowed)
    is_float64 = jnp.float64 in (dtype, arrays["query"].dtype)
    if is_float64 and implementation not in ("xla", None):
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
