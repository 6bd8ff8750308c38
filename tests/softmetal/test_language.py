"""The Metal language: one small kernel with a known answer per feature.

Each row of the table names a feature, its kernel in `language/`, what goes in and what must come
out of buffer 0 and the following ones. `python tests/softmetal/test_language.py`, with
`plugin/softmetal/python` on PYTHONPATH, prints the table.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

LANGUAGE = pathlib.Path(__file__).parent / "language"


def to_bfloat(x):
    """The nearest bfloat of each number, ties to even, as bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)


def from_bfloat(bits):
    """The float of each bfloat, given as bits."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


@dataclasses.dataclass(frozen=True)
class Feature:
    """A kernel, its arguments and its answers."""

    name: str
    kernel: str  # "file:function"
    expected: Sequence  # of buffers 0, 1, ...
    inputs: Sequence = ()  # the buffers after those
    threads: tuple[int, ...] = (1,)  # of the grid
    threadgroup: tuple[int, ...] | None = None  # threads of a threadgroup; the grid unless given
    constants: Mapping = dataclasses.field(default_factory=dict)
    threadgroup_memory: Mapping = dataclasses.field(default_factory=dict)
    initial: Sequence | None = None  # of the output buffers; filled with 0xCD unless given
    rtol: float = 0.0
    atol: float = 0.0
    values: Callable | None = None  # of an output buffer, where numpy lacks its type


def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(7)


def f32(*values):
    """An array of floats."""
    return np.array(values, np.float32)


def i32(*values):
    """An array of ints."""
    return np.array(values, np.int32)


def u32(*values):
    """An array of uints."""
    return np.array(values, np.uint32)


def _types() -> list[Feature]:
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


def _functions() -> list[Feature]:
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
    rows = [
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
        Feature(
            "integer functions of vectors",
            "functions:integer_vectors",
            [
                i32(
                    *(1, 29, 31, 32, 8, -5, 2**31 - 1, -6, 6, 11, 2**31 - 8, 4),
                    *(7, 3, 2**31 - 1, -1, 0, -4, -1, -1, 7, 17, 3, 0),
                )
            ],
            [i32(1, -8, 2**31 - 1, -1, 7, 3, 7, -5)],
        ),
    ]
    rows += [_integers(name, np.dtype(kind)) for name, kind in INTEGERS.items()]
    return rows


INTEGERS = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "long": "i8",
    "ulong": "u8",
}


def _integers(name: str, kind: np.dtype) -> Feature:
    """The integer functions on Python's integers, which have no width."""
    bits = 8 * kind.itemsize
    low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    mask = (1 << bits) - 1

    def wrapped(n: int) -> int:
        n &= mask
        return n - (mask + 1) if low < 0 and n > high else n

    def clamp(n: int) -> int:
        return min(max(n, low), high)

    def row(a: int, b: int, c: int) -> list[int]:
        ua, ub = a & mask, b & mask
        field = (ua >> 2) & 15
        return [
            wrapped(abs(a - b)),
            clamp(a + b),
            clamp(a - b),
            (a + b) >> 1,
            (a + b + 1) >> 1,
            wrapped((a * b) >> bits),
            wrapped(((a * b) >> bits) + c),
            clamp(a * b + c),
            wrapped(ua << 5 | ua >> (bits - 5)),
            ua.bit_count(),
            bits - ub.bit_length(),
            (ua & -ua).bit_length() - 1 if ua else bits,
            wrapped(int(f"{ua:0{bits}b}"[::-1], 2)),
            field - 16 if low < 0 and field > 7 else field,
            wrapped((ua & ~14) | (ub << 1 & 14)),
            wrapped(abs(b)),
            min(a, b),
            min(max(c, min(a, b)), max(a, b)),
            sorted([a, b, c])[1],
        ]

    cases = [(5, 3, 1), (high, 1, 0), (low, high, 5), (high, high, high), (high // 3, 7, 2)]
    cases += [tuple(map(int, t)) for t in rng().integers(low, high, (8, 3), kind, endpoint=True)]
    return Feature(
        f"integer functions of {name}",
        f"functions:integer_{name}",
        [np.array([row(*case) for case in cases], kind)],
        [np.array(cases, kind)],
        threads=(len(cases),),
    )


def _memory() -> list[Feature]:
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


def _arguments() -> list[Feature]:
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


def _simdgroup() -> list[Feature]:
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


def _simdgroup_matrix() -> list[Feature]:
    memory = rng().integers(-8, 9, (16, 24)).astype(np.float32)

    def stored(m):
        last = np.full((8, 16), 0, np.float32)
        last[:, 8:] = m[:8, 2:10]
        return np.concatenate(
            [
                m[:8, :8].ravel(),
                m[4:12, 8:16].ravel(),
                m[:8, :8].T.ravel(),
                m[:8, 2:10].T.ravel(),
                last.ravel(),
            ]
        )

    a, b, c = rng().integers(-4, 5, (3, 8, 8)).astype(np.float32)
    d = a @ b + c
    wide = rng().integers(-4, 5, (2, 128)).astype(np.float32)
    mixed = wide[0].reshape(8, 16) @ wide[1].reshape(16, 8)
    rows = np.empty((8, 8), int)
    for lane in range(32):
        q = lane // 4
        row, column = (q & 4) + lane // 2 % 4, (q & 2) * 2 + lane % 2 * 2
        rows[row, column : column + 2] = lane
    order = np.argsort(rows.ravel(), kind="stable")
    left = 2 * a + np.tile([1, 0], (8, 4))
    p1, p2 = (2 * a) @ b, left @ b
    eye = np.eye(8, dtype=np.float32)
    features = [
        Feature(
            f"simdgroup_matrix of {name}: load and store, stride, origin, transposed",
            f"simdgroup_matrix:load_and_store_{name}",
            [cast(stored(memory))],
            [cast(memory)],
            threads=(32,),
            initial=[cast(np.zeros(384, np.float32))],
        )
        for name, cast in {
            "float": lambda x: x,
            "half": lambda x: x.astype(np.float16),
            "bfloat": to_bfloat,
        }.items()
    ]
    features += [
        Feature(
            "simdgroup_matrix: filled, diagonal",
            "simdgroup_matrix:fill",
            [np.concatenate([np.full((8, 8), 3.5), 2 * eye, np.ones((8, 8))]).astype("f4")],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: multiply, multiply_accumulate, operator*",
            "simdgroup_matrix:multiply",
            [np.concatenate([a @ b, d, d @ b + c, a @ b, 3 * a])],
            [np.stack([a, b, c])],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: half factors, float sum",
            "simdgroup_matrix:multiply_half_float",
            [mixed],
            [wide.astype(np.float16)],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: bfloat factors, float sum",
            "simdgroup_matrix:multiply_bfloat_float",
            [mixed],
            [to_bfloat(wide)],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: half factors, half sum",
            "simdgroup_matrix:multiply_half_half",
            [mixed.astype(np.float16)],
            [wide.astype(np.float16)],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: thread_elements",
            "simdgroup_matrix:elements",
            [
                np.concatenate(
                    [p1.ravel(), p2.ravel(), left.ravel()[order], rows.ravel(), left.ravel()]
                ).astype("f4")
            ],
            [np.stack([a, b])],
            threads=(32,),
        ),
        Feature(
            "simdgroup_matrix: load, product and store in place",
            "simdgroup_matrix:in_place",
            [a @ (a @ (a @ b))],
            [a],
            threads=(32,),
            initial=[b],
        ),
    ]
    return features


FEATURES = [
    *_types(),
    *_functions(),
    *_memory(),
    *_arguments(),
    *_simdgroup(),
    *_simdgroup_matrix(),
]


@functools.lru_cache
def _library(path: pathlib.Path):
    import softmetal

    return softmetal.Library(str(path))


def run(feature: Feature) -> None:
    """Raises where the feature's answers are not what they must be."""
    file, function = feature.kernel.split(":")
    kernel = _library(LANGUAGE / f"{file}.metal").kernel(function, constants=feature.constants)
    start = feature.initial or [None] * len(feature.expected)
    outputs = []
    for want, initial in zip(feature.expected, start, strict=True):
        want = np.asarray(want)
        poison = np.full(want.nbytes, 0xCD, np.uint8).view(want.dtype).reshape(want.shape)
        outputs.append(poison if initial is None else np.array(initial))
    inputs = [None if x is None else np.array(x) for x in feature.inputs]
    threadgroup = feature.threadgroup or feature.threads
    grid = tuple(t // g for t, g in zip(feature.threads, threadgroup, strict=True))
    kernel(
        grid=grid,
        threads=threadgroup,
        buffers=outputs + inputs,
        threadgroup_memory=feature.threadgroup_memory,
    )
    values = feature.values or (lambda x: x)
    for got, want in zip(outputs, feature.expected, strict=True):
        np.testing.assert_allclose(
            values(got), values(np.asarray(want)), rtol=feature.rtol, atol=feature.atol
        )


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_feature(feature: Feature, device) -> None:
    """Its answers are the known ones."""
    run(feature)


def test_matrix_needs_a_whole_simdgroup(device) -> None:
    """A threadgroup of 16 threads is told so."""
    import softmetal

    kernel = _library(LANGUAGE / "simdgroup_matrix.metal").kernel("fill", constants={})
    with pytest.raises(softmetal.Error, match="simdgroup of 32 threads"):
        kernel(grid=(1,), threads=(16,), buffers=[np.zeros(192, np.float32)])


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("texture2d<float> t;", "textures are not supported"),
        ("constexpr sampler s(coord::normalized);", "samplers are not supported"),
        ("raytracing::intersector<> i;", "ray tracing is not supported"),
        ("float4 v(0); v.xx = float2(1);", "put_xx"),
        ("simdgroup_matrix<int, 8, 8> m;", "elements of float, half or bfloat"),
        ("simdgroup_matrix<float, 4, 4> m;", "8 columns and 8 rows"),
        ("float4 v = float4(half4(1)) + half4(1);", "invalid operands"),
        ("auto x = as_type<half>(1.0f);", "same size"),
    ],
)
def test_refused(tmp_path, statement: str, message: str, device) -> None:
    """What the device does not have, or Metal does not allow, is a compile error that says so."""
    import softmetal

    file = tmp_path / "refused.metal"
    file.write_text(
        "#include <metal_stdlib>\nusing namespace metal;\n"
        f"kernel void f(device float* out [[buffer(0)]]) {{ {statement} }}\n"
    )
    with pytest.raises(softmetal.Error, match=message):
        softmetal.Library(str(file))


def table() -> str:
    """The conformance table, in Markdown."""
    lines = ["| feature | kernel | result |", "|---|---|---|"]
    for feature in FEATURES:
        try:
            run(feature)
            result = "pass"
        except Exception as error:
            result = f"FAIL: {str(error).strip().splitlines()[0]}"
        lines.append(f"| {feature.name} | `{feature.kernel}` | {result} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
