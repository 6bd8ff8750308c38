"""Which kernel runs a problem, and why: pure functions of the problem's shape.

GLUON is the pipeline of subtiled softmax and of keys and values that are filled ahead of their use
(`docs/how-it-works.md`); `baseline` is the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PIPELINES = ("baseline", "gluon")

#: GLUON is chosen from this many keys in a row's sight and this head dim on, where nothing was
#: measured on the device.
LEAST_KEYS, LEAST_HEAD_DIM = 512, 64
#: On the CPU alone forward in INT8, from this many keys on, was measured to be faster so.
LEAST_INT8_KEYS = 4096


@dataclass(frozen=True)
class KernelConfig:
    """A pipeline and the sizes of its blocks, in tokens.

    - `pipeline`: `"baseline"` or `"gluon"`.
    - `block_q`: queries that share what is loaded of keys and values.
    - `block_k`: keys that are loaded at a time.
    - `subtile`: keys that share a step of the softmax.
    - `stages`: blocks of keys that are kept at a time; over 1, they are filled ahead.

    Where dK and dV are made, on Metal, queries and keys change places.
    """

    pipeline: str
    block_q: int
    block_k: int
    subtile: int
    stages: int


@dataclass(frozen=True)
class KernelProblem:
    """What the choice of a kernel depends on.

    `operands` is what is multiplied: `"float32"`, `"bfloat16"`, `"float16"`, `"int8"` or `"int4"`,
    where codes beside floats are multiplied as `"float32"`; `has_exact_codes` says that scales and
    zero points of codes are constant along the contraction. `direction` is `"forward"` or
    `"backward"`. `local_window` is `(left, right)`.
    """

    T: int
    S: int
    H: int
    V: int
    operands: str = "float32"
    direction: str = "forward"
    is_causal: bool = False
    local_window: tuple[int, int] | None = None
    has_exact_codes: bool = True

    @property
    def keys(self) -> int:
        """The most keys that any row can see."""
        seen = min(self.S, self.T) if self.is_causal else self.S
        if self.local_window is None:
            return seen
        left, right = self.local_window
        return min(seen, left + (0 if self.is_causal else right) + 1)


@dataclass(frozen=True)
class Measurement:
    """Seconds that each pipeline took on a device, for T = S."""

    operands: str
    direction: str
    H: int
    S: int
    baseline: float
    gluon: float

    @property
    def faster(self) -> str:
        """The faster pipeline; `"baseline"` where they are equal."""
        return "gluon" if self.gluon < self.baseline else "baseline"


def select_kernel(
    problem: KernelProblem, device: str, measured: Sequence[Measurement] = ()
) -> tuple[KernelConfig, str]:
    """The kernel for a problem on `"cpu"` or `"metal"`, and the reason.

    `measured` is the table of `jax-gluon tune` for this device: the row with the same operands and
    direction that is nearest in head dim, then in keys, decides. Without one the default does: on
    Metal the pipelines differ in counted work alone, and GLUON is for large problems; on the CPU
    it is what was measured (`docs/gluon.md`).

    >>> from jax_gluon.selection import KernelProblem, select_kernel
    >>> select_kernel(KernelProblem(T=1024, S=1024, H=64, V=64), "metal")[0].pipeline
    'gluon'
    >>> select_kernel(KernelProblem(T=1024, S=256, H=64, V=64), "metal")[0].pipeline
    'baseline'
    """
    pipeline, reason = _select_pipeline(problem, device, measured)
    return kernel_config(problem, device, pipeline), reason


def _select_pipeline(
    problem: KernelProblem, device: str, measured: Sequence[Measurement]
) -> tuple[str, str]:
    rows = [
        row
        for row in measured
        if row.operands == problem.operands and row.direction == problem.direction
    ]
    if rows and problem.keys > 0:

        def distance(row: Measurement) -> tuple[float, float]:
            return abs(math.log2(row.H / problem.H)), abs(math.log2(row.S / problem.keys))

        row = min(rows, key=distance)
        return row.faster, (
            f"measured here at {row.S} keys and head dim {row.H}: gluon takes "
            f"{row.gluon / row.baseline:.2f} times as long as baseline"
        )
    seen = f"a row sees at most {problem.keys} keys, and the head dim is {problem.H}"
    if problem.keys < LEAST_KEYS or problem.H < LEAST_HEAD_DIM:
        return "baseline", f"{seen}: gluon is for {LEAST_KEYS} and {LEAST_HEAD_DIM} on"
    if device == "cpu":
        is_int8 = problem.operands == "int8" and problem.direction == "forward"
        if is_int8 and problem.keys >= LEAST_INT8_KEYS:
            return "gluon", f"{seen}: gluon is faster in INT8 from {LEAST_INT8_KEYS} keys on"
        return "baseline", f"{seen}, but gluon is no faster on the CPUs that were measured"
    return "gluon", f"{seen}: {LEAST_KEYS} and {LEAST_HEAD_DIM} or more"


def kernel_config(problem: KernelProblem, device: str, pipeline: str) -> KernelConfig:
    """A pipeline with the sizes of the blocks that its kernel has for a problem."""
    is_gluon = pipeline == "gluon"
    if device == "metal":
        return _metal_config(problem, is_gluon)
    if problem.direction == "backward":
        return KernelConfig(pipeline, 96, 192, *((96, 2) if is_gluon else (192, 1)))
    # 8-bit probabilities have a maximum of 64 keys of their own.
    subtile = 64 if problem.operands in ("int8", "int4") else 128 if is_gluon else 256
    return KernelConfig(pipeline, 96, 256, subtile, 2 if is_gluon else 1)


def _metal_config(problem: KernelProblem, is_gluon: bool) -> KernelConfig:
    # The table of shaders/block_sizes.h.
    is_half = problem.operands == "float16"
    if problem.direction == "forward":
        is_half |= problem.operands == "bfloat16"
        is_half |= problem.operands in ("int8", "int4") and problem.has_exact_codes
    head_dim = next((d for d in (64, 128) if d >= max(problem.H, problem.V)), 256)
    tile = 8192 // (head_dim * (2 if is_half else 4))
    is_backward = problem.direction == "backward"
    if not is_gluon:
        return KernelConfig("baseline", 32, tile, 8 if is_backward else tile, 1)
    granule = max(tile // 2, 8)
    if is_backward:
        return KernelConfig("gluon", 32, granule, 8, 1 if tile == 8 else 2)
    stages = 1 if tile == 8 else 2 if granule == 8 else 3
    return KernelConfig("gluon", 32, granule, max(granule // 2, 8), stages)
