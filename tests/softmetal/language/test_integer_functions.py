"""Functions of integers of every width."""

from __future__ import annotations

import numpy as np
import pytest

from .feature import Feature, i32, rng, run

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


def features() -> list[Feature]:
    return [
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
        *(_integers(name, np.dtype(kind)) for name, kind in INTEGERS.items()),
    ]


@pytest.mark.parametrize("feature", features(), ids=lambda feature: feature.name)
def test_feature(feature, device):
    run(feature)
