"""Measures which kernel is fastest on this device, for the table of `jax-gluon tune`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_gluon._arguments import check_arguments
from jax_gluon._attention import dot_product_attention
from jax_gluon._errors import Checker
from jax_gluon._kernels import CpuKernel, Device, MetalKernel, Pass
from jax_gluon._plan import tuned_table
from jax_gluon._plan.choice import KernelQuery
from jax_gluon._plan.selection import Measurement, candidates
from jax_gluon._quantization.formats import Preset

_OPERANDS: dict[str, tuple[Any, Preset | None]] = {
    "float32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
    "float16": (jnp.float16, None),
    "int8": (jnp.float32, "int8"),
    "int4": (jnp.float32, "int4"),
}
_DIRECTIONS: tuple[Pass, ...] = ("forward", "backward")
_HEAD_DIMS = (64, 128)
_LENGTHS = (256, 512, 1024, 2048, 4096)
#: Heads of the problems that are timed.
_HEADS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem that is timed: B1, T = S."""

    operands: str
    direction: Pass
    H: int
    S: int


def cases() -> list[Case]:
    """The grid, the shortest first, so that whatever time there is gives a whole table."""
    return [
        Case(operands, direction, H, S)
        for S in _LENGTHS
        for H in _HEAD_DIMS
        for direction in _DIRECTIONS
        for operands in _OPERANDS
    ]


def tune(
    path: Path, device: Device, *, seconds: float, rounds: int = 5, least: float = 0.02
) -> Iterator[tuple[Case, Measurement | None]]:
    """Times the cases that the table at `path` lacks, and keeps it after each.

    Yields each case, with None where it was there already; ends when `seconds` are over. `rounds`
    turns of every kernel are timed, each of at least `least` seconds.
    """
    try:
        rows = list(tuned_table.load(path, device).rows)
    except (OSError, ValueError, TypeError, KeyError):
        rows = []
    known = {(row.operands, row.direction, row.H, row.S) for row in rows}
    end = time.monotonic() + seconds
    for case in cases():
        if dataclasses.astuple(case) in known:
            yield case, None
            continue
        if time.monotonic() > end:
            return
        row = measure(case, device, rounds=rounds, least=least)
        rows.append(row)
        tuned_table.save(path, device, tuned_table.Table(tuple(rows)))
        yield case, row


def kernels_of(case: Case, device: Device) -> tuple[CpuKernel | MetalKernel, ...]:
    """The kernels that are timed for a case."""
    dtype, quantization = _OPERANDS[case.operands]
    found: list[tuple[CpuKernel | MetalKernel, ...]] = []

    def look(x: jax.Array) -> None:
        arguments = check_arguments(
            Checker("tune"), x, x, x, None, None, quantization=quantization, implementation=device
        )
        query = KernelQuery.of(arguments.problem, arguments.operands)
        _, offers = query.offers(case.direction, device)
        found.append(candidates(offers))

    jax.eval_shape(look, jax.ShapeDtypeStruct((1, case.S, _HEADS, case.H), dtype))
    return found[0]


def measure(case: Case, device: Device, *, rounds: int, least: float) -> Measurement:
    """Median seconds of every kernel, in turn."""
    dtype, quantization = _OPERANDS[case.operands]
    keys = jax.random.split(jax.random.key(case.S + case.H), 3)
    shape = (1, case.S, _HEADS, case.H)
    x = [jax.random.normal(key, shape, dtype) for key in keys]

    def make(kernel: CpuKernel | MetalKernel) -> Callable[..., Any]:
        is_forward = case.direction == "forward"
        pair = (kernel, None) if is_forward else (None, kernel)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return dot_product_attention(
                query, key, value,
                quantization=quantization, implementation=device, kernel=pair,
            )  # fmt: skip

        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.sum(attend(query, key, value).astype(jnp.float32) ** 2)

        return jax.jit(attend if is_forward else jax.grad(loss, argnums=(0, 1, 2)))

    def turn(function: Callable[..., Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(function(*x))
        return (time.perf_counter() - start) / calls

    functions = {each: make(each) for each in kernels_of(case, device)}
    once: dict[CpuKernel | MetalKernel, float] = {}
    for kernel, function in functions.items():
        turn(function, 1)  # compiles
        once[kernel] = turn(function, 1)
    times: dict[CpuKernel | MetalKernel, list[float]] = {kernel: [] for kernel in functions}
    for _ in range(rounds):
        for kernel, function in functions.items():
            turn(function, 1)  # takes what the one before has left in caches and allocator
            times[kernel].append(turn(function, max(1, round(least / once[kernel]))))
    medians = {kernel: statistics.median(values) for kernel, values in times.items()}
    return Measurement(case.operands, case.direction, case.H, case.S, medians)
