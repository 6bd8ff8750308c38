"""Which kernel a call gets: as asked for, as the environment says, as measured, or by default."""

from __future__ import annotations

import os
import sys

from jax_gluon._plan import tuned_table
from jax_gluon._plan.selection import (
    PIPELINES,
    KernelConfig,
    KernelProblem,
    allowed_configs,
    is_allowed,
    kernel_config,
    select_kernel,
)
from jax_gluon._problem import AttentionProblem, Kernels, Operands
from jax_gluon._quantization.formats import QuantizedTensor

ENVIRONMENT = "JAX_GLUON_KERNEL"


#: A wish for a kernel: a pipeline, or one with its sizes.
Wish = str | KernelConfig
#: As arguments have it: for both passes, or for forward and for backward.
Wishes = Wish | tuple[Wish | None, Wish | None] | None


def of_direction(kernel: Wishes, direction: str) -> Wish | None:
    """The wish for one pass. Sizes that are given without a pair are forward's."""
    if isinstance(kernel, tuple):
        return kernel[direction == "backward"]
    if isinstance(kernel, KernelConfig) and direction == "backward":
        return kernel.pipeline
    return kernel


def choose(problem: KernelProblem, device: str, kernel: Wishes) -> tuple[KernelConfig, str]:
    """The kernel of `"cpu"` or `"metal"` for a problem, and why.

    `kernel` is the caller's wish. Without one the environment variable JAX_GLUON_KERNEL decides,
    and without that `selection.select_kernel` with the table of `jax-gluon tune`.

    **Raises:** `ValueError` where the environment variable names no pipeline.
    """
    wish = of_direction(kernel, problem.direction)
    if isinstance(wish, KernelConfig):
        return wish, "these sizes were asked for"
    source = f'kernel="{wish}" was asked for'
    if wish is None and (given := os.environ.get(ENVIRONMENT)):
        wish, source = given, f"{ENVIRONMENT} is {given}"
        if wish not in PIPELINES:
            raise ValueError(f'jax_gluon: {ENVIRONMENT} is "{wish}"; allowed: {_names()}.')
    if wish is None:
        return select_kernel(problem, device, tuned_table.measured(device))
    return kernel_config(problem, device, wish), source


def refused(
    problem: AttentionProblem, operands: Operands, kernel: Wishes
) -> tuple[str, str] | None:
    """What is found and what is allowed, where a device lacks the sizes that are wished for."""
    for direction in ("forward", "backward"):
        wish = of_direction(kernel, direction)
        if not isinstance(wish, KernelConfig):
            continue
        of_kernel = kernel_problem(problem, operands, direction)
        for device in _devices(problem):
            if not is_allowed(wish, of_kernel, device):
                allowed = allowed_configs(of_kernel, device, wish.pipeline)
                return str(wish), f"{direction} on {device} has {allowed}"
    return None


def _devices(problem: AttentionProblem) -> list[str]:
    """The devices that a call may run on."""
    may_be_metal = problem.implementation is None and sys.platform == "darwin"
    metal = ["metal"] if may_be_metal or problem.implementation == "metal" else []
    return metal if problem.implementation == "metal" else ["cpu", *metal]


def _names() -> str:
    return ", ".join(f'"{name}"' for name in PIPELINES)


def of_devices(
    problem: AttentionProblem, operands: Operands, direction: str, kernel: Wishes
) -> Kernels:
    """The kernels of the devices that a call may run on."""
    of_kernel = kernel_problem(problem, operands, direction)

    chosen = {device: choose(of_kernel, device, kernel)[0] for device in _devices(problem)}
    return Kernels(**chosen)


def kernel_problem(problem: AttentionProblem, operands: Operands, direction: str) -> KernelProblem:
    """What the choice of a kernel depends on."""
    _, T, _, H = operands.query.shape
    _, S, _, V = operands.value.shape
    specs = [
        x.spec if isinstance(x, QuantizedTensor) else spec
        for x, spec in zip(operands[:3], problem.quantization, strict=True)
    ]
    query, key, value = specs
    if query is None and key is None and value is None:
        name = operands.query.dtype.name
        is_exact = is_integer = True
    elif query is None or key is None or value is None:
        name, is_exact, is_integer = "float32", False, False
    else:
        name = f"int{min(query.bits, key.bits, value.bits)}"
        is_exact = (
            not any(spec.float_minimum for spec in (query, key, value))
            and not query.center
            and all(spec.head_block in (0, H) for spec in (query, key))
            and (value.head_block in (0, V) or value.token_block == 0)
        )
        # As ForwardBlocks::takes in plugin/cpu/forward_blocks.h.
        is_integer = not query.center and all(
            spec.bits == 4 or spec.head_block == 0 for spec in (query, key, value)
        )
    return KernelProblem(
        T, S, H, V, name, direction, problem.is_causal, problem.local_window, is_exact, is_integer
    )
