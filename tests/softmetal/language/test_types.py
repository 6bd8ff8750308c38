"""Scalars, vectors, matrices, packed vectors, conversions, literals."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, f32, from_bfloat, i32, rng, run, to_bfloat, u32


def features() -> list[Feature]:
    v = f32(1, 2, 3, 4)
    a, b = f32(1, -2, 3, 0.5), f32(2, -2, 1, 8)
    i, j = a.astype(np.int32), b.astype(np.int32)
    plain = np.array([1.5, 0.1, 0.3], np.float16)
    one = np.float16(1)
    brain = from_bfloat(to_bfloat([1.5, 0.1, 0.3]))
    matrices = rng().integers(-3, 4, (2, 4, 4)).astype(np.float32)  # columns
    ma, mb = matrices[0].T.astype(np.float64), matrices[1].T.astype(np.float64)
    x = f32(1, 2, 3, 4)
    particles = np.zeros(2, np.dtype([("position", "3f4"), ("mass", "f4"), ("spin", "2f2")]))
    particles["position"] = [[1, 2, 3], [4, 5, 6]]
    particles["mass"] = [2, 3]
    particles["spin"] = [[1, 2], [0.5, 4]]
    moved = particles["position"] * particles["mass"][:, None] + 1
    bits = v.view(np.uint32)
    return [
        Feature(
            "sizes and alignments of types",
            "types:sizes",
            [
                u32(
                    *(1, 1, 1, 2, 2, 4, 4, 8, 8, 8, 2, 2, 4, 8, 16, 16, 4, 8, 8, 4, 2, 4, 32, 8),
                    *(8, 12, 6, 3, 16, 48, 64, 16, 16, 16, 8, 4, 2, 4),
                )
            ],
        ),
        Feature(
            "vector constructors",
            "types:construction",
            [
                f32(
                    *(1, 1, 1, 1, 1, 2, 3, 4, 1, 2, 3, 4, 1, 1, 2, 4, 1, 2, 1, 2, 1, 2, 1, 2),
                    *(1, 2, 3, 4, 4, 1, 2, 3, 1, 2, 3, 4, 1, 1, 2, 4, 1, 2, 3, 4, 2, 2, 2, 2),
                    *(0, 0, 0, 0, 4, 3, 2, 1, 1, 2, 3, 1),
                )
            ],
            [v],
        ),
        Feature(
            "vector operators",
            "types:operators",
            [
                np.concatenate(
                    [a + b, a - b, a * b, a / b, -a, a * 2, 2 - a, (a + b) / 2, f32(2, -1, 8, 2.5)]
                ),
                np.concatenate(
                    [
                        i & j,
                        i | j,
                        i ^ 5,
                        ~i,
                        i << 2,
                        j >> 1,
                        i - 3 * np.fix(i / 3).astype(int),
                        a < b,
                        a == a[[0, 0, 2, 2]],
                        (a < b) & (a != b),
                    ]
                ).astype(np.int32),
            ],
            [np.concatenate([a, b])],
        ),
        Feature(
            "swizzles read",
            "types:swizzle_read",
            [
                f32(
                    *(4, 3, 2, 1, 1, 1, 2, 2, 3, 2, 1, 4, 3, 1, 2, 4, 1, 2, 3, 4, 2, 2, 2, 2),
                    *(1, 2, 1, 2, 3, 3, 2, 3),
                )
            ],
            [v],
        ),
        Feature(
            "swizzles written",
            "types:swizzle_write",
            [
                f32(
                    *(2, 1, 3, 4, 2, 3, 2, 1, 5, 3, 3, 1, 1, 3, 3, 5, 2, 6, 6, 5, 2, 9, 6, 9),
                    *(0, 2, 9, 0),
                )
            ],
            [v],
        ),
        Feature(
            "vec<T, N> deduced from vectors and swizzles",
            "types:vector_templates",
            [f32(10, 3, 6, 9)],
            [v],
        ),
        Feature(
            "packed vectors",
            "types:packed",
            [
                np.concatenate(
                    [
                        [p["position"] @ m, p["position"][1], p["position"][2], p["spin"].sum()]
                        for p, m in zip(particles, moved, strict=True)
                    ]
                ).astype(np.float32),
                ((moved[:, ::-1] + [1, 0, 0]) * 2).astype(np.float32),
            ],
            [particles],
            threads=(2,),
        ),
        Feature(
            "conversions",
            "types:conversions",
            [i32(1, -2, 44, 255, -56, 3000, 1, 0, 3, 1, -2, 3, 1024, 3)],
            [f32(1.9, -2.9, 3.5, 0)],
        ),
        Feature(
            "as_type",
            "types:bits_as_type",
            [
                u32(
                    bits[0],
                    bits[1],
                    v[:2].astype(np.float16).view(np.uint32)[0],
                    0x04030201,
                    v.astype(np.float16).view(np.uint32)[1],
                    to_bfloat(v[2]),
                    0x7FC00001,
                    6,
                )
            ],
            [v],
        ),
        Feature(
            "half",
            "types:half_arithmetic",
            [
                np.array(
                    [
                        plain[0] + plain[1],
                        plain[0] * plain[1],
                        plain[0] / plain[1],
                        plain[0] * plain[1] + plain[2],
                        1.5,
                        one / np.float16(3),
                        65504,
                        np.inf,
                        -plain[2],
                        plain[0] + plain[1],
                        plain[2] + one,
                    ],
                    np.float16,
                )
            ],
            [plain],
        ),
        Feature(
            "bfloat",
            "types:bfloat_arithmetic",
            [
                to_bfloat(
                    [
                        brain[0] + brain[1],
                        brain[0] * brain[1],
                        brain[0] / brain[1],
                        from_bfloat(to_bfloat(brain[0] * brain[1])) + brain[2],
                        np.float32(1) / 3,
                        -brain[0],
                        brain[0] * brain[0],
                        brain[1] * brain[2],
                    ]
                ),
                f32(brain[0] + np.float32(0.001), brain[0] * brain[1]),
            ],
            [to_bfloat(brain)],
            values=lambda x: from_bfloat(x) if x.dtype == np.uint16 else x,
        ),
        Feature(
            "matrices",
            "types:matrices",
            [
                np.concatenate(
                    [
                        (ma @ mb).T.ravel(),
                        ma @ x,
                        x @ ma,
                        ma.ravel(),
                        [np.linalg.det(ma), np.linalg.det(ma[:3, :3])],
                        [np.linalg.det(ma[:2, :2]), ma[1, 2]],
                        mb[:, 3],
                        [0, 3, 0, 0, 9, 12, 15, 6],
                        ma[:, 2],
                        [0, 5, 6, 9],
                    ]
                ).astype(np.float32)
            ],
            [matrices, x],
            rtol=1e-5,
            atol=1e-4,
        ),
        Feature("array<T, N>", "types:arrays", [i32(20, 4, 4)], [i32(1, 2, 3, 4)]),
        Feature(
            "numeric_limits",
            "types:limits",
            [
                np.array(
                    [
                        *(np.finfo("f4").max, np.finfo("f4").min, np.finfo("f4").tiny),
                        *(np.finfo("f4").eps, np.inf, np.finfo("f4").smallest_subnormal),
                        *(65504, np.finfo("f2").tiny, np.finfo("f2").eps),
                        *(float.fromhex("0x1.fep127"), 2.0**-7, np.nan, -np.inf),
                        *(np.finfo("f4").max, np.pi),
                    ],
                    np.float32,
                ),
                np.array(
                    [-(2**31), 2**32 - 1, -32768, 255, 2**63 - 1, -128, 16, 11, 2**31 - 1, 128]
                ),
            ],
        ),
        Feature("type traits", "types:traits", [i32(1, 1, 1, 1, 1, 1, 12, 42, 6, 1, 1, 1, 1)]),
        Feature(
            "literals",
            "types:literals",
            [f32(1.5, 1e-3, 3, 2.5, 0.25, 0.5, 1 / 3, 4, 255, 97, 7, 1, 5, 1000)],
        ),
    ]


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)
