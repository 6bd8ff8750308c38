"""Keys and values in pages: codes `[pages, tokens, K, H]`, and a table of each entry's pages."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_gluon._problem import Operands
from jax_gluon._quantization.formats import QuantizedTensor


def key_value_length(operands: Operands) -> int:
    """S, the tokens of an entry of the batch."""
    table, tokens = operands.page_table, operands.key.shape[1]
    return tokens if table is None else table.shape[1] * tokens


def page_tokens(operands: Operands) -> int:
    """Tokens of a page; 0 where keys and values are in one piece."""
    return 0 if operands.page_table is None else operands.key.shape[1]


def in_one_piece(operands: Operands) -> Operands:
    """The operands with keys and values copied from their pages, for what reads no pages."""
    table = operands.page_table
    if table is None:
        return operands
    key, value = (gathered(x, table) for x in (operands.key, operands.value))
    return operands._replace(key=key, value=value, page_table=None)


def gathered(x: jax.Array | QuantizedTensor, table: jax.Array) -> QuantizedTensor:
    """Codes `[B, S, K, H]` from pages; the centers are those of the entries already."""
    assert isinstance(x, QuantizedTensor)

    def tokens(part: jax.Array) -> jax.Array:
        pages = jnp.take(part, table, axis=0, mode="clip")
        return pages.reshape(table.shape[0], -1, *part.shape[2:])

    whole = jax.tree.map(tokens, dataclasses.replace(x, center=None))
    return dataclasses.replace(whole, center=x.center)
