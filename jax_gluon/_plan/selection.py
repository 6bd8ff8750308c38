"""Which kernel runs a problem, and why: pure functions of the problem's shape.

GLUON is the pipeline of subtiled softmax and of keys and values that are filled ahead of their use
(`docs/how-it-works.md`); `baseline` is the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PIPELINES = ("baseline", "gluon")

#: GLUON is chosen from this many keys in a row's sight and this head dim on, where nothing was
#: measured on the device.
MIN_KEYS, MIN_HEAD_DIM = 512, 64


@dataclass(frozen=True)
class KernelConfig:
    """A pipeline and the sizes of its blocks, in tokens.

    - `pipeline`: `"baseline"` or `"gluon"`.
    - `block_q`: queries that share what is loaded of keys and values.
    - `block_k`: keys that are loaded at a time.
    - `subtile`: keys that share a step of the softmax, at most: the CPU's kernels take fewer where
      vectors are short. In backward on the CPU, keys whose P and dS are kept at a time.
    - `stages`: blocks of keys that are kept at a time; over 1, they are filled ahead.

    Where dK and dV are made, on Metal, queries and keys change places. `dot_product_attention`
    takes a configuration as `kernel=`, and says what is allowed where a device lacks its sizes: on
    Metal they are compiled in.

    >>> import jax.numpy as jnp
    >>> import jax_gluon
    >>> config = jax_gluon.KernelConfig("gluon", block_q=96, block_k=256, subtile=128, stages=2)
    >>> x = jnp.ones((1, 300, 1, 64))
    >>> jax_gluon.dot_product_attention(x, x, x, kernel=config).shape
    (1, 300, 1, 64)
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
    zero points of codes are constant along the contraction, `has_integer_rows` that forward on the
    CPU multiplies them as integers. `direction` is `"forward"` or `"backward"`. `local_window` is
    `(left, right)`.
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
    has_integer_rows: bool = True

    @property
    def is_integer_on_cpu(self) -> bool:
        """Whether the CPU multiplies integers: in forward, rows of codes."""
        is_codes = self.operands in ("int8", "int4")
        return is_codes and self.has_integer_rows and self.direction == "forward"

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
    """Seconds that kernels took on a device, for T = S: for each that was measured."""

    operands: str
    direction: str
    H: int
    S: int
    seconds: Mapping[KernelConfig, float]

    @property
    def fastest(self) -> KernelConfig:
        """The fastest kernel; the first of those that are equal."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def ratio(self) -> float:
        """Time of the fastest gluon kernel over that of the fastest baseline one."""
        gluon, baseline = (
            min(s for config, s in self.seconds.items() if config.pipeline == pipeline)
            for pipeline in ("gluon", "baseline")
        )
        return gluon / baseline


def select_kernel(
    problem: KernelProblem, device: str, measured: Sequence[Measurement] = ()
) -> tuple[KernelConfig, str]:
    """The kernel for a problem on `"cpu"` or `"metal"`, and the reason.

    `measured` is the table of `jax-gluon tune` for this device: the row with the same operands and
    direction that is nearest in head dim, then in keys, decides. Without one the default does:
    GLUON is for large problems, where it was measured on CPUs (`docs/gluon.md`); on Metal the
    pipelines differ in counted work alone so far.

    >>> from jax_gluon._plan.selection import KernelProblem, select_kernel
    >>> select_kernel(KernelProblem(T=1024, S=1024, H=64, V=64), "metal")[0].pipeline
    'gluon'
    >>> select_kernel(KernelProblem(T=1024, S=256, H=64, V=64), "metal")[0].pipeline
    'baseline'
    """
    rows = [
        row
        for row in measured
        if row.operands == problem.operands and row.direction == problem.direction
    ]
    if rows and problem.keys > 0:

        def distance(row: Measurement) -> tuple[float, float]:
            return abs(math.log2(row.H / problem.H)), abs(math.log2(row.S / problem.keys))

        row = min(rows, key=distance)
        config = row.fastest
        if is_allowed(config, problem, device):
            return config, (
                f"measured here at {row.S} keys and head dim {row.H}: gluon takes "
                f"{row.ratio:.2f} times as long as baseline"
            )
        # Measured on kernels of other sizes, such as those of another head dim.
        pipeline = config.pipeline
        return kernel_config(problem, device, pipeline), (
            f"measured here at {row.S} keys and head dim {row.H}: {pipeline} is faster"
        )
    pipeline, reason = _default_pipeline(problem)
    return kernel_config(problem, device, pipeline), reason


def _default_pipeline(problem: KernelProblem) -> tuple[str, str]:
    seen = f"a row sees at most {problem.keys} keys, and the head dim is {problem.H}"
    if problem.keys < MIN_KEYS or problem.H < MIN_HEAD_DIM:
        return "baseline", f"{seen}: gluon is for {MIN_KEYS} and {MIN_HEAD_DIM} on"
    return "gluon", f"{seen}: {MIN_KEYS} and {MIN_HEAD_DIM} or more"


def kernel_config(problem: KernelProblem, device: str, pipeline: str) -> KernelConfig:
    """A pipeline with the sizes of blocks that are best for a problem, as far as is known."""
    is_gluon = pipeline == "gluon"
    if device == "metal":
        return _metal_config(problem, is_gluon)
    if problem.direction == "backward":
        # A larger block is for long rows, which every block reads again.
        is_long = problem.H > 64 and problem.keys >= 2048
        sizes = (192, 192, 1) if not is_gluon else (768, 192, 2) if is_long else (192, 96, 2)
    elif problem.is_integer_on_cpu:
        sizes = (512, 64, 2) if is_gluon else (256, 64, 1)
    else:
        sizes = (512, 256, 2) if is_gluon else (256, 256, 1)
    return KernelConfig(pipeline, _CPU_ROWS, *sizes)


_BACKWARD_SIZES = ((192, 96), (384, 192), (768, 192))


def kernel_configs(problem: KernelProblem, device: str) -> tuple[KernelConfig, ...]:
    """The kernels among which `jax-gluon tune` looks for the fastest."""
    defaults = tuple(kernel_config(problem, device, pipeline) for pipeline in PIPELINES)
    if device == "metal":
        return defaults
    if problem.direction == "backward":
        sizes = [("baseline", 96, 96, 1), *(("gluon", k, n, 2) for k, n in _BACKWARD_SIZES)]
    elif problem.is_integer_on_cpu:
        sizes = [("baseline", 128, 64, 1), ("gluon", 256, 64, 2), ("gluon", 1024, 64, 2)]
    else:
        sizes = [("baseline", 128, 128, 1), ("gluon", 256, 128, 2), ("gluon", 1024, 256, 2)]
    others = (KernelConfig(name, _CPU_ROWS, *rest) for name, *rest in sizes)
    return *defaults, *(config for config in others if config not in defaults)


#: Queries of a block in all kernels of the CPU, and its largest blocks of keys and rings.
_CPU_ROWS, _MAX_KEYS, _MAX_STAGES = 96, 4096, 8


def allowed_configs(problem: KernelProblem, device: str, pipeline: str) -> str:
    """The sizes that a pipeline can have, in words."""
    if device == "metal":
        sizes = kernel_config(problem, device, pipeline)
        return f"{sizes}, whose sizes are compiled in"
    is_gluon = pipeline == "gluon"
    subtile, block_k = "block_k", "64, 128, 192 or 256"
    if problem.direction == "backward":
        block_k = "96 or 192"
        if is_gluon:
            subtile = "96 or 192"
    elif problem.is_integer_on_cpu:
        subtile = "64"
    elif is_gluon:
        subtile = "128 or 256"
    if is_gluon:
        block_k = f"a multiple of subtile, at least twice it and at most {_MAX_KEYS}"
    stages = f"2 to {_MAX_STAGES}" if is_gluon else "1"
    return f"block_q {_CPU_ROWS}, subtile {subtile}, block_k {block_k}, stages {stages}"


def is_allowed(config: KernelConfig, problem: KernelProblem, device: str) -> bool:
    """Whether the device has a kernel of these sizes for a problem; see `allowed_configs`."""
    if device == "metal":
        return config == kernel_config(problem, device, config.pipeline)
    is_gluon = config.pipeline == "gluon"
    if problem.direction == "backward":
        subtiles = (96, 192)
    elif problem.is_integer_on_cpu:
        subtiles = (64,)
    else:
        subtiles = (128, 256) if is_gluon else (64, 128, 192, 256)
    if config.block_q != _CPU_ROWS or config.subtile not in subtiles:
        return False
    if is_gluon:
        blocks = range(2 * config.subtile, _MAX_KEYS + 1, config.subtile)
        return config.block_k in blocks and 2 <= config.stages <= _MAX_STAGES
    blocks = (64, 128, 192, 256) if problem.is_integer_on_cpu else (config.subtile,)
    if problem.direction == "backward":
        blocks = (config.subtile,)
    return config.block_k in blocks and config.stages == 1


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
