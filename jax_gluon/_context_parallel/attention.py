"""`ring_attention`: for use inside of `jax.shard_map`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_gluon._arguments import AttentionKeywords
from jax_gluon._attention import run
from jax_gluon._context_parallel import differentiation
from jax_gluon._context_parallel.arguments import check_context
from jax_gluon._context_parallel.choice import strategy_of
from jax_gluon._context_parallel.problem import Strategy
from jax_gluon._context_parallel.token_layouts import TokenLayout
from jax_gluon._derivative_modes import naming_the_argument
from jax_gluon._dropout import of_later_entries, of_later_heads
from jax_gluon._errors import Checker
from jax_gluon._meshes import vary_alike
from jax_gluon._quantization.formats import Operand, QuantizedTensor
from jax_gluon._typing import Array, BoolOrInteger, Float


def ring_attention(
    query: Float[Operand, "*B T N H"],
    key: Float[Operand, "*B S K H"],
    value: Float[Operand, "*B S K V"],
    bias: Float[ArrayLike, "*#BNT all_S"] | None = None,
    mask: BoolOrInteger[ArrayLike, "*#BNT all_S"] | None = None,
    *,
    axis_name: Any,
    token_layout: TokenLayout = "contiguous",
    strategy: Strategy | None = "ring",
    return_residual: bool = False,
    **keywords: Unpack[AttentionKeywords],
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """`dot_product_attention` over all tokens, of which each device of an axis has a part.

    For use inside of `jax.shard_map`; `context_parallel_attention` takes whole arrays. Each of P
    devices has T rows and S keys, of P T and P S. Keys and values go from device to device while
    these compute (Ring Attention, https://arxiv.org/abs/2310.01889), results are merged through
    their log-sum-exp, and in backward gradients of keys and values go with them, in float32. With
    `quantization` keys and values are quantized once, and their codes are sent. Keys that no row of
    a device may see, by `is_causal`, `local_window_size` and `token_layout`, are neither computed
    with nor sent to it.

    **Arguments:** those of `dot_product_attention`, of the device's tokens; and

    - `bias`, `mask`: of the device's rows and of all keys, `[B, N, T, P S]` or what broadcasts to
      it, in the order of the shards. A `BlockMask` is not taken.
    - `query_seq_lengths`, `key_value_seq_lengths`: of the whole sequences, `[0, P T]` and
      `[0, P S]`.
    - `query_positions`, `key_value_positions`, `query_segment_ids`, `key_value_segment_ids`,
      `key_value_mask`: of the device's tokens.
    - `axis_name`: of the axis of the mesh along which tokens are sharded.
    - `token_layout`: which tokens a device has: `"contiguous"` ones; `"zigzag"`, chunks r and
      2P - 1 - r of 2P; `"striped"`, r, r + P, ...; as `reorder_tokens` puts them; or `"given"`,
      any, whose positions are arguments. Causal masks and windows are exact in all of them.
    - `strategy`: `"ring"`; `"all_gather"`, all keys at once; `"all_to_all"`, all tokens of N / P
      heads (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509), where P divides N and K, without
      bias and mask; or None, which takes the one that sends the fewest bytes, as
      `explain_context_parallel` says.
    - `return_residual`: also return the log-sum-exp of each row over all keys.

    Dropout's bits are those of `dot_product_attention` of the whole arrays, in the order of the
    shards; where batch entries or heads are sharded too, `context_parallel_attention` knows of it.

    **Returns:** as `dot_product_attention`, of the device's rows.

    **Raises:** as `dot_product_attention`; `ValueError` where `axis_name` is no axis of a
    surrounding `shard_map`, where `token_layout` needs an even number of tokens or positions that
    are not given, and where a device's tokens are not whole blocks of a quantized format.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(jax.devices()[:1], ("sequence",))
    >>> def attention(query, key, value):
    ...     return jax_gluon.ring_attention(
    ...         query, key, value, axis_name="sequence", is_causal=True, token_layout="zigzag"
    ...     )
    >>> tokens = P(None, "sequence")
    >>> sharded = jax.shard_map(
    ...     attention, mesh=mesh, in_specs=(tokens, tokens, tokens), out_specs=tokens
    ... )
    >>> x = jnp.ones((2, 64, 8, 16))
    >>> jax.jit(sharded)(x, x, x).shape
    (2, 64, 8, 16)
    """
    check = Checker("ring_attention")
    check.flag("return_residual", return_residual)
    operands = (query, key, value, bias, mask)
    how = token_layout, strategy
    out, log_sum_exp = attend(check, operands, axis_name, how, {**keywords})
    if not return_residual:
        return out
    dtype = jax.tree.leaves(key)[0].dtype if not isinstance(key, QuantizedTensor) else key.dtype
    return out, jax.lax.stop_gradient(log_sum_exp).astype(dtype)


def attend(
    check: Checker,
    operands: tuple[Any, Any, Any, Any, Any],
    axis_name: Any,
    how: tuple[Any, Any],
    keywords: dict[str, Any],
    first: tuple[Any, Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and natural log-sum-exp, -inf in empty rows; `how`: token layout and strategy.

    `first` are the numbers, among all devices' parts, of this device's part of the batch entries
    and of the heads.
    """
    token_layout, strategy = how
    axis = axis_name, axis_size(check, axis_name)
    given = check_context(check, operands, axis, token_layout, keywords)
    checked = given.checked
    if 0 in given.rows.query.shape[:2] or 0 in given.keys.key.shape[:2]:
        out, log_sum_exp = run(checked, False)
        return out, differentiation.show_empty_rows(log_sum_exp)
    strategy = strategy_of(check, given.context, strategy, given.rows, given.keys)
    seeds = given.rows.dropout_seeds
    if seeds is not None and first is not None:
        B, _, N, _ = given.rows.query.shape
        seeds = of_later_heads(of_later_entries(seeds, first[0] * B), first[1] * N)
    context = replace(given.context, strategy=strategy)
    # All of them vary over the axis, as what is computed does.
    rank = jax.lax.axis_index(axis_name)
    operands_of_axis: Any = vary_alike(rank, given.rows._replace(dropout_seeds=seeds), given.keys)
    _, rows, keys = operands_of_axis
    with naming_the_argument():
        out, log_sum_exp = differentiation.attend(context, rows, keys)
    log_sum_exp = differentiation.show_empty_rows(log_sum_exp)
    if given.checked.problem.layout == "BNTH":
        out, log_sum_exp = jnp.swapaxes(out, 1, 2), jnp.swapaxes(log_sum_exp, 1, 2)
    out = out.astype(checked.operands.query.dtype)
    return checked.unflatten(out), checked.unflatten(log_sum_exp)


def axis_size(check: Checker, axis_name: Any) -> int:
    """How many devices an axis has, of the mesh that a surrounding `shard_map` is manual over."""
    try:
        size: Any = cast(Any, jax.lax).psum(1, axis_name)
        return int(size)
    except (NameError, ValueError, TypeError) as error:
        allowed = "an axis of the mesh of a surrounding jax.shard_map"
        raise ValueError(check.text("axis_name", f"{axis_name!r} ({error})", allowed)) from error
