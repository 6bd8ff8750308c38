"""From float operands to codes, where a problem asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_gluon._problem import AttentionProblem, Operands
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from jax_gluon._visible_tokens import visible_tokens


def quantize_operands(
    problem: AttentionProblem,
    operands: Operands,
    quantize: Callable[[jax.Array, QuantSpec, jax.Array | None], QuantizedTensor],
    heads_over: tuple[str, ...] = (),
) -> Operands:
    """The operands with those that `problem.quantization` names as codes of `quantize`.

    Codes know nothing of hidden tokens. `heads_over` is as for `visible_tokens`.
    """
    query_spec, key_spec, value_spec = problem.quantization
    if not any(problem.quantization):
        return operands
    query_visible, key_value_visible = visible_tokens(problem, operands, heads_over)

    def codes(x: Any, spec: QuantSpec | None, visible: jax.Array | None) -> Any:
        return x if spec is None else quantize(x, spec, visible)

    return operands._replace(
        query=codes(operands.query, query_spec, query_visible),
        key=codes(operands.key, key_spec, key_value_visible),
        value=codes(operands.value, value_spec, key_value_visible),
    )


def with_codes(operands: Operands, codes: Sequence[QuantizedTensor | None]) -> Operands:
    """The operands with those codes, of query, key and value, that are not None."""
    query, key, value = (y or x for x, y in zip(operands[:3], codes, strict=True))
    return operands._replace(query=query, key=key, value=value)
