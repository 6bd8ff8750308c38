"""Attention, its gradients and INT8 codes in float64 NumPy, one formula a line."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class OracleResult(NamedTuple):
    out: np.ndarray
    log_sum_exp: np.ndarray
    d_query: np.ndarray
    d_key: np.ndarray
    d_value: np.ndarray
    d_bias: np.ndarray | None


#: Of a call that has sinks: their gradient too.
OracleResultOfSinks = NamedTuple(
    "OracleResultOfSinks", [*OracleResult.__annotations__.items(), ("d_sinks", np.ndarray)]
)


def visible_keys(
    shape,
    bias,
    mask,
    is_causal,
    query_lengths,
    key_lengths,
    local_window_size,
    soft_cap,
    query_offset=None,
    segment_ids=None,
    positions=None,
    key_value_mask=None,
):
    """Which key each row sees: bool [B, N, T, S]."""
    B, _, T, S = shape
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    visible = np.ones(shape, bool)
    if mask is not None:
        visible &= np.asarray(mask)
    at_i, at_j = np.broadcast_to(i, (B, 1, T, 1)), np.broadcast_to(j, (B, 1, 1, S))
    if query_offset is not None:
        at_i = at_i + np.broadcast_to(query_offset, B).astype(np.int64)[:, None, None, None]
    if positions is not None:
        at_i, at_j = _of_tokens(positions, B)
    if is_causal:
        visible &= at_j <= at_i
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2).astype(np.int64)
        visible &= (at_i - left <= at_j) & (at_j <= at_i + right)
    if segment_ids is not None:
        id_i, id_j = _of_tokens(segment_ids, B)
        visible &= id_i == id_j
    if query_lengths is not None:
        visible &= (i < np.asarray(query_lengths)[:, None, None])[:, None]
    if key_lengths is not None:
        visible &= (j < np.asarray(key_lengths)[:, None, None])[:, None]
    if key_value_mask is not None:
        visible &= np.broadcast_to(np.asarray(key_value_mask) != 0, (B, S))[:, None, None]
    if bias is not None and soft_cap is None:
        visible &= ~(np.asarray(bias, np.float64) < -2.35e38)  # NaN is visible
    return visible


def _of_tokens(pair, B):
    """Numbers of rows [B, 1, T, 1] and of keys [B, 1, 1, S]."""
    rows, keys = (np.broadcast_to(x, (B, np.shape(x)[-1])).astype(np.int64) for x in pair)
    return rows[:, None, :, None], keys[:, None, None, :]


def _weighted_sum(weights, x, visible):
    """`weights` [B, N, T, S] times `x` [B, N, S, H], hidden elements out before the sum."""
    if np.isfinite(x).all():
        return np.where(visible, weights, 0.0) @ x
    return np.where(visible[..., None], weights[..., None] * x[:, :, None], 0.0).sum(-2)


def _pair(of_query, of_key_value):
    """One array stands for both sides."""
    if of_query is None and of_key_value is None:
        return None
    return (
        of_key_value if of_query is None else of_query,
        of_query if of_key_value is None else of_key_value,
    )


class _Softmax(NamedTuple):
    """All that is between logits and probabilities; heads stand before tokens, [B, N, T, S]."""

    query: np.ndarray
    key: np.ndarray  # of each query head, as value
    value: np.ndarray
    scale: float
    visible: np.ndarray
    slope: np.ndarray  # of the soft cap
    p: np.ndarray
    p_sink: np.ndarray  # [B, N, T, 1]
    log_sum_exp: np.ndarray  # [B, N, T]
    share: np.ndarray  # what dropout multiplies p by


def _softmax(
    query,
    key,
    value,
    bias,
    mask,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    key_value_mask=None,
    local_window_size=None,
    query_offset=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    query_positions=None,
    key_value_positions=None,
    logits_soft_cap=None,
    sinks=None,
    kept=None,
    dropout_rate=0.0,
):
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value))
    B, N, T, H = q.shape
    _, K, S, _ = k.shape
    k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
    scale = 1 / np.sqrt(H) if scale is None else float(scale)
    visible = visible_keys(
        (B, N, T, S), bias, mask, is_causal, query_seq_lengths, key_value_seq_lengths,
        local_window_size, logits_soft_cap, query_offset,
        _pair(query_segment_ids, key_value_segment_ids),
        _pair(query_positions, key_value_positions), key_value_mask,
    )  # fmt: skip
    logits = np.where(visible, q @ k.swapaxes(2, 3), 0.0) * scale
    if bias is not None:
        logits = logits + np.where(visible, np.asarray(bias, np.float64), 0.0)
    slope = np.ones_like(logits)
    if logits_soft_cap is not None:
        tanh = np.tanh(logits / logits_soft_cap)
        logits, slope = logits_soft_cap * tanh, 1 - tanh**2
    sink = np.full(N, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    sink = sink[:, None, None]
    maximum = np.max(logits, axis=-1, keepdims=True, where=visible, initial=-1e300)
    maximum = np.maximum(maximum, sink)
    exponentials = np.where(visible, np.exp(np.where(visible, logits - maximum, 0.0)), 0.0)
    total = exponentials.sum(-1, keepdims=True) + np.exp(sink - maximum)
    empty = total == 0
    p = exponentials / np.where(empty, 1.0, total)
    p_sink = np.exp(sink - maximum) / np.where(empty, 1.0, total)
    log_sum_exp = np.where(empty, -np.inf, maximum + np.log(np.where(empty, 1.0, total)))[..., 0]
    share = np.ones_like(p) if kept is None else np.asarray(kept) / (1 - dropout_rate)
    return _Softmax(q, k, v, scale, visible, slope, p, p_sink, log_sum_exp, share)


@np.errstate(invalid="ignore")
def attention(
    query, key, value, bias=None, mask=None, *, d_out=None, d_log_sum_exp=None, **keywords
) -> OracleResult | OracleResultOfSinks:
    """Attention and its gradients; cotangents default to zeros. `kept`: of dropout, [B, N, T, S].

    Operands that are not finite are for small shapes only: their sums take B N T S H numbers.
    """
    q, k, v, scale, visible, slope, p, p_sink, log_sum_exp, share = _softmax(
        query, key, value, bias, mask, **keywords
    )
    B, N, T, _ = q.shape
    S, K = k.shape[2], np.shape(key)[2]
    out = _weighted_sum(p * share, v, visible)

    d_out = np.zeros_like(out) if d_out is None else np.asarray(d_out, np.float64).swapaxes(1, 2)
    d_lse = np.zeros((B, T, N)) if d_log_sum_exp is None else np.asarray(d_log_sum_exp, np.float64)
    dp = np.where(visible, d_out @ v.swapaxes(2, 3), 0.0) * share
    delta = np.sum(p * dp, -1, keepdims=True) - d_lse.swapaxes(1, 2)[..., None]
    d_logits = p * (dp - delta) * slope
    d_bias = None
    if bias is not None:
        d_bias = d_logits
        shape = (1,) * (4 - np.ndim(bias)) + np.shape(bias)
        for axis, extent in enumerate(shape):
            if extent == 1:
                d_bias = d_bias.sum(axis, keepdims=True)
        d_bias = d_bias.reshape(np.shape(bias))

    def over_group(weights, x):
        """The sum over rows, and over the query heads of each kv head: [B, S, K, H]."""
        each = _weighted_sum(weights.swapaxes(2, 3), x, visible.swapaxes(2, 3))
        return each.reshape(B, K, N // K, S, x.shape[-1]).sum(2).swapaxes(1, 2)

    result = OracleResult(
        out.swapaxes(1, 2),
        log_sum_exp.swapaxes(1, 2),
        _weighted_sum(d_logits * scale, k, visible).swapaxes(1, 2),
        over_group(d_logits * scale, q),
        over_group(p * share, d_out),
        d_bias,
    )
    if keywords.get("sinks") is None:
        return result
    d_sinks = np.where(p_sink == 0, 0.0, -p_sink * delta).sum((0, 2, 3))
    return OracleResultOfSinks(*result, d_sinks)


class TangentResult(NamedTuple):
    out: np.ndarray
    log_sum_exp: np.ndarray
    tangent_out: np.ndarray
    tangent_log_sum_exp: np.ndarray


@np.errstate(invalid="ignore")
def tangent(query, key, value, bias=None, mask=None, *, tangents, **keywords) -> TangentResult:
    """Attention and its derivative along `tangents`, by the operands' names; others are zero."""
    q, k, v, scale, visible, slope, p, p_sink, log_sum_exp, share = _softmax(
        query, key, value, bias, mask, **keywords
    )

    def of(name, operand, like):
        if name not in tangents:
            return np.zeros_like(like)
        x = np.asarray(tangents[name], np.float64).swapaxes(1, 2)
        return np.repeat(x, like.shape[1] // operand.shape[2], axis=1)

    dq, dk, dv = of("query", query, q), of("key", key, k), of("value", value, v)
    dx = scale * (dq @ k.swapaxes(2, 3) + q @ dk.swapaxes(2, 3))
    if "bias" in tangents:
        dx = dx + np.asarray(tangents["bias"], np.float64)
    dx = np.where(visible, dx * slope, 0.0)
    mean = np.sum(p * dx, -1, keepdims=True)
    if "sinks" in tangents:
        d_sinks = np.asarray(tangents["sinks"], np.float64)[:, None, None]
        mean += np.where(p_sink == 0, 0.0, p_sink * d_sinks)
    tangent_out = _weighted_sum(p * share * (dx - mean), v, visible)
    tangent_out += _weighted_sum(p * share, dv, visible)
    return TangentResult(
        _weighted_sum(p * share, v, visible).swapaxes(1, 2),
        log_sum_exp.swapaxes(1, 2),
        tangent_out.swapaxes(1, 2),
        mean[..., 0].swapaxes(1, 2),
    )


def fake_quantize(x, *, center=False, lengths=None):
    """What INT8 rows of `x` [B, S, K, H] dequantize to, in float64: zeros past the lengths."""
    x = np.asarray(x, np.float64)
    lengths = np.full(x.shape[0], x.shape[1]) if lengths is None else np.asarray(lengths)
    centers = np.zeros_like(x[:, :1])
    for b in range(x.shape[0] if center else 0):
        centers[b, 0] = lower_median(x[b, : np.clip(lengths[b], 0, 32)])
    seen = np.arange(x.shape[1]) < lengths[:, None]
    centered = np.where(seen[:, :, None, None], x - centers, 0.0)
    scale = np.abs(centered).max(-1, keepdims=True) / 127
    return np.rint(centered / np.where(scale > 0, scale, 1.0)) * scale + centers


def lower_median(x):
    """Of the finite values along the first axis, 0 where there are none."""
    count = np.isfinite(x).sum(0)
    ordered = np.sort(np.where(np.isfinite(x), x, np.inf), axis=0)
    middle = np.maximum(count[None] - 1, 0) // 2
    return np.where(count > 0, np.take_along_axis(ordered, middle, 0)[0], 0) if len(x) else 0.0
