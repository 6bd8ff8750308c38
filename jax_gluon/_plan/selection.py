"""Which kernel runs a problem, and why: pure functions of the problem and of what a device offers.

GLUON is the pipeline of subtiled softmax and of keys and values that are filled ahead of their use
(`docs/how-it-works.md`); `baseline` is the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jax_gluon._kernels import CpuKernel, Device, KernelName, MetalKernel, Pass

#: The kernels that any problem can be run by, among which `jax-gluon tune` chooses.
PIPELINES: tuple[KernelName, ...] = ("baseline", "gluon")

#: GLUON is chosen from this many visible keys and this head dim on, where nothing was measured on
#: the device.
MIN_KEYS, MIN_HEAD_DIM = 512, 64

#: Where a device has both, `small` is chosen over `decode` up to this many keys for each query. In
#: float32 with head dim 64, on a core of an AMD EPYC (Zen 4), its share of decode's time is, of one
#: query, 0.96 at 32 keys and 1.28 at 64; of two, 1.02 at 64 and 1.13 at 128; of four, 0.95 at 128
#: and 1.26 at 256.
KEYS_PER_QUERY = 32
#: Queries and keys up to which `small`, which multiplies float32, is chosen over pipelines that
#: multiply bfloat16. There, at head dims 32 and 64, it takes 0.74 to 1.01 of their time; with more
#: keys, 1.0 to 1.3.
MAX_QUERIES_BESIDE_BFLOAT16, MAX_KEYS_BESIDE_BFLOAT16 = 64, 56


@dataclass(frozen=True)
class SizeRange:
    """What a size may be: from `min` to `max` in steps."""

    preferred: int
    min: int
    max: int
    step: int

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max and (size - self.min) % self.step == 0

    def __str__(self) -> str:
        if self.max == self.min + self.step:
            return f"{self.min} or {self.max}"
        steps = "" if self.step == 1 else f" in steps of {self.step}"
        return f"{self.min} to {self.max}{steps}"


@dataclass(frozen=True)
class KernelOffer:
    """A kernel that a device has for a problem, as the plugin says it.

    `arithmetic` is what is multiplied; `reason` what the kernel is for, where it is not for every
    problem, or why it is the faster pipeline; `sizes` what the sizes of a `CpuKernel` may be, of
    those that there is a choice of.
    """

    device: Device
    name: KernelName
    arithmetic: str = "float32"
    reason: str = ""
    sizes: Mapping[str, SizeRange] = field(default_factory=dict[str, SizeRange])

    def kernel(self, **sizes: int | None) -> CpuKernel | MetalKernel:
        """The kernel with these sizes, and else those that it prefers or that go with them."""
        if self.device == "metal":
            return MetalKernel(self.name)
        preferred = {name: size.preferred for name, size in self.sizes.items()}
        given = {name: size for name, size in sizes.items() if size is not None}
        # Of block and subtile, the one that was not asked for follows the other.
        if "subtile" in preferred and ("subtile" in given) != ("block_k" in given):
            if "subtile" in given:
                subtile = given["subtile"]
                preferred["block_k"] = max(2, preferred["block_k"] // subtile) * subtile
            else:
                preferred["subtile"] = self._subtile_of(given["block_k"])
        return CpuKernel(self.name, **(preferred | given))

    def _subtile_of(self, block_k: int) -> int:
        """The subtile nearest below the preferred one, of which a block has two or more."""
        size = self.sizes["subtile"]
        fitting = (
            subtile
            for subtile in range(size.preferred, size.min - 1, -size.step)
            if block_k % subtile == 0 and block_k >= 2 * subtile
        )
        return next(fitting, size.preferred)

    def takes(self, kernel: CpuKernel | MetalKernel) -> bool:
        """Whether this is the kernel, and its sizes are among those that there are."""
        if isinstance(kernel, MetalKernel):
            return self.device == "metal" and self.name == kernel.name
        if self.device != "cpu" or self.name != kernel.name:
            return False
        found = {
            "block_k": kernel.block_k,
            "subtile": kernel.subtile,
            "stages": kernel.stages,
        }
        for name, size in found.items():
            if (size is not None) != (name in self.sizes):
                return False
            if size is not None and size not in self.sizes[name]:
                return False
        block_k, subtile = kernel.block_k, kernel.subtile
        is_whole = block_k is None or subtile is None or block_k % subtile == 0
        return is_whole and (block_k is None or subtile is None or block_k >= 2 * subtile)

    def __str__(self) -> str:
        sizes = [f"{name} {size}" for name, size in self.sizes.items()]
        if "subtile" in self.sizes:
            sizes.append("block_k two subtiles or more, and whole ones")
        return f'"{self.name}"' + (f" ({', '.join(sizes)})" if sizes else "")


@dataclass(frozen=True)
class KernelProblem:
    """What the choice among the offers for a problem depends on.

    `operands` is what is multiplied: `"float32"`, `"bfloat16"`, `"float16"`, `"int8"` or `"int4"`,
    where codes beside floats are multiplied as `"float32"`. `visible_keys` is the most keys that
    any row can see, T and S are the lengths of queries and keys, H is the head dim.
    """

    direction: Pass
    operands: str
    visible_keys: int
    T: int
    S: int
    H: int


@dataclass(frozen=True)
class Measurement:
    """Seconds that kernels took on a device, for T = S: for each that was measured."""

    operands: str
    direction: str
    H: int
    S: int
    seconds: Mapping[CpuKernel | MetalKernel, float]

    @property
    def fastest(self) -> CpuKernel | MetalKernel:
        """The fastest kernel; the first of those that are equal."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def ratio(self) -> float:
        """Time of the fastest gluon kernel over that of the fastest baseline one."""
        gluon, baseline = (
            min(s for kernel, s in self.seconds.items() if kernel.name == name)
            for name in ("gluon", "baseline")
        )
        return gluon / baseline


def select_kernel(
    problem: KernelProblem, offers: Sequence[KernelOffer], measured: Sequence[Measurement] = ()
) -> tuple[CpuKernel | MetalKernel, str]:
    """The kernel for a problem among what a device offers for it, and the reason.

    A kernel made for such problems (small, decode) goes first, where it is faster. Else `measured`,
    the table of `jax-gluon tune` for the device, decides: its row with the same operands and
    direction that is nearest in head dim, then in keys. Without one a pipeline goes first that the
    device says is the faster one. Else GLUON is for large problems, where it was measured on CPUs
    (`docs/gluon.md`); on Metal the pipelines differ in counted work alone so far.

    >>> from jax_gluon._plan.selection import KernelOffer, KernelProblem, select_kernel
    >>> offers = KernelOffer("metal", "baseline"), KernelOffer("metal", "gluon")
    >>> select_kernel(KernelProblem("forward", "float32", 1024, 1024, 1024, 64), offers)[0]
    MetalKernel(name='gluon')
    >>> select_kernel(KernelProblem("forward", "float32", 256, 256, 256, 64), offers)[1]
    'baseline: GLUON needs at least 512 visible keys and head dim 64; here 256 and 64'
    """
    named = {offer.name: offer for offer in offers}
    if name := _made_for(problem, named):
        return named[name].kernel(), f"{name}: {named[name].reason}"
    if len(offers) == 1:
        return offers[0].kernel(), f"{offers[0].name}: the one kernel of this pass"
    rows = [
        row
        for row in measured
        if row.operands == problem.operands and row.direction == problem.direction
    ]
    if rows and problem.visible_keys > 0:

        def distance(row: Measurement) -> tuple[float, float]:
            keys = abs(math.log2(row.S / problem.visible_keys))
            return abs(math.log2(row.H / problem.H)), keys

        row = min(rows, key=distance)
        kernel = row.fastest
        where = f"measured here at {row.S} keys and head dim {row.H}"
        if any(offer.takes(kernel) for offer in offers):
            return kernel, (
                f"{kernel.name}: {where}, gluon takes {row.ratio:.2f} times as long as baseline"
            )
        # Measured with other sizes, such as those of another head dim.
        return named[kernel.name].kernel(), f"{kernel.name}: {where}, it is faster"
    for offer in offers:
        if offer.reason and offer.name in PIPELINES:
            return offer.kernel(), f"{offer.name}: {offer.reason}"
    here = f"here {problem.visible_keys} and {problem.H}"
    if problem.visible_keys < MIN_KEYS or problem.H < MIN_HEAD_DIM:
        needs = f"at least {MIN_KEYS} visible keys and head dim {MIN_HEAD_DIM}"
        return named["baseline"].kernel(), f"baseline: GLUON needs {needs}; {here}"
    enough = f"{MIN_KEYS} visible keys and head dim {MIN_HEAD_DIM}, or more"
    return named["gluon"].kernel(), f"gluon: {enough}; {here}"


def _made_for(
    problem: KernelProblem, named: Mapping[str, KernelOffer]
) -> Literal["small", "decode"] | None:
    """The kernel made for such problems, if there is one that is faster than the pipelines."""
    if "decode" in named:
        is_small = "small" in named and problem.S <= KEYS_PER_QUERY * problem.T
        return "small" if is_small else "decode"
    if "small" in named:
        is_few = problem.T <= MAX_QUERIES_BESIDE_BFLOAT16 and problem.S <= MAX_KEYS_BESIDE_BFLOAT16
        return "small" if is_few or named["baseline"].arithmetic != "bfloat16" else None
    return None


def candidates(offers: Sequence[KernelOffer]) -> tuple[CpuKernel | MetalKernel, ...]:
    """The kernels among which `jax-gluon tune` looks for the fastest."""
    found: dict[CpuKernel | MetalKernel, None] = {}
    for offer in offers:
        if offer.name in PIPELINES:
            found |= dict.fromkeys(kernel for kernel in _sized(offer) if offer.takes(kernel))
    return tuple(found)


def _sized(offer: KernelOffer) -> Iterator[CpuKernel | MetalKernel]:
    """The kernel as it prefers to be, then with blocks of half and of several times the size."""
    yield offer.kernel()
    block = offer.sizes.get("block_k")
    if block is None:
        return
    subtile = offer.sizes.get("subtile")
    for numerator, denominator in ((1, 2), (2, 1), (4, 1)):
        block_k = block.preferred * numerator // denominator
        if subtile is None:
            yield offer.kernel(block_k=block_k)
        else:
            yield offer.kernel(block_k=block_k, subtile=min(subtile.max, block_k // 2))
