"""The implementations that are timed, each in its best form, by name.

A name is `family dtype`. `make(name, problem)` gives `run`, which computes and waits, and `head`,
which takes its result to output `[T, V]` of batch 0, head 0 as float64 (None for gradients).
"""

from __future__ import annotations

import numpy as np

from benchmarks.peers import PEERS, Made, is_installed, takes
from benchmarks.problem import Problem

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
    "openvino float32",
    "openvino bfloat16",
    "onnxruntime float32",
)


def available(name: str) -> bool:
    family = name.split()[0]
    return family not in PEERS or is_installed(family)


def computes(name: str, problem: Problem) -> bool:
    family = name.split()[0]
    return family not in PEERS or takes(family, problem)


def make(name: str, problem: Problem, threads: int) -> Made:
    family, dtype = name.split()
    if family in PEERS:
        return PEERS[family](dtype, problem, threads)
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
