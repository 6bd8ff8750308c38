"""Resident memory over many calls: right ones, ones that fail, and decoding from caches."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from tests.load import problems
from tests.load.outcome import Options, Outcome

#: Bytes that a call may seem to leave, of 20,000. Noise was up to 28; of a planted leak of 1,024
#: bytes 256 to 1,378 were seen, as the system takes back pages that nobody reads.
BAR = 128
SAMPLES = 200


def resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(calls: int, call: Callable[[], Any], leak: int = 0) -> float:
    """Bytes of resident memory that a call adds, by least squares over the last three quarters."""
    gc.collect()
    gc.freeze()  # what was there before is not looked through for cycles
    try:
        return _slope(calls, call, leak)
    finally:
        gc.unfreeze()


def _slope(calls: int, call: Callable[[], Any], leak: int) -> float:
    leaked: list[bytearray] = []
    made, bytes_then = [], []
    for i in range(calls):
        call()
        if leak:
            leaked.append(bytearray(os.urandom(1) * leak))
        if 4 * i >= calls and i % max(calls // SAMPLES, 1) == 0:
            made.append(i)
            bytes_then.append(resident())
    return float(np.polyfit(made, bytes_then, 1)[0])


def right_calls(options: Options) -> Callable[[], Any]:
    every = [*problems.always()[: options.always], problems.outside_jit()]
    every += problems.drawn(options.seed, options.problems)
    rng = random.Random(options.seed)

    def call() -> None:
        problem = rng.choice(every)
        jax.block_until_ready(problem.call(*problem.operands))

    return call


def failing_calls() -> Callable[[], Any]:
    """Arguments that the package refuses, and buffers that the plugin does, by turns."""
    x = jnp.ones((1, 8, 2, 16))

    @jax.jit
    def of_the_plugin(x: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call("jax_gluon.quantize", jax.ShapeDtypeStruct((3,), jnp.int8))
        return call(x, center=np.int64(0))

    refused = itertools.cycle((
        lambda: jax_gluon.dot_product_attention(x, x, x[:, :5]),
        lambda: jax_gluon.dot_product_attention(x, x, x, implementation="nothing"),
        lambda: jax_gluon.quantize(x[0, 0, 0, 0], jax_gluon.QuantSpec()),
        lambda: jax.block_until_ready(of_the_plugin(x)),
    ))  # fmt: skip

    def call() -> None:
        # A JaxRuntimeError is a RuntimeError.
        with contextlib.suppress(ValueError, RuntimeError):
            next(refused)()
            raise AssertionError("a call that was to fail did not")

    return call


def decoding(kind: str) -> Callable[[], Any]:
    """A step of generation from a cache, which is emptied when it is full."""
    B, K, N, H, capacity = 2, 2, 4, 32, 128
    if kind == "dense":
        cache: Any = jax_gluon.QuantizedKVCache.create(B, capacity, K, H)
    else:
        cache = jax_gluon.PagedKVCache.create(B, 16, K, H, page_size=16, capacity=capacity)
    rng = np.random.default_rng(0)
    key, query = (jnp.asarray(rng.standard_normal((B, 1, n, H), np.float32)) for n in (K, N))

    def step(cache: Any) -> Any:
        cache = cache.append(key, key)
        return cache, cache.attention(query, implementation="cpu")

    step = jax.jit(step, donate_argnums=0)
    reset = jax.jit(lambda cache: cache.reset(np.ones(B, bool)), donate_argnums=0)
    tokens = 0

    def call() -> None:
        nonlocal cache, tokens
        cache, out = step(cache)
        out.block_until_ready()
        tokens += 1
        if tokens % capacity == 0:
            cache = reset(cache)

    return call


def run(options: Options) -> Outcome:
    outcome = Outcome()
    kinds: dict[str, Callable[[], Any]] = {
        "calls": right_calls(options),
        "calls that fail": failing_calls(),
        "steps from a dense cache": decoding("dense"),
        "steps from a paged cache": decoding("paged"),
    }
    # The fewer calls, the more of the allocator's noise falls to each.
    bar = BAR * max(1.0, 20_000 / options.calls)
    for name, call in kinds.items():
        found = slope(options.calls, call, options.leak)
        text = f"{options.calls:,} {name}: {found:+.1f} bytes each, at most {bar:.0f}; "
        outcome.lines.append(text + f"{resident() >> 20} MiB resident")
        if found > bar:
            outcome.failures.append(f"{name} leave {found:.0f} bytes each")
    return outcome
