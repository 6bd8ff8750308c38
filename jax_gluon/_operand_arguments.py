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


def check_batch(check: Checker, arrays: dict[str, jax.Array | QuantizedTensor]) -> tuple[int, ...]:
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
