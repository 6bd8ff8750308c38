"""`context_parallel_attention`: whole arrays, whose tokens a mesh shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_gluon._arguments import KEYWORDS, AttentionKeywords
from jax_gluon._context_parallel.arguments import check_context
from jax_gluon._context_parallel.attention import attend
from jax_gluon._context_parallel.choice import ContextPlan, plan, strategy_of
from jax_gluon._context_parallel.division import Axis, Division
from jax_gluon._context_parallel.problem import Strategy
from jax_gluon._context_parallel.token_layouts import TokenLayout
from jax_gluon._errors import Checker
from jax_gluon._quantization.formats import QuantizedTensor
from jax_gluon._typing import Array, BoolOrInteger, Float

#: Keywords that may be arrays. Numbers among them stay what they are.
_LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")
_INTEGERS = (
    "query_offset", "query_segment_ids", "key_value_segment_ids", "query_positions",
    "key_value_positions",
)  # fmt: skip
_ARRAYS = (*_LENGTHS, *_INTEGERS, "key_value_mask", "sinks", "scale", "dropout_rng")
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
    whole = _Whole.of(
        check,
        {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, **keywords},
        mesh,
        {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis},
    )

    def local(shards: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        operands, others = whole.of_device(shards)
        how = token_layout, strategy
        return attend(check, operands, axis, how, others, whole.division.place())

    division = whole.division
    results = division.spec("query", ()), division.spec_of_statistics()
    out, log_sum_exp = division.mapped(local, whole.arrays, results)
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(log_sum_exp).astype(whole.arrays["key"].dtype)


def explain_context_parallel(
    query: Float[ArrayLike | jax.ShapeDtypeStruct, "*B T N H"],
    key: Float[ArrayLike | jax.ShapeDtypeStruct, "*B S K H"],
    value: Float[ArrayLike | jax.ShapeDtypeStruct, "*B S K V"],
    bias: Float[ArrayLike | jax.ShapeDtypeStruct, "*#BNTS"] | None = None,
    mask: BoolOrInteger[ArrayLike | jax.ShapeDtypeStruct, "*#BNTS"] | None = None,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    axis: Axis,
    batch_axis: Axis | None = None,
    head_axis: Axis | None = None,
    token_layout: TokenLayout = "contiguous",
    strategy: Strategy | None = None,
    **keywords: Any,
) -> ContextPlan:
    """The plan for these arguments of `context_parallel_attention`, without running it.

    **Arguments:** those of `context_parallel_attention` but `return_residual`, arrays or
    `jax.ShapeDtypeStruct`s.

    **Returns:** a `ContextPlan`: the strategy, why it is that one, the bytes that each would send,
    and how the work is divided.

    **Raises:** as `context_parallel_attention`.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> mesh = jax.sharding.AbstractMesh((8,), ("sequence",))
    >>> query = jax.ShapeDtypeStruct((1, 8192, 8, 128), jnp.bfloat16)
    >>> key = value = jax.ShapeDtypeStruct((1, 8192, 2, 128), jnp.bfloat16)
    >>> plan = jax_gluon.explain_context_parallel(
    ...     query, key, value, mesh=mesh, axis="sequence", is_causal=True, token_layout="zigzag"
    ... )
    >>> plan.strategy, plan.traffic["ring"].forward, set(plan.work)
    ('ring', 7340032, {0.125})
    >>> plan.refused
    {'all_to_all': '8 query and 2 kv heads are no multiples of 8 devices'}
    """
    check = Checker("explain_context_parallel")
    whole = _Whole.of(
        check,
        {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, **keywords},
        mesh,
        {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis},
    )
    plans: list[ContextPlan] = []
    size = whole.division.size_of(axis)

    def of_shards(shards: dict[str, Any]) -> None:
        operands, others = whole.of_device(shards)
        given = check_context(check, operands, (axis, size), token_layout, others)
        strategy_of(check, given.context, strategy, given.rows, given.keys)
        plans.append(plan(given.context, strategy, given.rows, given.keys))

    jax.eval_shape(of_shards, whole.division.shapes_of_device(whole.arrays))
    return plans[0]


@dataclass(frozen=True)
class _Whole:
    """Arguments of all tokens: arrays, which are divided, and all others."""

    arrays: dict[str, Any]
    static: dict[str, Any]
    division: Division

    @staticmethod
    def of(
        check: Checker, given: dict[str, Any], mesh: Any, axes: dict[str, Axis | None]
    ) -> _Whole:
        check.keywords({name: None for name in given if name not in _OPERANDS}, KEYWORDS)
        arrays = {
            name: _array_of(check, name, x)
            for name, x in given.items()
            if name in (*_OPERANDS, *_ARRAYS) and x is not None and not _is_number(name, x)
        }
        static = {name: x for name, x in given.items() if name not in arrays}
        return _Whole(arrays, static, Division.of(check, mesh, axes, arrays, given.get("layout")))

    def of_device(self, shards: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Query, key, value, bias and mask of a device, and its other arguments."""
        own = self.static | shards
        return tuple(own.pop(name) for name in _OPERANDS), own


def _is_number(name: str, x: Any) -> bool:
    if name == "scale" and not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        # A number of NumPy's is no array scale, which would be multiplied in.
        return not isinstance(x, np.ndarray) or x.ndim == 0
    return isinstance(x, int | float)


def _array_of(check: Checker, name: str, x: Any) -> Any:
    """An array that has a sharding, without integers that its 32 bits do not hold."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct | QuantizedTensor):
        return x
    if name in _LENGTHS:
        return check.narrow_lengths(name, x)
    return check.int32(name, x) if name in _INTEGERS else check.array(name, x)
