"""Kernels: templates, function constants, attributes of threads, indices of arguments."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, f32, i32, run, to_bfloat


def _positions(threads: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
    """What the kernel `positions` writes, for a grid that its threadgroups divide."""
    groups = [t // s for t, s in zip(threads, size, strict=True)]
    rows = []
    for z in range(threads[2]):
        for y in range(threads[1]):
            for x in range(threads[0]):
                grid = (x, y, z)
                local = [g % s for g, s in zip(grid, size, strict=True)]
                group = [g // s for g, s in zip(grid, size, strict=True)]
                index = (local[2] * size[1] + local[1]) * size[0] + local[0]
                total = size[0] * size[1] * size[2]
                rows.append(
                    [
                        *grid,
                        *local,
                        *group,
                        *size,
                        *groups,
                        *threads,
                        index,
                        index % 32,
                        index // 32,
                        -(-total // 32),
                        32,
                        index % 4,
                        index // 4,
                        size[0],
                        0,
                        threads[0],
                    ]
                )
    return np.array(rows, np.uint32)


def features() -> list[Feature]:
    x = f32(1, 2, 3)
    constants = {
        0: True,
        1: -7,
        2: 3000000000,
        3: 0.25,
        4: np.float16(1.5),
        5: np.int16(-300),
        6: np.uint16(60000),
        7: np.uint8(200),
        8: np.int8(-100),
        9: f32(1, 2, 3, 4),
        10: np.int64(-(2**40)),
        11: np.uint64(2**50),
        12: to_bfloat([2.5]),
    }
    lanes = np.arange(12) % 32
    y, xx = np.divmod(np.arange(12), 4)
    return [
        Feature(
            "template with host_name, decltype",
            "arguments:scale_float_3",
            [x * 3],
            [x],
            threads=(3,),
        ),
        Feature(
            "template with host_name, typedef",
            "arguments:scale_int_5",
            [i32(5, 10)],
            [i32(1, 2)],
            threads=(2,),
        ),
        Feature(
            "template with host_name, signature",
            "arguments:scale_half_2",
            [np.array([2, 4], np.float16)],
            [np.array([1, 2], np.float16)],
            threads=(2,),
        ),
        Feature("kernel in a namespace", "arguments:in_namespace", [i32(11)]),
        Feature(
            "function constants of every type, derived and absent ones",
            "arguments:function_constants",
            [
                f32(
                    *(1, -7, 3e9, 0.25, 1.5, -300, 60000, 200, -100, 6, -(2.0**40), 2.0**50, 2.5),
                    *(-13, 99, 1),
                )
            ],
            constants=constants,
        ),
        Feature(
            "argument of a function constant, given",
            "arguments:optional_argument",
            [x],
            [x],
            threads=(3,),
            constants={21: True},
        ),
        Feature(
            "argument of a function constant, left out",
            "arguments:optional_argument",
            [f32(-1, -1, -1)],
            threads=(3,),
            constants={21: False},
        ),
        Feature(
            "attributes of a thread",
            "arguments:positions",
            [_positions((12, 6, 4), (6, 3, 2))],
            threads=(12, 6, 4),
            threadgroup=(6, 3, 2),
        ),
        Feature(
            "attributes as ushort and as two components",
            "arguments:narrow_positions",
            [(xx * 100 + y * 10 + lanes).astype(np.uint16)],
            threads=(4, 3),
        ),
        Feature(
            "indices by expression, references to arrays",
            "arguments:index_expressions",
            [i32(321 + 7)],
            [None, None, i32(7), i32(1, 2, 3)],
        ),
        Feature(
            "arguments without an index", "arguments:implicit_indices", [i32(4)], [i32(9), i32(5)]
        ),
    ]


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)
