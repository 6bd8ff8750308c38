"""Variants of the kernels, and scratch that starts as NaN."""

from __future__ import annotations

import pytest

# What AMX's own kernels multiply; all else they hand to AVX-512's, which run it too.
AMX_OPERANDS = {"bfloat16", "int8", "int4"}


def _is_handed_on(item):
    callspec = getattr(item, "callspec", None)
    values = {x for x in callspec.params.values() if isinstance(x, str)} if callspec else set()
    return bool(values & {"amx", "emulated_amx"}) and not values & AMX_OPERANDS


def pytest_collection_modifyitems(config, items):
    handed_on = [item for item in items if _is_handed_on(item)]
    if handed_on:
        config.hook.pytest_deselected(items=handed_on)
        items[:] = [item for item in items if not _is_handed_on(item)]


@pytest.fixture
def use(monkeypatch, require):
    """`use(variant)`: the implementation, after choosing the CPU's instruction set if it is one."""

    def choose(variant):
        implementation = variant if variant in ("metal", "xla") else "cpu"
        require(implementation)
        if implementation == "cpu":
            from jax_gluon import _plugin

            monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
            assert _plugin.cpu_isa() == variant
        return implementation

    return choose


@pytest.fixture
def poison(monkeypatch):
    """Results and scratch start as NaN, so that nothing unwritten passes."""
    monkeypatch.setenv("JAX_GLUON_POISON", "1")
