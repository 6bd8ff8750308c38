"""The implementations that are timed, each in its best form, by name.

A name is `family dtype`. `make(name, problem)` gives `run`, which computes and waits, and `head`,
which takes its result to output `[T, V]` of batch 0, head 0 as float64 (None for gradients).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.problem import Problem

Made = tuple[Callable[[], Any], Callable[[Any], np.ndarray] | None]

NAMES = (
    "gluon float32",
    "gluon bfloat16",
    "gluon int8",
    "jax.nn float32",
    "jax.nn bfloat16",
    "einsum float32",
    "einsum bfloat16",
    "torch float32",
    "torch bfloat16",
)


def available(name: str) -> bool:
    return not name.startswith("torch") or importlib.util.find_spec("torch") is not None


def make(name: str, problem: Problem, threads: int) -> Made:
    family, dtype = name.split()
    if family == "torch":
        return _torch(dtype, problem, threads)
    return _jax(family, dtype, problem)


def _jax(family: str, dtype: str, problem: Problem) -> Made:
    import jax
    import jax.numpy as jnp

    operands = problem.operands()
    bias = problem.bias()
    head_major = family == "einsum"
    if head_major:
        query, key, value, d_out = (x.transpose(0, 2, 1, 3) for x in operands)
        # The rows of all query heads of a kv head, one after the other.
        rows = (problem.N // problem.kv_heads) * problem.T
        query, d_out = (
            x.reshape(problem.B, problem.kv_heads, rows, x.shape[3]) for x in (query, d_out)
        )
        operands = (query, key, value, d_out)
        if bias is not None:
            bias = bias.reshape(1, problem.kv_heads, rows, problem.keys)
    element = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    query, key, value, d_out = (jnp.asarray(x, element) for x in operands)
    added = () if bias is None else (jnp.asarray(bias, element),)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, *bias: jax.Array) -> jax.Array:
        if family == "gluon":
            import jax_gluon

            return jax_gluon.dot_product_attention(
                q, k, v, *bias, is_causal=problem.is_causal, implementation="cpu",
                quantization=dtype if dtype.startswith("int") else None,
            )  # fmt: skip
        if family == "jax.nn":
            # It takes no values that are narrower than keys.
            padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, problem.H - problem.value_dim)))
            out = jax.nn.dot_product_attention(q, k, padded, *bias, is_causal=problem.is_causal)
            return out[..., : problem.value_dim]
        # Head-major with no transposes: XLA fuses this form where nothing is masked.
        logits = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)
        logits *= problem.H**-0.5
        for x in bias:
            logits += x
        if problem.is_causal:
            seen = jnp.tril(jnp.ones((problem.T, problem.keys), bool))
            seen = jnp.tile(seen, (problem.N // problem.kv_heads, 1))
            logits = jnp.where(seen, logits, -1e30)
        return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(logits).astype(element), v)

    if problem.direction == "both":
        both = jax.jit(
            lambda g, q, k, v, *bias: jax.vjp(lambda *x: attention(*x, *bias), q, k, v)[1](g)
        )
        return lambda: jax.block_until_ready(both(d_out, query, key, value, *added)), None
    forward = jax.jit(attention)

    def head(out: jax.Array) -> np.ndarray:
        return np.asarray(out[0, 0, : problem.T] if head_major else out[0, :, 0], np.float64)

    return lambda: forward(query, key, value, *added).block_until_ready(), head


def _torch(dtype: str, problem: Problem, threads: int) -> Made:
    import torch

    torch.set_num_threads(threads)
    element = getattr(torch, dtype)
    query, key, value, d_out = (
        torch.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 1, 3))).to(element)
        for x in problem.operands()
    )
    bias = problem.bias()
    mask = None if bias is None else torch.from_numpy(bias).to(element)

    def attention(*operands: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            *operands, attn_mask=mask, is_causal=problem.is_causal,
            enable_gqa=problem.kv_heads != problem.N,
        )  # fmt: skip

    if problem.direction == "both":
        inputs = tuple(x.requires_grad_() for x in (query, key, value))
        return lambda: torch.autograd.grad(attention(*inputs), inputs, d_out), None

    def forward() -> Any:
        with torch.no_grad():
            return attention(query, key, value)

    return forward, lambda out: out[0, 0].double().numpy()
