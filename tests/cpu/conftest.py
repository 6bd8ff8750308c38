"""Variants of the kernels, and scratch that starts as NaN."""

from __future__ import annotations

import pytest


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
