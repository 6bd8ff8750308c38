"""Random problems, and what they look like to the float64 oracle of tests/support/oracle.py."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jax_gluon._quantization.formats import PRESETS, QuantizedTensor, QuantSpec
from tests.support import quantizer
from tests.support.metal.encoder import Problem

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHAPE: dict[str, int] = dict(B=2, T=45, S=77, N=4, K=2, H=28, V=22)


def draw(
    dtype: str = "float32", specs: tuple[QuantSpec | None, ...] = (None,) * 3, **shape: int
) -> tuple[Any, Any, Any, np.ndarray[Any, Any]]:
    """Query, key, value (as codes, where a spec says so) and the output's cotangent."""
    s = {**SHAPE, **shape}
    rng = np.random.default_rng(sum(map(ord, dtype)) + sum(s.values()))
    B, T, S, N, K, H, V = (s[x] for x in "BTSNKHV")
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V)
    query, key, value, d_out = (rng.standard_normal(x).astype(DTYPES[dtype]) for x in shapes)
    # Means, for centering to have something to take.
    if specs[1] is not None:
        key += rng.standard_normal((1, 1, K, H)).astype(key.dtype)
    if specs[2] is not None:
        value += rng.standard_normal((1, 1, K, V)).astype(value.dtype)
    codes = (
        x if spec is None else quantizer.quantize(x, spec)
        for x, spec in zip((query, key, value), specs, strict=True)
    )
    return (*codes, d_out)


def wide(x: Any) -> np.ndarray[Any, Any]:
    """In float64."""
    if isinstance(x, QuantizedTensor):
        return quantizer.dequantize(x)
    return np.asarray(x).astype(np.float64)


def expected(oracle: Any, problem: Problem, **cotangents: Any) -> Any:
    """The oracle's answer; an offset of the query is a mask to it."""
    mask, is_causal, window = problem.mask, problem.is_causal, problem.window
    if problem.query_offset is not None:
        position = np.arange(problem.T) + np.asarray(problem.query_offset, np.int64)[:, None]
        distance = np.arange(problem.S) - position[..., None]
        seen = distance <= 0 if is_causal else np.ones(distance.shape, bool)
        if window is not None:
            seen &= (distance >= -window[0]) & (distance <= window[1])
        mask = seen[:, None] if mask is None else seen[:, None] & mask
        is_causal, window = False, None
    if problem.segment_ids is not None:
        of_rows, of_keys = (np.asarray(x) for x in problem.segment_ids)
        seen = (of_rows[:, :, None] == of_keys[:, None])[:, None]
        mask = seen if mask is None else seen & mask
    return oracle(
        *map(wide, problem.operands()),
        None if problem.bias is None else wide(problem.bias),
        mask,
        scale=problem.scale,
        is_causal=is_causal,
        query_seq_lengths=problem.query_lengths,
        key_value_seq_lengths=problem.key_value_lengths,
        local_window_size=window,
        logits_soft_cap=problem.soft_cap or None,
        sinks=problem.sinks,
        **cotangents,
    )


def feature(name: str, **shape: int) -> dict[str, Any]:
    """Keywords of `Problem` that turn on one feature, or several."""
    s = {**SHAPE, **shape}
    B, T, S, N = (s[x] for x in "BTSN")
    rng = np.random.default_rng(7)
    bias = rng.standard_normal((B, N, T, S)).astype(np.float32)
    bias[0, 1, 3] = -np.inf
    bias[1, :, 5:9, ::2] = -np.inf
    mask = rng.random((B, N, T, S)) < 0.6
    mask[1, 2, 4] = False
    mask[0, :, 8:24, 16:40] = False
    features: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": dict(is_causal=True),
        "window": dict(window=(9, 4)),
        "lengths": dict(query_lengths=[T - 11, 0], key_value_lengths=[S + 9, S - 30]),
        "bias": dict(bias=bias),
        "broadcast_bias": dict(bias=bias[1:2, :, :1].astype(ml_dtypes.bfloat16)),
        "mask": dict(mask=mask),
        "broadcast_mask": dict(mask=mask[:, :1, :, :]),
        "offset_causal": dict(is_causal=True, query_offset=[-T // 2, S - T + 9]),
        "offset_window": dict(window=(9, 20), query_offset=[S - 30, -12]),
        "far_offset": dict(
            is_causal=True, window=(2**31 - 1, 0), query_offset=[2**31 - 1, -(2**31)],
            query_lengths=[T - 3, T],
        ),
        "soft_cap": dict(soft_cap=1.5, scale=-0.4),
        "zero_scale": dict(scale=0.0, is_causal=True),
        "sinks": dict(sinks=[1.5, -9.0, 6.0, -np.inf]),
        "no_keys": dict(key_value_lengths=[0, 0]),
        "everything": dict(
            bias=bias[:, :, :, :1].astype(np.float16), mask=mask[:1, :1], is_causal=True,
            window=(20, 3), query_lengths=[T, T - 7], key_value_lengths=[S - 5, 40], soft_cap=2.0,
            query_offset=[0, 15],
            segment_ids=(rng.integers(0, 2, (B, T)), rng.integers(0, 2, (B, S))),
        ),
    }  # fmt: skip
    return features[name]


FEATURES = (
    "plain", "causal", "window", "lengths", "bias", "broadcast_bias", "mask", "broadcast_mask",
    "offset_causal", "offset_window", "far_offset", "soft_cap", "zero_scale", "sinks", "no_keys",
    "everything",
)  # fmt: skip

INT8 = QuantSpec()
ZERO_POINT = QuantSpec(symmetric=False)
# Specs of query, key and value, the elements of forward's matrices, and the bound of its output.
QUANTIZED: dict[str, tuple[tuple[QuantSpec | None, ...], str, float]] = {
    "int8": ((INT8, QuantSpec(center=True), INT8), "half", 5e-4),
    "int8_zero_point": ((ZERO_POINT,) * 3, "half", 5e-4),
    "int8_tensor_head_block": (
        (
            QuantSpec(granularity="tensor"),
            QuantSpec(granularity="head", symmetric=False),
            QuantSpec(granularity="block", block_size=12, center=True),
        ),
        "half",
        5e-4,
    ),
    "int8_value_channel": (
        (INT8, INT8, QuantSpec(granularity="channel", symmetric=False)),
        "half",
        5e-4,
    ),
    "int8_value_group": ((INT8, INT8, QuantSpec(granularity="group", block_size=8)), "float", 2e-6),
    "int8_channel": (
        (
            QuantSpec(granularity="channel", symmetric=False),
            QuantSpec(granularity="channel_block", block_size=10),
            QuantSpec(symmetric=False, float_minimum=True),
        ),
        "float",
        2e-6,
    ),
    "int8_centered_query": ((QuantSpec(center=True), INT8, QuantSpec(center=True)), "float", 2e-6),
    "int4": (
        (PRESETS["int4"].query, PRESETS["int4"].key, PRESETS["int4"].value),
        "float",
        2e-6,
    ),
    "int4_channel": (
        (INT8, *(QuantSpec(4, False, "channel_block", float_minimum=True),) * 2),
        "float",
        2e-6,
    ),
    "int4_row": ((QuantSpec(4),) * 3, "half", 5e-4),
    "int4_zero_point": ((QuantSpec(4, symmetric=False),) * 3, "half", 5e-4),
    "int4_group": ((None, QuantSpec(4, granularity="group", block_size=5), None), "float", 2e-6),
    "float_query": ((None, INT8, QuantSpec(4)), "float", 2e-6),
}
