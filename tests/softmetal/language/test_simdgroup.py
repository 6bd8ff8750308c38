"""Shuffles, reductions, prefixes and votes of simdgroups and quadgroups."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, rng, run, to_bfloat


def _shuffled(v: np.ndarray, n: int = 32) -> np.ndarray:
    lane = np.arange(n)
    twice = (v * 2).astype(v.dtype)

    def fill(data, filling, delta, modulo, up):
        result = np.empty_like(data)
        for i in range(n):
            j = i % modulo - delta if up else i % modulo + delta
            source = data if 0 <= j < modulo else filling
            result[i] = source[i // modulo * modulo + j % modulo]
        return result

    return np.stack(
        [
            v[31 - lane],
            v[lane ^ 5],
            v[np.where(lane >= 3, lane - 3, lane)],
            v[np.where(lane + 3 < n, lane + 3, lane)],
            v[(lane - 7) % n],
            v[(lane + 7) % n],
            v[np.full(n, 9)],
            v[np.zeros(n, int)],
            fill(v, twice, 4, 32, True),
            fill(v, twice, 4, 32, False),
            fill(v, twice, 2, 8, True),
            fill(v, twice, 2, 8, False),
        ],
        1,
    )


def _reduced(v: np.ndarray) -> np.ndarray:
    w = v.astype(np.float64)
    total = [w.sum(), w.prod(), w.min(), w.max()]
    sums, products = np.cumsum(w), np.cumprod(w)
    return np.stack(
        [[*total, sums[i], sums[i] - w[i], products[i], products[i] / w[i]] for i in range(v.size)]
    )


def _quad(q: np.ndarray) -> np.ndarray:
    i = np.arange(4)
    ballot = sum(1 << k for k in range(4) if q[k] % 2 == 0)
    full = np.full(4, 1)
    return np.stack(
        [
            *(q[[2] * 4], q[i ^ 1], q[[0, 0, 1, 2]], q[[1, 2, 3, 3]], q[(i - 1) % 4]),
            *(q[(i + 1) % 4], q[[3] * 4], q[[0] * 4], full * q.sum(), full * q.prod()),
            *(full * q.min(), full * q.max(), full * np.bitwise_and.reduce(q)),
            *(full * np.bitwise_or.reduce(q), full * np.bitwise_xor.reduce(q), np.cumsum(q)),
            *(np.cumsum(q) - q, full * ballot, full, full * bool((q == 4).any())),
        ],
        1,
    ).astype(np.int32)


def features() -> list[Feature]:
    rows = []
    for name, kind in {
        "char": "i1",
        "ushort": "u2",
        "int": "i4",
        "half": "f2",
        "float": "f4",
    }.items():
        v = rng().integers(0, 50, 32).astype(kind)
        rows.append(
            Feature(
                f"simd shuffles of {name}",
                f"simdgroup:shuffle_{name}",
                [_shuffled(v)],
                [v],
                threads=(32,),
            )
        )
    v = rng().integers(0, 50, 32).astype(np.float32)
    rows.append(
        Feature(
            "simd shuffles of bfloat",
            "simdgroup:shuffle_bfloat",
            [to_bfloat(_shuffled(v))],
            [to_bfloat(v)],
            threads=(32,),
        )
    )
    quads = rng().integers(-8, 8, (32, 4)).astype(np.float32)
    rows.append(
        Feature(
            "simd functions of vectors",
            "simdgroup:shuffle_vectors",
            [quads[np.arange(32) ^ 1] + np.append(quads.sum(0)[:2], [0, 0]).astype(np.float32)],
            [quads],
            threads=(32,),
        )
    )
    for name, kind in {"int": "i4", "uint": "u4", "half": "f2", "float": "f4"}.items():
        for count in (32, 45):  # 45: the second simdgroup has 13 lanes
            v = rng().choice([1, 1, 1, 2], count).astype(kind)
            v[:20] = 1
            parts = [v[:32], v[32:]] if count > 32 else [v]
            rows.append(
                Feature(
                    f"simd reductions and prefixes of {name}"
                    + (", partial simdgroup" if count > 32 else ""),
                    f"simdgroup:reduce_{name}",
                    [np.concatenate([_reduced(p) for p in parts]).astype(kind)],
                    [v],
                    threads=(count,),
                )
            )
    bits = rng().integers(0, 2**32, 45, np.uint64).astype(np.uint32) | 0x10
    rows.append(
        Feature(
            "simd_and, simd_or, simd_xor",
            "simdgroup:reduce_bits",
            [
                np.concatenate(
                    [
                        np.tile(
                            [f.reduce(p) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)],
                            (p.size, 1),
                        )
                        for p in (bits[:32], bits[32:])
                    ]
                )
            ],
            [bits],
            threads=(45,),
        )
    )
    numbers = np.arange(32, dtype=np.uint32)
    ballot = sum(1 << i for i in range(21, 32))
    rows.append(
        Feature(
            "votes",
            "simdgroup:votes",
            [np.stack([[ballot, 1, 1, 2**32 - 1, i == 0, 1] for i in range(32)]).astype("u4")],
            [numbers],
            threads=(32,),
        )
    )
    v = rng().integers(1, 9, 32).astype(np.int32)
    rows.append(
        Feature(
            "quadgroup functions",
            "simdgroup:quads",
            [np.concatenate([_quad(q) for q in v.reshape(8, 4)])],
            [v],
            threads=(32,),
        )
    )
    return rows


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)
