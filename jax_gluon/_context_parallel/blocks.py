"""Attention of a device's rows over one block of keys, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon import _lowering, _native
from jax_gluon._context_parallel import wire
from jax_gluon._context_parallel.pieces import Piece, Pieces, by_order, pieces_of
from jax_gluon._context_parallel.problem import (
    ContextProblem,
    Cotangents,
    Gradients,
    Index,
    Keys,
    Partial,
    Place,
    Rows,
)
from jax_gluon._context_parallel.token_layouts import positions
from jax_gluon._cuda import cudnn
from jax_gluon._dropout import of_later_tokens
from jax_gluon._errors import Checker
from jax_gluon._meshes import vary_like
from jax_gluon._plan.choice import kernels_of
from jax_gluon._problem import (
    EMPTY_ROW_LOG_SUM_EXP,
    AttentionOperands,
    AttentionProblem,
    Operands,
    Residuals,
    compute_dtype,
)

_Result = TypeVar("_Result")
_ALL = slice(None)


def attend(context: ContextProblem, rows: Rows, keys: Keys, place: Place, seen: Any) -> Partial:
    """Rows of one shard, or of all, over keys of another.

    `seen` says whether the device may see any of them: a bool, or a traced one.
    """

    def at_place(rows: Rows, keys: Keys) -> Partial:
        return _partial(context, *_of_block(context, rows, keys, place), rows)

    def in_pieces(pieces: Pieces, rows: Rows, keys: Keys) -> Partial:
        return by_order(pieces, place, functools.partial(_attend_piece, context), rows, keys)

    compute = functools.partial(_cut_or_whole, context, in_pieces, at_place)

    def skip(rows: Rows, keys: Keys) -> Partial:
        return nothing(rows, keys)

    return _if_seen(_may_see(context, rows, keys, seen), compute, skip, rows, keys)


def attend_all(context: ContextProblem, rows: Rows, keys: Keys) -> Partial:
    """Rows over all keys, both in the order of the sequence."""
    return _attend_piece(context, Piece(_ALL, _ALL, context.problem.is_causal), rows, keys)


def _attend_piece(context: ContextProblem, piece: Piece, rows: Rows, keys: Keys) -> Partial:
    part = _partial(context, *_of_piece(context, piece, rows, keys), rows)
    T = rows.query.shape[1]
    return Partial(
        _among(T, piece.rows, part.out),
        _among(T, piece.rows, part.maximum),
        _among(T, piece.rows, part.log_sum, EMPTY_ROW_LOG_SUM_EXP),
    )


def _partial(
    context: ContextProblem, problem: AttentionProblem, operands: Operands, rows: Rows
) -> Partial:
    dtype = compute_dtype(rows.query.dtype)
    _, residuals = _lowering.forward_part(_planned(context, problem, operands), dtype, operands)
    return Partial(residuals.out, residuals.row_maximum, residuals.log_sum)


def nothing(rows: Rows, keys: Keys) -> Partial:
    """Attention of rows that see no key."""
    dtype = compute_dtype(rows.query.dtype)
    shape = rows.query.shape[:-1]
    out = jnp.zeros((*shape, keys.value.shape[-1]), dtype)
    statistics = np.promote_types(dtype, np.float32)
    maximum = jnp.zeros(shape, statistics)
    log_sum = jnp.full(shape, EMPTY_ROW_LOG_SUM_EXP, statistics)
    return vary_like((rows, keys), Partial(out, maximum, log_sum))


def differentiate(
    context: ContextProblem,
    rows: Rows,
    keys: Keys,
    place: Place,
    seen: Any,
    whole: Partial,
    cotangents: Cotangents,
) -> Gradients:
    """The gradients that go through the rows' attention to a block, from what is of all keys."""
    dtype = compute_dtype(rows.query.dtype)

    def at_place(rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents) -> Gradients:
        problem, operands = _of_block(context, rows, keys, place)
        return _gradients(context, problem, operands, whole, cotangents)

    def in_pieces(pieces: Pieces, *operands: Any) -> Gradients:
        compute = functools.partial(_differentiate_piece, context)
        return by_order(pieces, place, compute, *operands)

    compute = functools.partial(_cut_or_whole, context, in_pieces, at_place)

    def skip(rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents) -> Gradients:
        query, key, value = (jnp.zeros(x.shape, dtype) for x in (rows.query, keys.key, keys.value))
        bias = _columns(rows.bias, keys, 0)
        d_bias = None if bias is None else jnp.zeros_like(bias)
        return vary_like((rows, keys, cotangents), Gradients(query, key, value, d_bias))

    seen = _may_see(context, rows, keys, seen)
    return _if_seen(seen, compute, skip, rows, keys, whole, cotangents)


def differentiate_all(
    context: ContextProblem, rows: Rows, keys: Keys, whole: Partial, cotangents: Cotangents
) -> Gradients:
    """The gradients of `attend_all`."""
    piece = Piece(_ALL, _ALL, context.problem.is_causal)
    return _differentiate_piece(context, piece, rows, keys, whole, cotangents)


def _differentiate_piece(
    context: ContextProblem,
    piece: Piece,
    rows: Rows,
    keys: Keys,
    whole: Partial,
    cotangents: Cotangents,
) -> Gradients:
    problem, operands = _of_piece(context, piece, rows, keys)
    whole = Partial(*(x[:, piece.rows] for x in whole))
    cotangents = Cotangents(*(x[:, piece.rows] for x in cotangents))
    part = _gradients(context, problem, operands, whole, cotangents)
    T, S = rows.query.shape[1], keys.key.shape[1]
    return Gradients(
        _among(T, piece.rows, part.query),
        _among(S, piece.keys, part.key),
        _among(S, piece.keys, part.value),
        None,
    )


def _gradients(
    context: ContextProblem,
    problem: AttentionProblem,
    operands: Operands,
    whole: Partial,
    cotangents: Cotangents,
) -> Gradients:
    problem = replace(_planned(context, problem, operands), is_partial=True)
    residuals = Residuals(operands, *whole)
    gradients = _lowering.backward(problem, residuals, *cotangents)
    d_bias = None
    if operands.bias is not None:
        d_bias = _lowering.backward_bias(problem, residuals, *cotangents)
    return Gradients(*gradients, d_bias)


def _cut_or_whole(
    context: ContextProblem,
    in_pieces: Callable[..., _Result],
    at_place: Callable[..., _Result],
    rows: Rows,
    keys: Keys,
    *others: Any,
) -> _Result:
    """In pieces where floats can be cut, or codes are read as floats."""
    pieces = pieces_of(context, rows, keys)
    if pieces is None:
        return at_place(rows, keys, *others)

    def of_floats(rows: Rows, keys: Keys, *others: Any) -> _Result:
        return in_pieces(pieces, *as_floats(rows, keys), *others)

    return of_tokens(context, of_floats, at_place, rows, keys, *others)


def of_tokens(
    context: ContextProblem,
    of_floats: Callable[..., _Result],
    of_codes: Callable[..., _Result],
    rows: Rows,
    keys: Keys,
    *others: Any,
) -> _Result:
    """`of_floats` where operands are, or would be read as such: NVIDIA's kernels take no codes."""
    problem = context.problem
    if not any(wire.is_codes(x) for x in (rows.query, keys.key, keys.value)):
        return of_floats(rows, keys, *others)
    on_cuda = None
    if problem.implementation in (None, "cudnn") and cudnn.missing() is None:
        on_cuda = of_floats
    return _lowering.on_platform(
        problem.implementation, of_codes, of_codes, rows, keys, *others, on_cuda=on_cuda
    )


def as_floats(rows: Rows, keys: Keys) -> tuple[Rows, Keys]:
    """What codes stand for, in the dtype that they were made of."""

    def of(x: Any) -> jax.Array:
        return x.dequantize() if wire.is_codes(x) else x

    return rows._replace(query=of(rows.query)), keys._replace(
        key=of(keys.key), value=of(keys.value)
    )


def _if_seen(seen: Any, compute: Any, skip: Any, *operands: Any) -> Any:
    if isinstance(seen, bool):
        return (compute if seen else skip)(*operands)
    return cast(Any, jax.lax).cond(seen, compute, skip, *operands)


def _may_see(context: ContextProblem, rows: Rows, keys: Keys, seen: Any) -> bool | jax.Array:
    """Whether positions and segments leave anything to be seen, by their least and largest."""
    if seen is False:
        return False
    conditions: list[jax.Array] = [] if seen is True else [seen]
    if rows.segment_ids is not None and keys.segment_ids is not None:
        of_rows, of_keys = rows.segment_ids, keys.segment_ids
        overlap = _least(of_rows) <= _largest(of_keys)
        conditions.append(jnp.any(overlap & (_least(of_keys) <= _largest(of_rows))))
    if keys.positions is not None and rows.positions is not None and context.problem.is_causal:
        conditions.append(jnp.any(_least(keys.positions) <= _largest(rows.positions)))
    if not conditions:
        return True
    return jnp.all(jnp.stack(conditions))


def _least(x: jax.Array) -> jax.Array:
    return jnp.min(x, axis=1)


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(x, axis=1)


def _of_block(
    context: ContextProblem, rows: Rows, keys: Keys, place: Place
) -> tuple[AttentionProblem, Operands]:
    """The problem of a block as one device has it; floats and codes as they are multiplied."""
    sight = context.sight
    is_contiguous = sight.layout == "contiguous"
    B, T = rows.query.shape[:2]
    S = keys.key.shape[1]
    first_row, first_key = place.rows * sight.tokens[0], place.keys * sight.tokens[1]
    lengths = key_value_lengths = offset = stands = None
    key_value_mask = keys.mask
    if rows.lengths is not None and is_contiguous:
        lengths = jnp.clip(rows.lengths - first_row, 0, T)
    if rows.key_value_lengths is not None and is_contiguous:
        key_value_lengths = jnp.clip(rows.key_value_lengths - first_key, 0, S)
    elif rows.key_value_lengths is not None:
        # Keys past the lengths are not the last ones of a block.
        index = positions(sight.layout, place.keys, sight.shards, S)
        within = index[None, :] < rows.key_value_lengths[:, None]
        key_value_mask = within if keys.mask is None else within & keys.mask
    if context.is_by_position and rows.positions is not None and keys.positions is not None:
        stands = rows.positions, keys.positions
    elif context.is_by_position and is_contiguous:
        distance = first_row - first_key
        if not (isinstance(distance, int) and distance == 0 and rows.offset is None):
            offset = jnp.broadcast_to(jnp.asarray(distance, jnp.int32), (B,))
            offset = offset if rows.offset is None else offset + rows.offset
    elif context.is_by_position:
        stands = _by_layout(context, rows, place, (B, T, S))
    seeds = rows.dropout_seeds
    if seeds is not None:
        # By places in the whole arrays, in the order of the shards.
        seeds = of_later_tokens(seeds, first_row, first_key)
    segment_ids = None
    if rows.segment_ids is not None and keys.segment_ids is not None:
        segment_ids = rows.segment_ids, keys.segment_ids
    operands = cast(Any, AttentionOperands)(
        rows.query,
        keys.key,
        keys.value,
        _columns(rows.bias, keys, place.keys),
        _columns(rows.mask, keys, place.keys),
        query_seq_lengths=lengths,
        key_value_seq_lengths=key_value_lengths,
        key_value_mask=key_value_mask,
        query_offset=offset,
        segment_ids=segment_ids,
        positions=stands,
        dropout_seeds=seeds,
    )
    return replace(context.problem, quantization=(None, None, None), layout="BTNH"), operands


def _of_piece(
    context: ContextProblem, piece: Piece, rows: Rows, keys: Keys
) -> tuple[AttentionProblem, Operands]:
    """The problem of some of the rows and keys of a block, which are floats."""
    operands = cast(Any, AttentionOperands)(
        rows.query[:, piece.rows], keys.key[:, piece.keys], keys.value[:, piece.keys]
    )
    problem = replace(
        context.problem,
        quantization=(None, None, None),
        layout="BTNH",
        is_causal=piece.is_causal,
    )
    return problem, operands


def _planned(
    context: ContextProblem, problem: AttentionProblem, operands: Operands
) -> AttentionProblem:
    """With the kernels that the device offers for it."""
    check = Checker(context.function)
    if problem.implementation == "cudnn":
        refusal = cudnn.missing() or cudnn.refusal(problem, operands)
        if refusal is not None:
            check.value_error("implementation", f'"cudnn", but {refusal}', 'None, "xla"')
    if problem.implementation in ("xla", "cudnn") or not _native.has_plugin():
        return problem
    return replace(problem, kernels=kernels_of(check, problem, operands, context.wish))


def _among(tokens: int, of: slice, part: jax.Array, others: float = 0.0) -> jax.Array:
    """`part`, of some of the tokens along axis 1, with `others` in place of those left out."""
    start, stop, _ = of.indices(tokens)
    pads = [(start, tokens - stop) if axis == 1 else (0, 0) for axis in range(part.ndim)]
    return part if stop - start == tokens else jnp.pad(part, pads, constant_values=others)


def _by_layout(
    context: ContextProblem, rows: Rows, place: Place, extents: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    B, T, S = extents
    sight = context.sight
    of_rows = row_positions(context, place.rows, T)
    of_keys = positions(sight.layout, place.keys, sight.shards, S)
    of_rows = jnp.broadcast_to(of_rows, (B, T))
    if rows.offset is not None:
        of_rows += rows.offset[:, None]
    return of_rows, jnp.broadcast_to(of_keys, (B, S))


def row_positions(context: ContextProblem, shard: Index, rows: int) -> jax.Array:
    """Where the rows of a shard stand by the layout; of all shards where there are as many rows."""
    sight = context.sight
    if rows == sight.tokens[0]:
        return positions(sight.layout, shard, sight.shards, rows)
    each = (positions(sight.layout, r, sight.shards, sight.tokens[0]) for r in range(sight.shards))
    return jnp.concatenate(list(each))


def _columns(x: jax.Array | None, keys: Keys, shard: Index) -> jax.Array | None:
    """The columns of `[b, n, t, S]` that belong to a block of keys."""
    if x is None or x.shape[3] == 1:
        return x
    size = keys.key.shape[1]
    return jax.lax.dynamic_slice_in_dim(x, shard * size, size, 3)


def added_columns(
    bias: jax.Array | None,
    so_far: jax.Array | None,
    part: jax.Array | None,
    shard: Index,
    keys: Keys,
) -> jax.Array | None:
    """The gradient of the bias with that of a block's columns added."""
    if bias is None or part is None:
        return None
    dtype = np.promote_types(part.dtype, np.float32)
    part = part.astype(dtype)
    if bias.shape[3] == 1:
        return part if so_far is None else so_far + part
    if so_far is None:
        so_far = vary_like(part, jnp.zeros(bias.shape, dtype))
    return jax.lax.dynamic_update_slice_in_dim(so_far, part, shard * keys.key.shape[1], 3)
