"""`python -m benchmarks.decode`: a few queries over a long cache, as in generating token by token.

Implementations take turns in one process on one core; times are those of the processor. JAX's
`einsum` reads float32 caches in the layout that suits it best, `[B, K, S, H]`, with the rows of a
group one after the other; jax-gluon reads `[B, S, K, H]`. The rate at which the core reads memory
in order is measured in the same rounds, by a sum over an array of 256 MiB.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from benchmarks.report import machine
from benchmarks.timing import processor_time, use_one_core


@dataclass(frozen=True)
class Shape:
    """Of `heads` kv heads, each read by `group` query heads."""

    heads: int
    group: int
    tokens: int
    width: int
    queries: int = 1

    def __str__(self) -> str:
        group = f" x {self.group}" if self.group > 1 else ""
        return f"{self.heads}{group} heads, S{self.tokens}, H{self.width}, T{self.queries}"


SHAPES = (
    Shape(32, 1, 4096, 128),
    Shape(32, 1, 4096, 64),
    Shape(32, 1, 4096, 128, queries=4),
    Shape(8, 4, 4096, 128),
    Shape(4, 8, 4096, 128),
    Shape(8, 4, 32768, 128),
    Shape(32, 1, 512, 128),
)
READ_BYTES = 256 * 2**20


def _einsum(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    logits = jnp.einsum("bkrh,bksh->bkrs", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bkrs,bksh->bkrh", jax.nn.softmax(logits), v)


def cases(shape: Shape) -> dict[str, tuple[Callable[..., Any], tuple]]:
    rng = np.random.default_rng(0)
    heads, tokens, width = shape.heads, shape.tokens, shape.width
    query = rng.standard_normal((1, shape.queries, heads * shape.group, width), np.float32)
    key, value = (rng.standard_normal((1, tokens, heads, width), np.float32) for _ in range(2))
    by_head = query.reshape(1, shape.queries, heads, shape.group, width).transpose(0, 2, 3, 1, 4)
    by_head = by_head.reshape(1, heads, shape.group * shape.queries, width)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (key, value)]
    head_major = tuple(jnp.asarray(x) for x in (np.ascontiguousarray(by_head), *swapped))
    plain = tuple(jnp.asarray(x) for x in (query, key, value))
    made: dict[str, tuple[Callable[..., Any], tuple]] = {
        "einsum": (jax.jit(_einsum), head_major),
        "jax.nn": (jax.jit(jax.nn.dot_product_attention), plain),
        "float32": (jax.jit(lambda q, k, v: jax_gluon.dot_product_attention(q, k, v)), plain),
    }
    for name in ("int8", "int4"):
        cache = jax_gluon.QuantizedKVCache.create(1, tokens, heads, width, quantization=name)
        cache = cache.append(plain[1], plain[2])
        made[name] = (jax.jit(lambda cache, q: cache.attention(q)), (cache, plain[0]))
    return made


def _bytes(operands: tuple) -> int:
    """Of keys and values with their scales; the query is small."""
    return sum(x.nbytes for x in jax.tree.leaves(operands))


def row(shape: Shape, rounds: int) -> str:
    made = cases(shape)
    words = np.arange(READ_BYTES // 8, dtype=np.uint64)
    read_rates: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        read_rates.append(READ_BYTES / processor_time(words.sum, 1))
        for name, (run, operands) in made.items():
            jax.block_until_ready(run(*operands))
            times[name].append(
                processor_time(lambda f=run, x=operands: jax.block_until_ready(f(*x)), 3)
            )
    medians = {name: statistics.median(x) for name, x in times.items()}
    rate = statistics.median(read_rates)
    best = min(medians["einsum"], medians["jax.nn"])
    cells = [str(shape), *(f"{medians[name] * 1e3:.2f}" for name in made)]
    cells += [f"{best / medians[name]:.2f}" for name in ("float32", "int8", "int4")]
    for name in ("float32", "int8", "int4"):
        cells.append(f"{_bytes(made[name][1]) / medians[name] / rate:.0%}")
    return "| " + " | ".join([*cells, f"{rate / 1e9:.0f}"]) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    use_one_core()
    print("Machine: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    print("B1, one core; ms; times the best of JAX; share of the rate of reading memory, GB/s\n")
    names = ("einsum", "jax.nn", "float32", "int8", "int4")
    ratios = ("float32", "int8", "int4")
    header = ["cache", *names, *(f"{x} / JAX" for x in ratios), *(f"{x} share" for x in ratios)]
    print("| " + " | ".join([*header, "GB/s"]) + " |")
    print("|" + "---|" * (len(header) + 1))
    for shape in SHAPES:
        print(row(shape, options.rounds), flush=True)


if __name__ == "__main__":
    main()
