"""`python -m benchmarks.decode`: one query over a long cache, as in generating token by token.

Implementations take turns in one process on one core; times are those of the processor. JAX's peers
read float32 caches in their best layout, `[B, N, S, H]`; jax-gluon reads `[B, S, K, H]`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from benchmarks.report import machine


def _einsum(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    logits = jnp.einsum("bnth,bnsh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(logits), v)


def _cases(heads: int, tokens: int, width: int) -> dict[str, tuple[Callable[..., Any], tuple]]:
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((1, count, heads, width), np.float32) for count in (1, tokens, tokens)
    )
    swapped = [jnp.asarray(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (query, key, value)]
    plain = [jnp.asarray(x) for x in (query, key, value)]
    attend = jax.jit(lambda q, k, v: jax_gluon.dot_product_attention(q, k, v))
    cases: dict[str, tuple[Callable[..., Any], tuple]] = {
        "einsum float32": (jax.jit(_einsum), tuple(swapped)),
        "jax.nn float32": (jax.jit(jax.nn.dot_product_attention), tuple(plain)),
        "gluon float32": (attend, tuple(plain)),
    }
    for name in ("int8", "int4"):
        cache = jax_gluon.QuantizedKVCache.create(1, tokens, heads, width, quantization=name)
        cache = cache.append(plain[1], plain[2])
        attention = jax.jit(lambda cache, q: cache.attention(q))
        cases[f"gluon {name} cache"] = (attention, (cache, plain[0]))
    return cases


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cases = _cases(options.heads, options.tokens, options.width)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (run, operands) in cases.items():
            jax.block_until_ready(run(*operands))
            start = time.process_time()
            for _ in range(3):
                jax.block_until_ready(run(*operands))
            times[name].append((time.process_time() - start) / 3)
    print("Machine: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"B1, {options.heads} heads, {options.tokens} tokens, H{options.width}, one core\n")
    print("| implementation | median ms | spread | times the best float32 of JAX |")
    print("|---|---|---|---|")
    medians = {name: statistics.median(x) for name, x in times.items()}
    best = min(medians["einsum float32"], medians["jax.nn float32"])
    for name, median in medians.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        print(
            f"| {name} | {median * 1e3:.2f} | {(high - low) / median:.0%} | {best / median:.2f} |"
        )


if __name__ == "__main__":
    main()
