"""The compiled plugin: loaded once, its custom calls registered."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import jax


@functools.cache
def plugin() -> ModuleType:
    """The compiled plugin, its custom calls registered for JAX's CPU platform.

    **Raises:** `ImportError` where the module is missing or does not load.
    """
    try:
        module: Any = importlib.import_module("jax_gluon._plugin")
    except ImportError as error:
        raise ImportError(
            "jax_gluon's compiled plugin can't be imported, so attention can only run with "
            'implementation="xla". Install jax-gluon from a wheel, or build it with '
            f'"pip install ." in its repository. The cause: {error}'
        ) from error
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module


def has_plugin() -> bool:
    """Whether the compiled plugin is there."""
    try:
        plugin()
    except ImportError:
        return False
    return True


def metal_device() -> tuple[str, str]:
    """Name of the Metal device, or "" and why there is none."""
    try:
        return plugin().metal_device()
    except ImportError as error:
        return "", str(error)


def may_be_metal() -> bool:
    """Whether a call may run on the GPU without asking: `implementation=None`, on a Mac."""
    return has_plugin() and plugin().metal_by_default()


def takes_metal() -> bool:
    """Whether such calls do: there is a device, and it passed its self-test; else warns why not."""
    if not may_be_metal() or not metal_device()[0]:
        return False
    if refusal := metal_refusal():
        _warn_of_metal(refusal)
        return False
    return True


def metal_refusal() -> str:
    """Why the Metal device may not be used, or an empty string: what its self-test found.

    The test runs once in a process; what it found is remembered for device, system and package.
    """
    module = plugin()
    if not module.tests_metal():
        return ""
    found: dict[str, Any] = module.metal_self_test(False)
    if found["passed"]:
        return ""
    return f'"{metal_device()[0]}" did not pass jax_gluon\'s self-test: {found["why"]}'


@functools.cache
def _warn_of_metal(refusal: str) -> None:
    warnings.warn(
        f"jax_gluon: the GPU is not used: {refusal}. Attention runs on the CPU; `jax-gluon doctor "
        "--metal` tests again.",
        stacklevel=2,
    )


def register() -> None:
    """Register the custom calls; a missing plugin is reported by the first call that needs it."""
    with contextlib.suppress(ImportError):
        plugin()
