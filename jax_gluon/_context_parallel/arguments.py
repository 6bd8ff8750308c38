"""The public arguments, as a device has them, checked and brought to `ContextProblem`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_gluon._arguments import KEYWORDS, CheckedArguments, check_arguments, window_of
from jax_gluon._attention import scaled_operands
from jax_gluon._block_mask import BlockMask
from jax_gluon._context_parallel.problem import ContextProblem, Keys, Rows
from jax_gluon._context_parallel.routes import Sight
from jax_gluon._context_parallel.token_layouts import check_tokens, layout_of
from jax_gluon._errors import Checker
from jax_gluon._layouts import swapped_operands
from jax_gluon._logit_arguments import bias_of, mask_of, warn_of_visible_keys
from jax_gluon._operand_arguments import shape_of
from jax_gluon._problem import AttentionProblem, Operands
from jax_gluon._quantization.formats import PRESETS, QuantizedTensor
from jax_gluon._token_arguments import lengths_of_batch

#: Keywords whose meaning is of the whole sequence, or that have none here.
_OF_ALL = ("local_window_size", "query_seq_lengths", "key_value_seq_lengths")


@dataclass(frozen=True)
class ContextArguments:
    """Arguments that passed every check; `checked` are those of a device's tokens alone."""

    context: ContextProblem
    rows: Rows
    keys: Keys
    checked: CheckedArguments


def check_context(
    check: Checker,
    operands: tuple[Any, Any, Any, Any, Any],
    axis: tuple[Any, int],
    token_layout: Any,
    keywords: dict[str, Any],
) -> ContextArguments:
    """Query, key, value, bias and mask of a device of `axis`, its name and its size."""
    check.keywords(keywords, KEYWORDS)
    axis_name, shards = axis
    query, key, value, bias, mask = operands
    local = {name: x for name, x in keywords.items() if name not in _OF_ALL}
    # A device's part of the queries says nothing of how many there are.
    if isinstance(name := local.get("quantization"), str) and name in PRESETS:
        local["quantization"] = PRESETS[name]
    checked = check_arguments(check, query, key, value, None, None, **local)
    layout = layout_of(check, "token_layout", token_layout)
    if checked.differentiation == "any":
        check.value_error("differentiation", '"any"', 'None, "reverse"')
    if (implementation := checked.problem.implementation) in ("metal", "pallas"):
        check.value_error("implementation", f'"{implementation}"', 'None, "cpu", "xla", "cudnn"')
    own = checked.operands
    is_head_major = checked.problem.layout == "BNTH"
    T, N, _ = shape_of(own.query, is_head_major)
    S = shape_of(own.key, is_head_major)[0]
    check_tokens(check, "query", layout, T, shards)
    check_tokens(check, "key", layout, S, shards)
    stands_at_index = own.positions is None and own.query_offset is None
    window = window_of(
        check,
        keywords.get("local_window_size"),
        (T * shards, S * shards) if stands_at_index else None,
    )
    problem = _problem(checked, window)
    is_by_position = problem.is_causal or window is not None
    if layout == "given" and is_by_position and own.positions is None:
        allowed = 'int32 [B, T], where token_layout is "given" and causal or window compare them'
        check.value_error("query_positions", "None", allowed)
    _check_blocks(check, checked, (T, S), shards)
    for name, length in (("query_seq_lengths", T), ("key_value_seq_lengths", S)):
        if layout == "given" and keywords.get(name) is not None:
            allowed = f'None where token_layout is "given" (device has {length} tokens somewhere)'
            check.value_error(name, "set", allowed)
    is_float64 = own.query.dtype == jnp.float64
    logits = (N, T, S * shards)
    if isinstance(mask, BlockMask):
        check.type_error("mask", "a BlockMask", "None, or an array of this device's rows")
    bias_array = bias_of(check, bias, checked.batch, logits, is_float64)
    mask_array = mask_of(check, mask, checked.batch, logits)
    if problem.soft_cap is not None:
        warn_of_visible_keys(check, bias, mask, problem.soft_cap)

    def lengths(name: str, limit: int) -> jax.Array | None:
        return lengths_of_batch(check, name, keywords.get(name), checked.batch, limit)

    scaled = swapped_operands(checked.problem, scaled_operands(checked))
    positions = own.positions if is_by_position else None
    sight = Sight(
        layout,
        shards,
        (T, S),
        problem.is_causal,
        window,
        is_by_position and stands_at_index and layout != "given",
    )
    return ContextArguments(
        ContextProblem(problem, "ring", axis_name, sight, checked.kernel, check.function),
        Rows(
            scaled.query,
            bias_array,
            cast(Any, mask_array),
            lengths("query_seq_lengths", T * shards),
            lengths("key_value_seq_lengths", S * shards),
            own.query_offset,
            _part(positions, 0),
            _part(own.segment_ids, 0),
            own.sinks,
            own.dropout_seeds,
        ),
        Keys(
            scaled.key,
            scaled.value,
            _part(positions, 1),
            _part(own.segment_ids, 1),
            own.key_value_mask,
        ),
        checked,
    )


def _problem(checked: CheckedArguments, window: tuple[int, int] | None) -> AttentionProblem:
    return replace(checked.problem, local_window=window, layout="BTNH")


def _part(pair: tuple[jax.Array, jax.Array] | None, side: int) -> jax.Array | None:
    return None if pair is None else pair[side]


def _check_blocks(
    check: Checker, checked: CheckedArguments, tokens: tuple[int, int], shards: int
) -> None:
    """Tokens that share a scale are of one device, or codes would not be those of one device."""
    specs = zip(("query", "key", "value"), _specs(checked), strict=True)
    for (name, spec), count in zip(specs, (tokens[0], tokens[1], tokens[1]), strict=True):
        if spec is None or shards == 1 or spec.token_block < 2:
            continue
        if count % spec.token_block:
            found = f"of {count} tokens on each device, whose INT{spec.bits} blocks are cut"
            allowed = f"a multiple of {spec.token_block} tokens, which share scales"
            check.value_error(name, found, allowed)


def _specs(checked: CheckedArguments) -> list[Any]:
    operands: Operands = checked.operands
    return [
        x.spec if isinstance(x, QuantizedTensor) else spec
        for x, spec in zip(operands[:3], checked.problem.quantization, strict=True)
    ]
