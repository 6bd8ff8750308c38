"""`context_parallel_attention`: whole arrays, whose tokens a mesh shares."""

from __future__ import annotations

from typing import Any, Unpack

import jax
from jax.typing import ArrayLike

from jax_gluon._arguments import AttentionKeywords
from jax_gluon._context_parallel.attention import attend
from jax_gluon._context_parallel.division import Axis, Division
from jax_gluon._context_parallel.problem import Strategy
from jax_gluon._context_parallel.token_layouts import TokenLayout
from jax_gluon._errors import Checker
from jax_gluon._typing import Array, BoolOrInteger, Float

#: Keywords that may be arrays. Numbers among them stay what they are.
_ARRAYS = (
    "query_seq_lengths", "key_value_seq_lengths", "key_value_mask", "query_offset",
    "query_segment_ids", "key_value_segment_ids", "query_positions", "key_value_positions",
    "sinks", "scale", "dropout_rng",
)  # fmt: skip
_OPERANDS = ("query", "key", "value", "bias", "mask")


def context_parallel_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Float[ArrayLike, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNTS"] | None = None,
    *,
    mesh: jax.sharding.Mesh,
    axis: Axis,
    batch_axis: Axis | None = None,
    head_axis: Axis | None = None,
    token_layout: TokenLayout = "contiguous",
    strategy: Strategy | None = None,
    return_residual: bool = False,
    **keywords: Unpack[AttentionKeywords],
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """`dot_product_attention` of arrays whose tokens are sharded along an axis of a mesh.

    It is `ring_attention` in a `jax.shard_map` of its own: for use under `jax.jit`, of arrays that
    are sharded as the arguments say, or will be.

    **Arguments:** those of `dot_product_attention`, of all tokens, of arrays alone; and

    - `mesh`: the mesh.
    - `axis`: the axis of the mesh (or several) along which tokens are sharded, of query, key, value
      and whatever is of tokens. Its size divides T and S.
    - `batch_axis`, `head_axis`: axes along which the first batch axis and the heads are, if they
      are sharded too.
    - `token_layout`: the order in which the tokens are given, and so whose tokens a device has: see
      `ring_attention`, and `reorder_tokens`, which makes it.
    - `strategy`: as of `ring_attention`; None takes the one that sends the fewest bytes.
    - `return_residual`: also return the log-sum-exp of each row.

    **Returns:** as `dot_product_attention`, sharded like query.

    **Raises:** as `ring_attention`; `ValueError` for an axis that the mesh has not, for numbers of
    tokens, batch entries or heads that its size does not divide, and where query and key are
    sharded along other axes.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
    >>> x = jnp.ones((2, 64, 8, 16))
    >>> @jax.jit
    ... def attention(x):
    ...     return jax_gluon.context_parallel_attention(
    ...         x, x, x, mesh=mesh, axis="sequence", is_causal=True, token_layout="zigzag"
    ...     )
    >>> attention(x).shape
    (2, 64, 8, 16)
    """
    check = Checker("context_parallel_attention")
    check.flag("return_residual", return_residual)
    given: dict[str, Any] = {
        "query": query, "key": key, "value": value, "bias": bias, "mask": mask, **keywords
    }  # fmt: skip
    axes = {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis}
    division = Division.of(check, mesh, axes, given, keywords.get("layout"))
    arrays = {
        name: check.array(name, x) if not isinstance(x, jax.Array) else x
        for name, x in given.items()
        if name in (*_OPERANDS, *_ARRAYS) and x is not None and not isinstance(x, int | float)
    }
    static = {name: x for name, x in given.items() if name not in arrays}
    how = token_layout, strategy

    def local(shards: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        own = static | shards
        operands = tuple(own.pop(name) for name in _OPERANDS)
        return attend(check, operands, axis, how, own)

    results = division.spec("query", ()), division.spec_of_statistics()
    out, log_sum_exp = division.mapped(local, arrays, results)
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(log_sum_exp).astype(arrays["key"].dtype)
