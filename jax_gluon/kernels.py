"""Which kernel a call gets: as asked for, as the environment says, as measured, or by default."""

from __future__ import annotations

import os
import sys

from jax_gluon import tuned_table
from jax_gluon.formats import AttentionQuantization, QuantizedTensor
from jax_gluon.problem import AttentionProblem, Operands, Pipelines
from jax_gluon.selection import (
    PIPELINES,
    KernelConfig,
    KernelProblem,
    kernel_config,
    select_kernel,
)

ENVIRONMENT = "JAX_GLUON_KERNEL"


def choose(problem: KernelProblem, device: str, kernel: str | None) -> tuple[KernelConfig, str]:
    """The kernel of `"cpu"` or `"metal"` for a problem, and why.

    `kernel` is the caller's wish. Without one the environment variable JAX_GLUON_KERNEL decides,
    and without that `selection.select_kernel` with the table of `jax-gluon tune`.

    **Raises:** `ValueError` where the environment variable names no pipeline.
    """
    wish, source = kernel, f'kernel="{kernel}" was asked for'
    if wish is None and (given := os.environ.get(ENVIRONMENT)):
        wish, source = given, f"{ENVIRONMENT} is {given}"
        if wish not in PIPELINES:
            raise ValueError(f'jax_gluon: {ENVIRONMENT} is "{wish}"; allowed: {_names()}.')
    if wish is None:
        return select_kernel(problem, device, tuned_table.measured(device))
    return kernel_config(problem, device, wish), source


def _names() -> str:
    return ", ".join(f'"{name}"' for name in PIPELINES)


def of_devices(
    problem: AttentionProblem, operands: Operands, direction: str, kernel: str | None
) -> Pipelines:
    """The pipelines of the devices that a call may run on."""
    of_kernel = kernel_problem(problem, operands, direction)

    def chosen(device: str) -> str:
        return choose(of_kernel, device, kernel)[0].pipeline

    default = Pipelines()
    may_be_metal = problem.implementation is None and sys.platform == "darwin"
    return Pipelines(
        default.cpu if problem.implementation == "metal" else chosen("cpu"),
        chosen("metal") if may_be_metal or problem.implementation == "metal" else default.metal,
    )


def kernel_problem(problem: AttentionProblem, operands: Operands, direction: str) -> KernelProblem:
    """What the choice of a kernel depends on."""
    _, T, _, H = operands.query.shape
    _, S, _, V = operands.value.shape
    wanted = problem.quantization or AttentionQuantization()
    specs = [
        x.spec if isinstance(x, QuantizedTensor) else spec
        for x, spec in zip(operands[:3], (wanted.query, wanted.key, wanted.value), strict=True)
    ]
    query, key, value = specs
    if query is None and key is None and value is None:
        name = operands.query.dtype.name
        is_exact = True
    elif query is None or key is None or value is None:
        name, is_exact = "float32", False
    else:
        name = f"int{min(query.bits, key.bits, value.bits)}"
        is_exact = (
            not any(spec.float_minimum for spec in (query, key, value))
            and not query.center
            and all(spec.head_block in (0, H) for spec in (query, key))
            and (value.head_block in (0, V) or value.token_block == 0)
        )
    return KernelProblem(
        T, S, H, V, name, direction, problem.is_causal, problem.local_window, is_exact
    )
