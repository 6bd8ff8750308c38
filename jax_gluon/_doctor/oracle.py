"""Attention and its gradients in float64 NumPy: nothing of it runs through JAX or XLA."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Float64 = NDArray[np.float64]


class Exact(NamedTuple):
    """What `attention` returns."""

    out: _Float64
    d_query: _Float64
    d_key: _Float64
    d_value: _Float64


def attention(
    query: _Float64, key: _Float64, value: _Float64, d_out: _Float64, lengths: NDArray[np.int32]
) -> Exact:
    """Attention `[B, T, N, V]` over the first `lengths` `[B]` keys, and gradients for `d_out`."""
    B, T, N, H = query.shape
    S, K, V = key.shape[1], key.shape[2], value.shape[3]
    grouped = query.reshape(B, T, K, N // K, H)
    d_grouped = d_out.reshape(B, T, K, N // K, V)
    logits = np.einsum("btkgh,bskh->bkgts", grouped, key) / np.sqrt(H)
    seen: NDArray[np.bool_] = np.arange(S, dtype=np.int32) < lengths[:, None, None, None, None]
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bkgts,bskv->btkgv", weights, value)
    d_weights = np.einsum("btkgv,bskv->bkgts", d_grouped, value)
    mean = np.sum(weights * d_weights, -1, keepdims=True)
    d_logits = weights * (d_weights - mean) / np.sqrt(H)
    return Exact(
        out.reshape(B, T, N, V),
        np.einsum("bkgts,bskh->btkgh", d_logits, key).reshape(B, T, N, H),
        np.einsum("bkgts,btkgh->bskh", d_logits, grouped),
        np.einsum("bkgts,btkgv->bskv", weights, d_grouped),
    )


def relative_error(actual: object, expected: _Float64) -> float:
    """Relative L2, infinite where `actual` is not finite."""
    found = np.asarray(actual, np.float64)
    if not np.all(np.isfinite(found)):
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
