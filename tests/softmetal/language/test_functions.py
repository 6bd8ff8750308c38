"""Functions of float, half and bfloat, of vectors and of bits that are packed."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, f32, from_bfloat, i32, rng, run, to_bfloat, u32

# In the order of the kernel math_1, on float64.
MATH_1 = {
    "acos": np.arccos,
    "acosh": lambda x: np.arccosh(x + 2),
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "cospi": lambda x: np.cos(np.pi * x),
    "exp": np.exp,
    "exp10": lambda x: 10**x,
    "exp2": np.exp2,
    "fabs": np.abs,
    "floor": np.floor,
    "fract": lambda x: x - np.floor(x),
    "log": lambda x: np.log(x + 2),
    "log10": lambda x: np.log10(x + 2),
    "log2": lambda x: np.log2(x + 2),
    "rint": np.rint,
    "round": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "rsqrt": lambda x: (x + 2) ** -0.5,
    "sin": np.sin,
    "sinh": np.sinh,
    "sinpi": lambda x: np.sin(np.pi * x),
    "sqrt": lambda x: np.sqrt(x + 2),
    "tan": np.tan,
    "tanh": np.tanh,
    "tanpi": lambda x: np.tan(np.pi * x),
    "trunc": np.trunc,
    "abs": np.abs,
    "saturate": lambda x: np.clip(x, 0, 1),
    "sign": np.sign,
}


def _smoothstep(x, low, high):
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def features() -> list[Feature]:
    x = np.concatenate([rng().uniform(-0.99, 0.99, 24), [0.75, -0.25, 0.125]]).astype(np.float32)
    x64 = x.astype(np.float64)
    y = rng().uniform(-3, 3, x.size).astype(np.float32)
    y64 = y.astype(np.float64)
    h = x.astype(np.float16)
    h64 = h.astype(np.float64)
    triples = rng().uniform(-2, 2, (16, 4)).astype(np.float32)
    a, b, c = triples[:, :3].astype(np.float64).T
    p, q = f32(1, -2, 0.25, 3), f32(2, -1, -0.5, 0.75)
    parts = f32(6.5, -0.3, 100.25, -7, 1e-3)
    mantissa, exponent = np.frexp(parts)
    first, second = np.array([1.0, 2, -2]), np.array([-3.0, 0, 4])
    n1, n2 = first / 3, second / 5
    cosine = n1 @ n2
    k = 1 - 0.25 * (1 - cosine**2)
    geometry = np.zeros((2, 4), np.float32)
    geometry[0, :3], geometry[1, :3] = first, second
    special = f32(np.nan, np.inf)
    tests = np.array([np.nan, np.inf, 1e-40, -2], np.float32)
    color = f32(0.25, -0.5, 1.5, 0.6)
    unsigned, signed = np.clip(color, 0, 1), np.clip(color, -1, 1)

    def packed(values, widths):
        word, shift = 0, 0
        for value, width in zip(values, widths, strict=True):
            word |= (int(value) & ((1 << width) - 1)) << shift
            shift += width
        return word

    unorm8, snorm8 = np.rint(unsigned * 255), np.rint(signed * 127)
    unorm16, snorm16 = np.rint(unsigned[:2] * 65535), np.rint(signed[:2] * 32767)
    unorm10 = np.rint(unsigned * f32(1023, 1023, 1023, 3))
    half8 = np.rint(np.clip(color.astype(np.float16).astype(np.float32), 0, 1) * 255)
    r, g, bl = np.rint(unsigned[:3] * f32(31, 63, 31)).astype(int)
    words = u32(
        packed(unorm8, [8] * 4),
        packed(snorm8, [8] * 4),
        packed(unorm16, [16] * 2),
        packed(snorm16, [16] * 2),
        packed(unorm10, [10, 10, 10, 2]),
        packed(half8, [8] * 4),
        r << 11 | g << 5 | bl,
    )
    return [
        Feature(
            "functions of one number",
            "functions:math_1",
            [np.stack([f(x64) for f in MATH_1.values()], 1).astype(np.float32)],
            [x, u32(len(MATH_1))],
            threads=(x.size,),
            rtol=2e-6,
            atol=2e-7,
        ),
        Feature(
            "fast:: and precise::",
            "functions:math_1_fast",
            [
                np.stack(
                    [
                        *(np.exp2(x64), np.exp(x64), np.sqrt(x64 + 2), np.tanh(x64)),
                        *(np.maximum(x64, 0), 1 / (x64 + 2)),
                    ],
                    1,
                ).astype(np.float32)
            ],
            [x],
            threads=(x.size,),
            rtol=1e-6,
        ),
        Feature(
            "functions of half",
            "functions:math_half",
            [
                np.stack(
                    [np.exp(h64), np.tanh(h64), h64 * h64 + 1, np.maximum(h64, 0), np.cos(h64)], 1
                ).astype(np.float16)
            ],
            [h],
            threads=(h.size,),
            rtol=1e-3,
            atol=1e-6,
        ),
        Feature(
            "functions of bfloat",
            "functions:math_bfloat",
            [
                np.stack(
                    [
                        np.exp(from_bfloat(to_bfloat(x))),
                        np.exp(from_bfloat(to_bfloat(x))),
                        np.maximum(from_bfloat(to_bfloat(x)), 0),
                    ],
                    1,
                )
            ],
            [to_bfloat(x)],
            threads=(x.size,),
            rtol=1e-6,
        ),
        Feature(
            "functions of two numbers",
            "functions:math_2",
            [
                np.stack(
                    [
                        *(np.arctan2(x64, y64), np.copysign(x64, y64), x64 / y64),
                        *(np.maximum(x64 - y64, 0), np.maximum(x64, y64), np.minimum(x64, y64)),
                        *(np.fmod(x64, y64), np.abs(x64) ** y64, np.abs(x64) ** y64),
                        *(y64 >= x64, np.nextafter(x, y), np.maximum(x64, y64)),
                        np.minimum(x64, y64),
                    ],
                    1,
                ).astype(np.float32)
            ],
            [x, y],
            threads=(x.size,),
            rtol=1e-6,
            atol=1e-7,
        ),
        Feature(
            "functions of three numbers",
            "functions:math_3",
            [
                np.stack(
                    [
                        *(a * b + c, np.clip(a, -1, 1), a + (b - a) * c, _smoothstep(a, -1, 2)),
                        *(np.min([a, b, c], 0), np.max([a, b, c], 0), np.median([a, b, c], 0)),
                        *(np.min([a, b, c], 0), np.max([a, b, c], 0), np.median([a, b, c], 0)),
                    ],
                    1,
                ).astype(np.float32)
            ],
            [triples],
            threads=(16,),
            rtol=1e-6,
            atol=1e-6,
        ),
        Feature(
            "functions of vectors",
            "functions:math_vector",
            [
                np.concatenate(
                    [
                        *(np.exp2(p), np.maximum(p, 0), np.minimum(np.maximum(p, -0.5), q)),
                        *(p + (q - p) / 4, p * p),
                        np.minimum(p[:2], q[[1, 0]]),
                        p[2:] * q[2:] + 1,
                        *(np.where(p < q, q, p), p >= 0, np.clip(p, 0, 1)),
                        *(np.abs(np.fix(p * 4)), np.clip(np.fix(q * 4), -1, 1)),
                    ]
                ).astype(np.float32)
            ],
            [np.concatenate([p, q])],
            rtol=1e-6,
        ),
        Feature(
            "frexp, ldexp, modf, sincos",
            "functions:math_parts",
            [
                np.stack(
                    [
                        *(mantissa, parts * 8, np.modf(parts)[0], np.modf(parts)[1]),
                        *(np.sin(parts.astype(np.float64)), np.cos(parts.astype(np.float64))),
                    ],
                    1,
                ).astype(np.float32),
                np.stack([exponent, exponent - 1], 1).astype(np.int32),
            ],
            [parts],
            threads=(parts.size,),
            rtol=1e-6,
        ),
        Feature(
            "NaN, infinities, subnormals",
            "functions:special_values",
            [f32(1, 1, 0, 0, -np.inf, np.nan, 2, 0, 0, 0)],
            [special],
        ),
        Feature(
            "relational functions",
            "functions:relational",
            [i32(1, 1, 1, 1, 1, 1, 1, 1, 2, 31, 9)],
            [tests],
        ),
        Feature(
            "geometric functions",
            "functions:geometric",
            [
                np.concatenate(
                    [
                        [first @ second, 3, np.linalg.norm(first - second), 25],
                        *(np.cross(first, second), [np.sum((first - second) ** 2)]),
                        *(n1, [first[:2] @ second[:2]]),
                        *(first - 2 * (n2 @ first) * n2, [5]),
                        *(0.5 * n1 - (0.5 * cosine + np.sqrt(k)) * n2, [0]),
                        *(-first, [first @ second]),
                    ]
                ).astype(np.float32)
            ],
            [geometry],
            rtol=1e-6,
            atol=1e-6,
        ),
        Feature(
            "pack and unpack",
            "functions:packing",
            [
                words,
                np.concatenate(
                    [
                        *(unorm8 / 255, snorm8 / 127, unorm16 / 65535, snorm16 / 32767),
                        *(unorm10 / f32(1023, 1023, 1023, 3), half8 / 255),
                    ]
                ).astype(np.float32),
            ],
            [color],
            rtol=1e-3,
        ),
    ]


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)
