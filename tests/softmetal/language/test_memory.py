"""Address spaces, threadgroup memory, barriers, atomics."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, f32, i32, rng, run, u32


def features() -> list[Feature]:
    n = 64
    values = rng().integers(0, 100, 2 * n).astype(np.uint32)
    reals = rng().integers(-8, 8, n).astype(np.float32)
    wide = rng().integers(-8, 8, (3, 256)).astype(np.float32)
    scale = np.array([(2.0, 3)], np.dtype([("factor", "f4"), ("offset", "i4")]))
    lane = np.arange(n)
    neighbour = lane // 32 * 32 + (lane + 1) % 32
    count = 1000
    grid = np.arange(count)
    return [
        Feature(
            "address spaces, program-scope constants",
            "memory:address_spaces",
            [f32(43, 8, 5, 7, 14, 5, 40)],
            [f32(10, 20, 30, 40), scale, f32(5, 6)],
        ),
        Feature(
            "threadgroup variables",
            "memory:threadgroup_static",
            [np.repeat(values.reshape(2, n).sum(1) * 10 + [7, 8], n).astype(np.uint32)],
            [values],
            threads=(2 * n,),
            threadgroup=(n,),
        ),
        Feature(
            "threadgroup memory given by the host",
            "memory:threadgroup_dynamic",
            [reals[::-1] + np.roll(reals, -1)],
            [reals],
            threads=(n,),
            threadgroup_memory={0: 4 * n, 1: 16 * n},
        ),
        Feature(
            "threadgroup barriers",
            "memory:reduction",
            [wide.sum(1)],
            [wide],
            threads=(768,),
            threadgroup=(256,),
        ),
        Feature(
            "simdgroup barriers",
            "memory:simdgroup_barriers",
            [(neighbour**2).astype(np.uint32)],
            threads=(n,),
        ),
        Feature(
            "atomics of int, uint and float on device memory",
            "memory:atomics_device",
            [
                i32(count, -count * (count - 1) // 2, count - 1, 1 - count),
                u32(
                    *(0xFFFFFFFF, 0xFFFFFF00, np.bitwise_xor.reduce(grid), 77, 33, 9),
                ),
                f32(count / 2),
            ],
            threads=(count,),
            threadgroup=(100,),
            initial=[i32(0, 0, -5, 5), u32(0, 0xFFFFFFFF, 0, 0, 0, 33), f32(0)],
        ),
        Feature(
            "atomic compare-exchange",
            "memory:atomics_compare_exchange",
            [u32(count * (count - 1) // 2)],
            threads=(count,),
            threadgroup=(50,),
            initial=[u32(0)],
        ),
        Feature(
            "atomic maximum through bits",
            "memory:atomics_float_max",
            [np.abs(wide).max().reshape(1).view(np.uint32)],
            [np.abs(wide)],
            threads=(768,),
            threadgroup=(32,),
            initial=[u32(0)],
        ),
        Feature(
            "atomics on threadgroup memory",
            "memory:atomics_threadgroup",
            [np.tile(i32(n * (n - 1) // 2, n // 4), 3)],
            threads=(3 * n,),
            threadgroup=(n,),
        ),
        Feature(
            "atomic maximum of ulong",
            "memory:atomics_ulong",
            [np.array([(99 << 33) + 1], np.uint64)],
            threads=(100,),
            threadgroup=(10,),
            initial=[np.array([5], np.uint64)],
        ),
    ]


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)
