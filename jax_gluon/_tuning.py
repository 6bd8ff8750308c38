"""Measures which kernel is fastest on this device, for the table of `jax-gluon tune`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_gluon import _timing
from jax_gluon._arguments import check_arguments
from jax_gluon._attention import dot_product_attention
from jax_gluon._errors import Checker
from jax_gluon._kernels import CpuKernel, Device, MetalKernel, Pass
from jax_gluon._plan import tuned_table
from jax_gluon._plan.choice import KernelQuery
from jax_gluon._plan.selection import PIPELINES, Measurement, candidates
from jax_gluon._plan.tuned_table import Crossover, Table
from jax_gluon._quantization.formats import Preset

#: Operands by name: the dtype of the floats, and the preset that makes codes of them.
OPERANDS: dict[str, tuple[Any, Preset | None]] = {
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

    def __str__(self) -> str:
        return f"{self.operands} {self.direction} H{self.H} S{self.S}"


def cases() -> list[Case]:
    """The grid, the shortest first, so that whatever time there is gives a whole table."""
    return [
        Case(operands, direction, H, S)
        for S in _LENGTHS
        for H in _HEAD_DIMS
        for direction in _DIRECTIONS
        for operands in OPERANDS
    ]


@dataclasses.dataclass(frozen=True)
class Unsure:
    """What was timed and came out otherwise in every round: it is not kept. `found` says how."""

    found: str


#: A case, or the operands whose crossover was looked for, and what came out; None: known already.
Outcome = tuple[Case | str, Measurement | Crossover | Unsure | None]


def tune(
    path: Path, device: Device, *, seconds: float, rounds: int = 5, least: float = 0.02
) -> Iterator[Outcome]:
    """Times the cases that the table at `path` lacks, and keeps it after each that is sure.

    Of Metal also from which size on it is faster than the CPU. Yields what came out; what is not
    sure is timed, and yielded, once more after all else. Ends when `seconds` are over. `rounds`
    turns of every kernel are timed, each of at least `least` seconds.
    """
    table = known(path, device)
    end = time.monotonic() + seconds
    waiting: list[Case | str] = [*cases()]
    if device == "metal":
        waiting = [*OPERANDS, *waiting]
    done = {(row.operands, row.direction, row.H, row.S) for row in table.rows}
    done |= {each.operands for each in table.crossovers}
    for _ in range(2):
        again: list[Case | str] = []
        for case in waiting:
            if (case if isinstance(case, str) else dataclasses.astuple(case)) in done:
                yield case, None
                continue
            if time.monotonic() > end:
                return
            if isinstance(case, str):
                found = measure_crossover(case, rounds=rounds, least=least)
            else:
                found = measure(case, device, rounds=rounds, least=least)
            if isinstance(found, Unsure):
                again.append(case)
                yield case, found
                continue
            if isinstance(found, Crossover):
                table = table._replace(crossovers=(*table.crossovers, found))
            else:
                table = table._replace(rows=(*table.rows, found))
            tuned_table.save(path, device, table)
            yield case, found
        waiting = again


def known(path: Path, device: Device) -> Table:
    """The table at `path`, empty where there is none; one that is broken is set aside."""
    try:
        return tuned_table.load(path, device)
    except FileNotFoundError:
        return Table()
    except tuned_table.BROKEN:
        path.replace(path.with_name(f"{path.name}.broken"))
        return Table()


def kernels_of(case: Case, device: Device) -> tuple[CpuKernel | MetalKernel, ...]:
    """The kernels that are timed for a case."""
    dtype, quantization = OPERANDS[case.operands]
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


def measure(case: Case, device: Device, *, rounds: int, least: float) -> Measurement | Unsure:
    """Seconds of every kernel, in turn; unsure where the ratio of the pipelines is."""
    kernels = kernels_of(case, device)

    def of(comparison: _timing.Comparison[Any], name: str) -> Any:
        return comparison.fastest([kernel for kernel in kernels if kernel.name == name])

    def ratio(comparison: _timing.Comparison[Any]) -> _timing.Ratio:
        baseline, gluon = (of(comparison, name) for name in PIPELINES)
        return comparison.ratio(gluon, baseline)

    runs = {kernel: call_of(case, device, kernel) for kernel in kernels}
    comparison = _timing.compare(
        runs, lambda found: ratio(found).is_sure, rounds=rounds, least=least
    )
    found = ratio(comparison)
    if not found.is_sure:
        return Unsure(f"gluon / baseline {found}")
    return Measurement(case.operands, case.direction, case.H, case.S, comparison.seconds())


def measure_crossover(operands: str, *, rounds: int, least: float) -> Crossover | Unsure:
    """From which size on Metal is faster than the CPU, forward and backward together.

    Sizes grow until it was the faster one twice in a row. Between the last at which it was not and
    the first of the two the ratio is taken for a power of the size.
    """
    points: list[tuple[int, float]] = []
    for S in _LENGTHS:
        case = Case(operands, "backward", _HEAD_DIMS[0], S)
        runs = {device: call_of(case, device, None) for device in ("cpu", "metal")}
        comparison = _timing.compare(
            runs, lambda found: _is_told(found.ratio("metal", "cpu")), rounds=rounds, least=least
        )
        found = comparison.ratio("metal", "cpu")
        if not _is_told(found):
            return Unsure(f"{S} keys: Metal / CPU {found}")
        points.append((products_of(case), found.median))
        if len(points) > 1 and points[-1][1] < 1.0 and points[-2][1] < 1.0:
            break
    return Crossover(operands, crossing(points), points[-1][0])


def _is_told(ratio: _timing.Ratio) -> bool:
    """Whether the ratio is sure, or at least which side of 1 it is on."""
    return ratio.is_sure or ratio.high < 1.0 or ratio.low > 1.0


def products_of(case: Case) -> int:
    """The multiply-accumulates of a case, as the plugin counts them."""
    return _HEADS * case.S * case.S * 2 * case.H


def crossing(points: list[tuple[int, float]]) -> int | None:
    """The size from which ratios, by size, stay below 1; None where the last does not."""
    first = len(points)
    while first > 0 and points[first - 1][1] < 1.0:
        first -= 1
    if first == len(points):
        return None
    if first == 0:
        return points[0][0]
    (x0, r0), (x1, r1) = points[first - 1], points[first]
    part = math.log(r0) / (math.log(r0) - math.log(r1))
    return round(x0 * (x1 / x0) ** part)


def call_of(
    case: Case, device: Device, kernel: CpuKernel | MetalKernel | None
) -> Callable[[], object]:
    """A call of a case by a kernel, or by the one that the device prefers, that waits."""
    dtype, quantization = OPERANDS[case.operands]
    keys = jax.random.split(jax.random.key(case.S + case.H), 3)
    shape = (1, case.S, _HEADS, case.H)
    x = [jax.random.normal(key, shape, dtype) for key in keys]
    is_forward = case.direction == "forward"
    pair = (kernel, None) if is_forward else (None, kernel)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(
            query, key, value, quantization=quantization, implementation=device, kernel=pair
        )

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value).astype(jnp.float32) ** 2)

    function: Any = jax.jit(attend if is_forward else jax.grad(loss, argnums=(0, 1, 2)))

    def run() -> None:
        cast(Any, jax).block_until_ready(function(*x))

    return run
