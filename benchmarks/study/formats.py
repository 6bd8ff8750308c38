"""The attention of a run: a format of query, key and value, and what makes it hard for codes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

import jax_gluon
from jax_gluon import AttentionQuantization
from jax_gluon._quantization.formats import preset

#: Query, key and value `[B, T, N, H]` to output, with the keywords of `dot_product_attention`.
Attention = Callable[..., jax.Array]


@dataclass(frozen=True)
class Format:
    """Query, key and value in `dtype`, then in codes; the output is float32 again."""

    dtype: str = "float32"
    quantization: str | AttentionQuantization | None = None


OPERANDS = ("query", "key", "value")


def _changed(name: str, **changes: dict[str, Any]) -> Format:
    """A preset with fields of some operands replaced."""
    specs = preset(name)
    assert specs is not None
    operands = {x: replace(getattr(specs, x), **changes.get(x, {})) for x in OPERANDS}
    return Format(quantization=AttentionQuantization(**operands))


_INT8 = preset("int8")
assert _INT8 is not None
_INT4 = preset("int4")
assert _INT4 is not None
_ROTATED = dict(query={"rotate": True}, key={"rotate": True})

#: What is trained by default.
FORMATS: dict[str, Format] = {
    "float32": Format(),
    "bfloat16": Format("bfloat16"),
    "int8": Format(quantization="int8"),
    "int4": Format(quantization="int4"),
}
#: Remedies, and a preset without one of its own.
VARIANTS: dict[str, Format] = {
    "int8 uncentered": _changed("int8", key={"center": False}),
    "int8 rotated": _changed("int8", **_ROTATED),
    "int8 query centered": _changed("int8", query={"center": True}),
    "int4, int8 key": Format(quantization=replace(_INT4, key=_INT8.key)),
    "int4, rotated int8 key": Format(
        quantization=replace(
            _INT4, query=replace(_INT8.query, rotate=True), key=replace(_INT8.key, rotate=True)
        )
    ),
    "int4 rows": Format(
        quantization=replace(
            _INT4,
            key=jax_gluon.QuantSpec(bits=4),
            value=jax_gluon.QuantSpec(bits=4),
        )
    ),
}
ALL = FORMATS | VARIANTS


@dataclass(frozen=True)
class Case:
    """A change of query and key that codes feel and, but for `peak`, exact attention does not.

    `outlier` multiplies a key channel of each head and divides the query's; `offset` is added to
    an eighth of the key's channels, the same for all tokens; `peak` multiplies the logits.
    """

    peak: float = 1.0
    outlier: float = 1.0
    offset: float = 0.0


CASES: dict[str, Case] = {
    "plain": Case(),
    "peak 4": Case(peak=4.0),
    "peak 16": Case(peak=16.0),
    "outlier 10": Case(outlier=10.0),
    "outlier 100": Case(outlier=100.0),
    "offset 10": Case(offset=10.0),
    "offset 100": Case(offset=100.0),
}


def changed(case: Case, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Query and key `[..., H]` of `case`."""
    H = key.shape[-1]
    factor = jnp.ones(H).at[H // 3].set(case.outlier)
    offset = jnp.where(jnp.arange(H) % 8 == 0, case.offset, 0.0)
    return query * (case.peak / factor), key * factor + offset


def attend(
    form: Format, case: Case, query: jax.Array, key: jax.Array, value: jax.Array,
    **keywords: Any,
) -> jax.Array:  # fmt: skip
    if case != Case():
        query, key = changed(case, query, key)
    operands = (x.astype(form.dtype) for x in (query, key, value))
    out = jax_gluon.dot_product_attention(
        *operands, **(keywords | {"quantization": form.quantization})
    )
    return out.astype(jnp.float32)


def attention(form: Format, case: Case) -> Attention:
    return functools.partial(attend, form, case)
