"""Whether kernels that are written with Pallas for Mosaic GPU can run here."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import jax

_CAPABILITY = "9.0"


def modules() -> tuple[Any, Any]:
    """Pallas, and its part for NVIDIA GPUs, which take long to import."""
    from jax.experimental import pallas
    from jax.experimental.pallas import mosaic_gpu

    return pallas, mosaic_gpu


@functools.cache
def _is_known() -> bool:
    """Whether this JAX has what the kernels call."""
    try:
        _, mosaic_gpu = modules()
    except ImportError:
        return False
    if not hasattr(mosaic_gpu, "kernel") or not hasattr(mosaic_gpu, "load"):
        return False
    load = inspect.signature(mosaic_gpu.load).parameters
    is_optional = "idx" in load and load["idx"].default is not inspect.Parameter.empty
    return is_optional and "out_type" in inspect.signature(mosaic_gpu.kernel).parameters


def missing() -> str | None:
    """Why they can't, or None. Programs that are lowered elsewhere do not know the GPU."""
    if jax.default_backend() != "gpu":
        return "JAX's default backend is no GPU, which the kernel is made for"
    if not _is_known():
        return f"JAX {jax.__version__} lacks what the kernel calls of Mosaic GPU; 0.11 has it"
    gpu = cast(Any, jax).devices()[0]
    found = getattr(gpu, "compute_capability", None)
    if found != _CAPABILITY:
        return f"the kernel is made for compute capability {_CAPABILITY}, not {found}"
    return None
