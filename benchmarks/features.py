"""`python -m benchmarks.features`: what arguments of attention cost, each beside a call without it.

Packed sequences are timed against as many rows of a batch, positions against the window that they
spell out, a sparse mask against none; dropout and sinks against a call that has neither; forward
mode against forward alone, and gradients by `differentiation="any"` against those by default. Both
sides take turns in one process, on the same random operands. Times are those of the processor; run
it on one core (`taskset -c 0`). A ratio is that of the medians.
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
    """Keywords of a call, what is computed of it, and into how many batch entries tokens are cut.

    `derivative` is `"none"`, `"forward"` (the call and its tangent) or `"reverse"` (gradients of
    query, key and value).
    """

    keywords: dict[str, Any]
    batch: int = 1
    derivative: str = "none"


@dataclass(frozen=True)
class Row:
    """What is compared: names for the table, and the side with it and the one without."""

    feature: str
    passes: str
    sides: tuple[Side, Side]


def rows(tokens: int, heads: int) -> list[Row]:
    """Each argument, forward and with gradients; then derivatives themselves."""
    at = np.arange(tokens, dtype=np.int32)
    count = tokens // 128
    shown = np.zeros(count * count, bool)
    shown[np.random.default_rng(1).permutation(count * count)[: round(0.1 * count * count)]] = True
    shown = shown.reshape(count, count)
    mask = jnp.asarray(np.kron(shown, np.ones((128, 128), bool))[None, None])
    blocks = jnp.asarray(shown)
    block_mask = jax_gluon.block_mask(lambda b, h, i, j: blocks[i // 128, j // 128], tokens, tokens)
    causal = dict(is_causal=True)
    window = dict(local_window_size=(256, 0))
    compared: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "packed in 512s": (
            dict(is_causal=True, query_segment_ids=at // 512, query_positions=at % 512),
            causal,
        ),
        "window by positions": (dict(query_positions=at, **window), window),
        "a tenth of mask blocks": (dict(mask=mask), {}),
        "a tenth, a BlockMask": (dict(mask=block_mask), {}),
        "dropout": (dict(dropout_rate=0.1, dropout_rng=jax.random.key(0)), {}),
        "sinks": (dict(sinks=jnp.zeros(heads)), {}),
    }
    found: list[Row] = []
    for feature, (with_it, without) in compared.items():
        batch = tokens // 512 if feature.startswith("packed") else 1
        for passes, derivative in (("forward", "none"), ("forward and backward", "reverse")):
            sides = Side(with_it, 1, derivative), Side(without, batch, derivative)
            found.append(Row(feature, passes, sides))
    for name, keywords in (("", {}), (", causal", causal)):
        any_order = dict(differentiation="any", **keywords)
        forward_mode = Side(any_order, derivative="forward"), Side(keywords)
        found.append(Row(f"forward mode{name}", "jvp, beside forward", forward_mode))
        reverse = Side(any_order, derivative="reverse"), Side(keywords, derivative="reverse")
        found.append(Row(f'differentiation="any"{name}', "forward and backward", reverse))
    return found


def function(side: Side, format_name: str) -> Attention:
    """The jitted call of a side, or a derivative of it; its tangents are its operands, rolled."""
    quantization: Any = format_name if format_name.startswith("int") else None

    def attention(*operands: jax.Array) -> jax.Array:
        return jax_gluon.dot_product_attention(
            *operands, quantization=quantization, **side.keywords
        )

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(attention(*operands).astype(jnp.float32))

    def forward_mode(*operands: jax.Array) -> Any:
        return jax.jvp(attention, operands, (*operands[1:], operands[0]))

    computed: dict[str, Callable[..., Any]] = {
        "none": attention,
        "forward": forward_mode,
        "reverse": jax.grad(loss, argnums=(0, 1, 2)),
    }
    return jax.jit(computed[side.derivative])


def compare(
    sides: tuple[Side, Side], format_name: str, shape: tuple[int, ...], rounds: int
) -> tuple[float, float]:
    """Median seconds of both sides, after a call of each that compiles."""
    dtype = "float32" if format_name.startswith("int") else format_name
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(3)]
    calls: list[Callable[[], Any]] = []
    for side in sides:
        operands = [x.reshape(side.batch, -1, *shape[2:]) for x in drawn]
        run = function(side, format_name)
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
    for row in rows(options.length, options.heads):
        for format_name in options.formats:
            with_it, without = compare(row.sides, format_name, shape, options.rounds)
            print(
                f"| {row.feature} | {format_name} | {row.passes} | {1e3 * with_it:.1f} | "
                f"{1e3 * without:.1f} | {with_it / without:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
