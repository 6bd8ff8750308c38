"""Every kernel that this machine would run, against float64: formats, passes, instruction sets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon import _native, debug
from jax_gluon._arguments import check_arguments
from jax_gluon._attention import dot_product_attention
from jax_gluon._doctor import oracle
from jax_gluon._errors import Checker
from jax_gluon._kernels import Device, KernelName, Pass
from jax_gluon._plan.choice import KernelQuery
from jax_gluon._quantization.formats import AttentionQuantization, preset
from jax_gluon._quantize import quantize
from jax_gluon._tuning import OPERANDS

#: The operands that are tested.
FORMATS = OPERANDS
#: Relative L2 of output and of gradients, one and a half times or twice those that kernels are held
#: to over many rows: here are few. Whatever is broken is over them by far.
BARS: dict[str, tuple[float, float]] = {
    "float32": (3e-6, 5e-6),
    "bfloat16": (8e-3, 1.2e-2),
    "float16": (1e-3, 1.5e-3),
    "int8": (1.2e-2, 2e-2),
    "int4": (2e-2, 2e-2),
}
#: Of the quantizers, where a mean that is summed in another order moves few codes by one step.
_CODES_BAR = 1e-3
#: Extents of the problems: T queries and S keys, so that each kernel finds one that it takes.
_SHAPES = ((37, 130), (1, 300), (8, 24))
_B, _N, _K, _H = 2, 4, 2, 64


@dataclasses.dataclass(frozen=True)
class Check:
    """One kernel that was run, or that could not be: then `problem` says why.

    `error` is the relative L2 distance from float64, of gradients the largest of the three.
    """

    device: str
    variant: str
    kernel: str
    operands: str
    direction: str
    error: float
    bar: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the kernel ran, and is as near as it should be."""
        return not self.problem and self.error <= self.bar

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self) | {"passed": self.passed}


@dataclasses.dataclass(frozen=True)
class _Case:
    """A program that is compiled once, and run by every instruction set."""

    operands: str
    T: int
    S: int
    forward: KernelName | None
    backward: KernelName | None
    device: Device | None

    @property
    def preset(self) -> AttentionQuantization | None:
        return preset(cast(Any, FORMATS[self.operands][1]))


def run(
    devices: tuple[Device, ...] = ("cpu",), operands: tuple[str, ...] = tuple(FORMATS)
) -> Iterator[Check]:
    """Tests each kernel of each device, as it is run: the CPU's in all of its instruction sets.

    The processor's emulated instruction sets, of a build for development, are left out. Where JAX
    runs elsewhere by default, what `implementation=None` runs there is tested besides.
    """
    for name in operands:
        for device in devices:
            for case in _cases(name, device):
                yield from _run_case(case)
        for device in devices:
            yield from _check_quantizer(name, device)
        if not devices or jax.default_backend() != "cpu":
            T, S = _SHAPES[0]
            yield from _run_case(_Case(name, T, S, None, None, None))


def _cases(operands: str, device: Device) -> Iterator[_Case]:
    known: set[tuple[Pass, str]] = set()
    for T, S in _SHAPES:
        case = _Case(operands, T, S, None, None, device)
        offers = _offers(case, device)
        forward, backward = (
            [name for name in offers[each] if (each, name) not in known]
            for each in ("forward", "backward")
        )
        for name in dict.fromkeys(forward + backward):
            known |= {("forward", name), ("backward", name)}
            yield dataclasses.replace(
                case,
                forward=name if name in forward else None,
                backward=name if name in backward else None,
            )


def _offers(case: _Case, device: Device) -> dict[str, list[KernelName]]:
    found: dict[str, list[KernelName]] = {}

    def look(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
        arguments = check_arguments(
            Checker("doctor"), query, key, value, None, None,
            quantization=preset(FORMATS[case.operands][1]), implementation=device,
        )  # fmt: skip
        asked = KernelQuery.of(arguments.problem, arguments.operands)
        for each in ("forward", "backward"):
            direction = cast(Pass, each)
            found[each] = [offer.name for offer in asked.offers(direction, device)[1]]

    jax.eval_shape(look, *_draw(_problem_of(case))[:3])
    return found


@functools.cache
def _draw(case: _Case) -> tuple[jax.Array, ...]:
    """Query, key, value and a cotangent."""
    rng = np.random.default_rng(case.S)
    dtype = FORMATS[case.operands][0]
    shapes = (_B, case.T, _N, _H), (_B, case.S, _K, _H), (_B, case.S, _K, _H), (_B, case.T, _N, _H)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)


def _lengths(case: _Case) -> np.ndarray:
    return np.array([case.S, case.S - 11], np.int32)


def _program(case: _Case) -> Callable[..., Any]:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(
            query, key, value,
            key_value_seq_lengths=_lengths(case),
            quantization=preset(FORMATS[case.operands][1]),
            implementation=case.device,
            kernel=(case.forward, case.backward),
        )  # fmt: skip

    def both(query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array) -> Any:
        out, pull = cast(Any, jax).vjp(attend, query, key, value)
        return out, pull(d_out)

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array) -> Any:
        del d_out
        return attend(query, key, value), ()

    is_forward = case.device is not None and case.backward is None
    return jax.jit(forward if is_forward else both)


@functools.cache
def _quantizer(case: _Case, implementation: str) -> Callable[..., list[jax.Array]]:
    """What the codes of query, key and value stand for, by an implementation's quantizer."""
    lengths = (None, _lengths(case), _lengths(case))

    def stand_for(*floats: jax.Array) -> list[jax.Array]:
        names = ("query", "key", "value")
        specs = [getattr(case.preset, name) for name in names]
        return [
            quantize(x, spec, lengths=tokens, implementation=cast(Any, implementation)).dequantize()
            for x, spec, tokens in zip(floats, specs, lengths, strict=True)
        ]

    return jax.jit(stand_for)


def _exact(case: _Case) -> oracle.Exact:
    """Of what the codes stand for, where codes are made."""
    *floats, d_out = _draw(_problem_of(case))
    if case.preset is not None:
        floats = _quantizer(_problem_of(case), case.device or "xla")(*floats)
    query, key, value = (np.asarray(x, np.float64) for x in floats)
    return oracle.attention(query, key, value, np.asarray(d_out, np.float64), _lengths(case))


def _problem_of(case: _Case) -> _Case:
    """The case without its kernels: what caches go by."""
    return dataclasses.replace(case, forward=None, backward=None, device=None)


def _run_case(case: _Case) -> Iterator[Check]:
    program = _program(case)
    for variant in _variants(case.device):
        with forced_variant(_variant_of_cpu(variant)):
            yield from _checks(case, program, variant)


def _checks(case: _Case, program: Callable[..., Any], variant: str) -> Iterator[Check]:
    bars: dict[str, float] = dict(zip(("forward", "backward"), BARS[case.operands], strict=True))
    names: dict[str, KernelName | None] = {"forward": case.forward, "backward": case.backward}
    where = case.device or jax.default_backend()

    def check(direction: str, error: float, problem: str = "") -> Check:
        return Check(
            where, variant, names[direction] or "", case.operands, direction,
            error, bars[direction], problem,
        )  # fmt: skip

    try:
        if case.device:
            debug.kernels()
        results: tuple[jax.Array, tuple[jax.Array, ...]] = program(*_draw(_problem_of(case)))
        out, gradients = cast(Any, jax).block_until_ready(results)
        ran = {run["pass"]: run for run in debug.kernels()} if case.device else {}
        exact = _exact(case)
    except Exception as error:  # whatever a kernel or a compiler says is what is reported
        yield check("forward", float("nan"), f"{type(error).__name__}: {_first_line(error)}")
        return
    found = {"forward": [oracle.relative_error(out, exact.out)]}
    if gradients:
        found["backward"] = list(map(oracle.relative_error, gradients, exact[1:]))
    for direction, errors in found.items():
        if case.device and names[direction] is None:
            continue  # tested with another shape
        run = ran.get(direction, {})
        problem = ""
        if case.device and (run.get("kernel"), run.get("device")) != (names[direction], where):
            problem = f'"{run.get("kernel")}" ran on "{run.get("device")}"'
        yield check(direction, max(errors), problem)


def _check_quantizer(operands: str, device: Device) -> Iterator[Check]:
    """The device's quantizer against XLA's: all but a few codes are the same."""
    case = _Case(operands, *_SHAPES[0], None, None, None)
    if case.preset is None:
        return
    floats = _draw(case)[:3]
    for variant in _variants(device):
        worst, problem = float("nan"), ""
        with forced_variant(_variant_of_cpu(variant)):
            try:
                found, expected = (_quantizer(case, name)(*floats) for name in (device, "xla"))
                worst = max(
                    oracle.relative_error(x, np.asarray(y, np.float64))
                    for x, y in zip(found, expected, strict=True)
                )
            except Exception as error:
                problem = f"{type(error).__name__}: {_first_line(error)}"
        yield Check(device, variant, "quantize", operands, "codes", worst, _CODES_BAR, problem)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def _variants(device: Device | None) -> list[str]:
    """The CPU's instruction sets, the chosen one first."""
    if device == "metal":
        return [_native.metal_device()[0]]
    if device is None:
        return [""]
    plugin = _native.plugin()
    chosen: str = plugin.cpu_isa()
    others: list[str] = plugin.cpu_isas_supported()
    return [chosen, *(x for x in others if x != chosen and not x.startswith("emulated"))]


def _variant_of_cpu(name: str) -> str | None:
    """The name, unless it is of no instruction set but of Metal."""
    is_of_cpu = _native.has_plugin() and name in _native.plugin().cpu_isas_supported()
    return name if is_of_cpu else None


@contextlib.contextmanager
def forced_variant(name: str | None) -> Generator[None]:
    """Runs the CPU's kernels in an instruction set, if one is named."""
    # The plugin looks at every call.
    before = os.environ.get("JAX_GLUON_CPU_ISA")
    if name is not None:
        os.environ["JAX_GLUON_CPU_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("JAX_GLUON_CPU_ISA", None)
        else:
            os.environ["JAX_GLUON_CPU_ISA"] = before


@dataclasses.dataclass(frozen=True)
class Summary:
    """The checks of a run, and the seconds that it took."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def failed(self) -> list[Check]:
        """Those that did not pass."""
        return [check for check in self.checks if not check.passed]


def summary(devices: tuple[Device, ...] = ("cpu",)) -> Summary:
    """All checks of `run`."""
    start = time.perf_counter()
    checks = tuple(run(devices))
    return Summary(checks, time.perf_counter() - start)
