"""Layouts of operands and results: "BTNH", `[B, T, N, H]`, and "BNTH", `[B, N, T, H]`.

Passes are written for tokens before heads. Axes are swapped within jitted functions, and again for
a custom call that reads and writes the caller's layout: XLA takes two swaps for none.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_gluon._problem import AttentionOperands, AttentionProblem, Residuals
from jax_gluon._quantization.formats import QuantizedTensor

_Array = TypeVar("_Array")
_Operands = TypeVar("_Operands", bound=AttentionOperands[Any])


def swapped(problem: AttentionProblem, x: _Array) -> _Array:
    """From the problem's layout to tokens before heads, and back: an array, or a tree of them.

    Codes are made with tokens before heads, and stay so.
    """
    if problem.layout == "BTNH":
        return x

    def swap(x: Any) -> Any:
        return x if isinstance(x, QuantizedTensor) else jnp.swapaxes(x, 1, 2)

    return jax.tree.map(swap, x, is_leaf=lambda x: isinstance(x, QuantizedTensor))


def swapped_operands(problem: AttentionProblem, operands: _Operands) -> _Operands:
    """The operands with query, key and value swapped."""
    query, key, value = swapped(problem, tuple(operands[:3]))
    return operands._replace(query=query, key=key, value=value)


def swapped_residuals(problem: AttentionProblem, residuals: Residuals) -> Residuals:
    """All of them swapped."""
    operands = swapped_operands(problem, residuals.operands)
    return Residuals(operands, *swapped(problem, tuple(residuals[1:])))
