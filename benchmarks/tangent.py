"""`python -m benchmarks.tangent`: what forward mode costs beside the forward pass alone.

Both take turns in one process, on the same random operands, with tangents of query, key and value.
Times are those of the processor; run it on one core (`taskset -c 0`). A ratio is that of medians.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from benchmarks.report import machine
from jax_gluon import _ffi
from jax_gluon._problem import AttentionOperands, AttentionProblem


def calls(shape: tuple[int, ...], dtype: str, is_causal: bool) -> list[Callable[[], Any]]:
    """Forward mode, and forward."""
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(6)]
    problem = AttentionProblem(shape[-1] ** -0.5, is_causal, implementation="cpu")
    operands, tangents = AttentionOperands(*drawn[:3]), AttentionOperands(*drawn[3:])
    forward_mode = jax.jit(functools.partial(_ffi.tangent, problem, np.dtype(dtype)))
    forward = jax.jit(
        functools.partial(
            jax_gluon.dot_product_attention, is_causal=is_causal, implementation="cpu"
        )
    )
    return [
        lambda: jax.block_until_ready(forward_mode(operands, tangents)),
        lambda: jax.block_until_ready(forward(*drawn[:3])),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tangent", description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=("float32",))
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    options = parser.parse_args(arguments)
    here = machine()
    print(f"Machine: {', '.join(f'{name} {value}' for name, value in here.items())}")
    given = sys.argv[1:] if arguments is None else arguments
    print(f"Command: python -m benchmarks.tangent {shlex.join(given)}\n")
    print("| operands | mask | forward mode, ms | forward, ms | ratio |")
    print("|---|---|---|---|---|")
    shape = (1, options.length, options.heads, options.head_dim)
    for dtype in options.dtypes:
        for is_causal in (False, True):
            times: list[list[float]] = [[], []]
            sides = calls(shape, dtype, is_causal)
            for turn in range(options.rounds + 1):
                for call, own in zip(sides, times, strict=True):
                    start = time.process_time()
                    call()
                    if turn:
                        own.append(time.process_time() - start)
            with_it, without = map(statistics.median, times)
            print(
                f"| {dtype} | {'causal' if is_causal else 'none'} | {1e3 * with_it:.1f} | "
                f"{1e3 * without:.1f} | {with_it / without:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
