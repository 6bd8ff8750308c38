"""The variants of the CPU's kernels that tests force."""

from __future__ import annotations

import pytest

_plugin = pytest.importorskip("jax_gluon._plugin")


def cpu_variants() -> list[str]:
    """What the processor and the build have; a build for x86 without its emulation is to fail."""
    variants = list(_plugin.cpu_isas_supported())
    if not {"emulated_avx512", "neon"} & set(variants):
        variants.append("emulated_avx512")
    return variants
