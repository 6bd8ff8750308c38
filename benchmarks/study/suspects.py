"""`python -m benchmarks.study.suspects`: two ways in which backward may not fit forward, measured.

Forward of codes rounds its probabilities to 8 bits. If backward took `D = rowsum(dO * O)` from that
output, rows of dS would not sum to 0, and all that keys share would leak into dQ. And if it
recomputed the scores less exactly than forward, its probabilities would not sum to 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from benchmarks import accuracy, report
from benchmarks.study.formats import ALL, OPERANDS, Format
from jax_gluon._quantization.formats import preset

SHAPE = (2, 320, 2, 64)  # B, S, N and K, H
ROWS = 64  # as many as H, so that a row's probabilities have a column of dV to themselves
FORMATS = ("float32", "bfloat16", "int8", "int8 uncentered", "int4")
#: Offset of the key and factor of the logits.
POINTS = ((0.0, 1.0), (0.0, 8.0), (10.0, 1.0), (100.0, 1.0))


@dataclass(frozen=True)
class Leak:
    """Of one call; all are relative.

    `key_sum` is the norm of dK's sum over keys, which is 0 where rows of dS sum to 0, over the sum
    of the norms; `row_sum` how far the recomputed probabilities of a row are from a sum of 1, at
    most; the rest are relative L2 errors from float64 at the dequantized operands, `careless` those
    of dQ where `D = rowsum(dO * O)` is taken from the output that forward gave, and all else is
    exact.
    """

    key_sum: float
    careless_key_sum: float
    row_sum: float
    d_query: float
    d_key: float
    d_value: float
    careless_d_query: float
    careless_d_key: float


def operands(offset: float, peak: float) -> list[np.ndarray]:
    """Query, key, value and cotangent; the key's first channels share `offset`."""
    rng = np.random.default_rng(0)
    B, S, N, H = SHAPE
    shapes = ((B, ROWS, N, H), (B, S, N, H), (B, S, N, H), (B, ROWS, N, H))
    q, k, v, d_out = (rng.standard_normal(shape, np.float32) for shape in shapes)
    k[..., : H // 8] += offset
    return [q * np.float32(peak), k, v, d_out]


def leak(name: str, offset: float, peak: float, implementation: str | None = None) -> Leak:
    form = ALL[name]
    q, k, v, d_out = operands(offset, peak)

    # Of bfloat16 the point is that of the rounded operands, as that of codes is theirs.
    q, k, v, d_out = (np.asarray(jnp.asarray(x, form.dtype), np.float32) for x in (q, k, v, d_out))

    def attention(*operands: jax.Array) -> jax.Array:
        operands = tuple(x.astype(form.dtype) for x in operands)
        return jax_gluon.dot_product_attention(
            *operands, quantization=form.quantization, implementation=implementation
        ).astype(jnp.float32)

    out, pullback = jax.vjp(attention, *map(jnp.asarray, (q, k, v)))
    found = [np.asarray(x, np.float64) for x in pullback(jnp.asarray(d_out))]
    # Row i of dO is 1 in column i alone: column i of dV is row i of P.
    one = np.broadcast_to(np.eye(ROWS, SHAPE[-1], dtype=np.float32)[:, None], q.shape)
    probabilities = np.asarray(pullback(jnp.asarray(one))[2], np.float64)

    points = dequantized(form, q, k, v)
    exact, careless = [np.zeros_like(x) for x in points], [np.zeros_like(x) for x in points[:2]]
    for b, n in np.ndindex(SHAPE[0], SHAPE[2]):
        of_head, g = [x[b, :, n] for x in points], d_out[b, :, n].astype(np.float64)
        gradients = accuracy.exact_gradients(*of_head, g)
        for x, y in zip(exact, gradients, strict=True):
            x[b, :, n] = y
        scale = 1 / np.sqrt(SHAPE[-1])
        probability = accuracy.softmax(of_head[0] @ of_head[1].T * scale)
        # Of D, by which P times it is missing in dS.
        error = (g * (np.asarray(out[b, :, n], np.float64) - probability @ of_head[2])).sum(1)
        d_scores = -probability * error[:, None] * scale
        careless[0][b, :, n] = gradients[0] + d_scores @ of_head[1]
        careless[1][b, :, n] = gradients[1] + d_scores.T @ of_head[0]
    return Leak(
        sum_over_keys(found[1]), sum_over_keys(careless[1]),
        float(np.abs(probabilities.sum(1) - 1).max()),
        *(relative(x, y) for x, y in zip(found, exact, strict=True)),
        *(relative(x, y) for x, y in zip(careless, exact[:2], strict=True)),
    )  # fmt: skip


def dequantized(form: Format, *arrays: np.ndarray) -> list[np.ndarray]:
    specs = preset(form.quantization)
    pairs = zip(OPERANDS, arrays, strict=True)
    return [
        np.asarray(
            jax_gluon.quantize(x, getattr(specs, name)).dequantize() if specs else x, np.float64
        )
        for name, x in pairs
    ]


def sum_over_keys(d_key: np.ndarray) -> float:
    return float(np.linalg.norm(d_key.sum(1)) / np.linalg.norm(d_key, axis=-1).sum())


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def measure() -> list[dict[str, Any]]:
    """Of every format, offset and peak."""
    return [
        {"format": name, "offset": offset, "peak": peak, **asdict(leak(name, offset, peak))}
        for name in FORMATS
        for offset, peak in POINTS
    ]


if __name__ == "__main__":
    json.dump({"suspects": measure(), "machine": report.machine()}, sys.stdout, indent=1)
