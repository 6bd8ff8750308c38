"""`python -m benchmarks.features`: what arguments of attention cost, each beside a call without it.

Packed sequences are timed against as many rows of a batch, positions against the window that they
spell out, a sparse mask against none; dropout and sinks against a call that has neither. Both sides
take turns in one process, on the same random operands. Times are those of the processor; run it on
one core (`taskset -c 0`). A ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from benchmarks.report import machine

Attention = Callable[..., jax.Array]
FORMATS = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Side:
    """Keywords of a call, and how many batch entries the tokens are cut into."""

    keywords: dict[str, Any]
    batch: int = 1


def features(tokens: int, heads: int) -> dict[str, tuple[Side, Side]]:
    """Each feature, and what it is compared with."""
    at = np.arange(tokens, dtype=np.int32)
    blocks = np.random.default_rng(1).random((tokens // 128, tokens // 128)) < 0.1
    mask = jnp.asarray(np.kron(blocks, np.ones((128, 128), bool))[None, None])
    shown = jnp.asarray(blocks)
    block_mask = jax_gluon.block_mask(lambda b, h, i, j: shown[i // 128, j // 128], tokens, tokens)
    key = jax.random.key(0)
    causal = dict(is_causal=True)
    packed = dict(is_causal=True, query_segment_ids=at // 512, query_positions=at % 512)
    return {
        "packed in 512s": (Side(packed), Side(causal, tokens // 512)),
        "window by positions": (
            Side(dict(local_window_size=(256, 0), query_positions=at)),
            Side(dict(local_window_size=(256, 0))),
        ),
        "a tenth of mask blocks": (Side(dict(mask=mask)), Side({})),
        "a tenth, a BlockMask": (Side(dict(mask=block_mask)), Side({})),
        "dropout": (Side(dict(dropout_rate=0.1, dropout_rng=key)), Side({})),
        "sinks": (Side(dict(sinks=jnp.zeros(heads))), Side({})),
    }


def function(side: Side, format_name: str, is_gradient: bool) -> Attention:
    """The jitted call of a side, or its gradient by query, key and value."""
    quantization: Any = format_name if format_name.startswith("int") else None

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax_gluon.dot_product_attention(
            query, key, value, quantization=quantization, **side.keywords
        )

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(attention(*operands).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if is_gradient else attention)


def compare(
    sides: tuple[Side, Side],
    format_name: str,
    is_gradient: bool,
    shape: tuple[int, ...],
    rounds: int,
) -> tuple[float, float]:
    """Median seconds of both sides, after a call of each that compiles."""
    dtype = "float32" if format_name.startswith("int") else format_name
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(3)]
    calls: list[Callable[[], Any]] = []
    for side in sides:
        operands = [x.reshape(side.batch, -1, *shape[2:]) for x in drawn]
        run = function(side, format_name, is_gradient)
        calls.append(lambda run=run, operands=operands: jax.block_until_ready(run(*operands)))
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if turn:
                own.append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 512")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=("float32", "int8"))
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    options = parser.parse_args(arguments)
    here = machine()
    print(f"Machine: {', '.join(f'{name} {value}' for name, value in here.items())}")
    given = sys.argv[1:] if arguments is None else arguments
    print(f"Command: python -m benchmarks.features {shlex.join(given)}\n")
    print("| feature | operands | pass | with, ms | without, ms | ratio |")
    print("|---|---|---|---|---|---|")
    shape = (1, options.length, options.heads, options.head_dim)
    for name, sides in features(options.length, options.heads).items():
        for format_name in options.formats:
            for is_gradient in (False, True):
                with_it, without = compare(sides, format_name, is_gradient, shape, options.rounds)
                passes = "forward and backward" if is_gradient else "forward"
                print(
                    f"| {name} | {format_name} | {passes} | {1e3 * with_it:.1f} | "
                    f"{1e3 * without:.1f} | {with_it / without:.2f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
