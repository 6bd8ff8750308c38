"""`python -m benchmarks.nvidia`: what runs on an NVIDIA GPU beside calls of cuDNN, in turns.

Times are of batches of calls that are launched one after the other, by the wall clock; ratios are
of medians over rounds in which both sides take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import jax_gluon


@dataclass(frozen=True)
class Row:
    """Sizes of a problem, of bfloat16 operands."""

    B: int
    N: int
    T: int
    H: int
    is_causal: bool = False
    K: int | None = None
    S: int | None = None

    def __str__(self) -> str:
        grouped = "" if self.K is None else f" K{self.K}"
        keys = "" if self.S is None else f" S{self.S}"
        causal = " causal" if self.is_causal else ""
        return f"B{self.B} N{self.N}{grouped} T{self.T}{keys} H{self.H}{causal}"

    def operands(self) -> list[jax.Array]:
        def draw(seed: int, T: int, N: int) -> jax.Array:
            return jax.random.normal(jax.random.key(seed), (self.B, T, N, self.H), jnp.bfloat16)

        S, K = self.S or self.T, self.K or self.N
        return [draw(0, self.T, self.N), draw(1, S, K), draw(2, S, K), draw(3, self.T, self.N)]


ROWS = (
    Row(4, 16, 2048, 128),
    Row(4, 16, 2048, 128, is_causal=True),
    Row(2, 24, 4608, 128),
    Row(1, 16, 16384, 128),
    Row(1, 16, 16384, 128, is_causal=True),
    Row(4, 16, 2048, 64),
)
DECODE = Row(8, 32, 1, 128, K=8, S=32768)
Attention = Callable[..., jax.Array]


# Keys of a head share a scale in blocks: products of their codes need no multiply for each score.
BLOCKS = jax_gluon.AttentionQuantization(
    jax_gluon.QuantSpec(),
    jax_gluon.QuantSpec(granularity="block", block_size=128, center=True),
)


def attentions(is_causal: bool) -> dict[str, Attention]:
    """Ways to the result, by name; those of Pallas take a head dim of 128."""

    def ours(**keywords: Any) -> Attention:
        return lambda *x: jax_gluon.dot_product_attention(*x, is_causal=is_causal, **keywords)

    def of_jax(implementation: Any) -> Attention:
        return lambda *x: jax.nn.dot_product_attention(
            *x, is_causal=is_causal, implementation=implementation
        )

    return {
        "cudnn": of_jax("cudnn"),
        "jax_gluon": ours(),
        "jax_gluon int8": ours(quantization="int8"),
        "pallas int8": ours(quantization="int8", implementation="pallas"),
        "pallas blocks": ours(quantization=BLOCKS, implementation="pallas"),
        "jax_gluon xla": ours(implementation="xla"),
        "jax.nn xla": of_jax("xla"),
    }


def passes(attend: Attention, direction: str) -> Callable[..., Any]:
    """Forward, or output and all gradients."""
    if direction == "forward":
        return jax.jit(lambda q, k, v, d_out: attend(q, k, v))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    return jax.jit(both)


def _time(run: Callable[..., Any], operands: list[jax.Array], calls: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = run(*operands)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def measure(
    runs: dict[str, Callable[..., Any]], operands: list[jax.Array], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    calls = {}
    for name, run in runs.items():
        jax.block_until_ready(run(*operands))
        calls[name] = max(2, min(50, round(0.03 / _time(run, operands, 2))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        # Back and forth: what runs after a long product finds another clock.
        for name in list(runs)[:: -1 if i % 2 else 1]:
            times[name].append(_time(runs[name], operands, calls[name]))
    return {name: 1e3 * statistics.median(x) for name, x in times.items()}


def main() -> None:
    names = list(attentions(False))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nvidia", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    parser.add_argument("--directions", nargs="+", default=["forward", "both"])
    parser.add_argument("--decode", action="store_true", help="one query over a long cache")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.rounds} rounds\n")
    print("| problem | pass |" + "".join(f" {name} |" for name in options.names))
    print("|---|---|" + "---|" * len(options.names))
    for row in (DECODE,) if options.decode else ROWS:
        operands = row.operands()
        for direction in ("forward",) if options.decode else options.directions:
            every = attentions(row.is_causal)
            taken = [x for x in options.names if row.H == 128 or not x.startswith("pallas")]
            runs = {name: passes(every[name], direction) for name in taken}
            times = measure(runs, operands, options.rounds)
            base = times[taken[0]]
            cells = [
                f"{times[x]:.3f} ({base / times[x]:.2f})" if x in times else ""
                for x in options.names
            ]
            print(f"| {row} | {direction} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
