"""The compiled plugin: loaded once, its custom calls registered."""

from __future__ import annotations

import contextlib
import functools
import importlib
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


def register() -> None:
    """Register the custom calls; a missing plugin is reported by the first call that needs it."""
    with contextlib.suppress(ImportError):
        plugin()
