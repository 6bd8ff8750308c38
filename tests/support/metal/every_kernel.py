"""Runs every kernel once or more: a program for the sanitizers.

python -m softmetal run --sanitize thread -- python -m tests.support.metal.every_kernel
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_gluon._quantization.formats import GRANULARITIES, PRESETS, QuantSpec
from tests.support.metal.encoder import (
    SHADERS,
    Problem,
    backward,
    backward_bias,
    decode,
    forward,
    library,
    quantize,
    tangent,
)
from tests.support.metal.problems import DTYPES, QUANTIZED, draw, feature

Specs = tuple[QuantSpec | None, ...]
Case = tuple[str, Specs, str, dict[str, int]]

WHOLE: Specs = (QuantSpec(symmetric=False, center=True),) * 3
PLAIN: Specs = (None, None, None)
CASES: tuple[Case, ...] = (
    ("float32", PLAIN, "everything", {}),
    ("float16", PLAIN, "causal", {}),
    ("bfloat16", PLAIN, "plain", {}),
    ("float32", WHOLE, "everything", {}),
    ("float32", QUANTIZED["int4"][0], "everything", {}),
    ("float32", QUANTIZED["int4"][0], "window", {}),
    ("float32", QUANTIZED["int4_group"][0], "everything", {}),
    ("float32", QUANTIZED["int4_zero_point"][0], "mask", {}),
    ("float32", PLAIN, "lengths", dict(H=72, V=100)),
    ("float16", PLAIN, "plain", dict(H=130, V=129)),
)
# Forward mode has float matrices whatever the operands are: one case for each size and kind.
TANGENT_CASES = (CASES[0], *CASES[3:5], *CASES[8:])
# Of few rows: what decode is for.
DECODE_CASES: tuple[Case, ...] = (
    *((dtype, specs, name, {**shape, "T": 12}) for dtype, specs, name, shape in CASES),
    ("float32", QUANTIZED["int8"][0], "plain", dict(T=1, S=200, H=64, V=64)),
)


def problem_of(case: Case) -> tuple[Problem, np.ndarray[Any, Any]]:
    """The problem, and the cotangent of its output."""
    dtype, specs, name, shape = case
    *operands, d_out = draw(dtype, specs, **shape)
    options = {} if name == "plain" else feature(name, **shape)
    return Problem(*operands, out_dtype=DTYPES[dtype], **options), d_out


def tangents_of(case: Case) -> dict[str, np.ndarray[Any, Any]]:
    """Of query, key and value."""
    return dict(zip(("query", "key", "value"), draw(case[0], **case[3]), strict=False))


def written(*outputs: np.ndarray[Any, Any]) -> None:
    """Raises where an output, NaN before, was not written."""
    for x in outputs:
        assert np.isfinite(x.astype(np.float32)).all()


def main() -> None:
    for case in CASES:
        problem, d_out = problem_of(case)
        found = forward(problem)
        written(forward(problem, pipeline="gluon").out)
        d_log_sum_exp = None
        if case[1] == PLAIN:
            d_log_sum_exp = np.ones((problem.B, problem.T, problem.N), np.float32)
        gradients = backward(problem, found, d_out, d_log_sum_exp)
        written(found.out, gradients.d_query, gradients.d_key, gradients.d_value)
        if case in TANGENT_CASES:
            moved = tangent(problem, tangents_of(case))
            written(moved.out, moved.tangent_out, moved.tangent_log_sum_exp)
        gradients = backward(problem, found, d_out, d_log_sum_exp, pipeline="gluon")
        written(gradients.d_query, gradients.d_key, gradients.d_value)
        if problem.bias is not None:
            written(backward_bias(problem, found, d_out))
    for case in DECODE_CASES:
        written(decode(problem_of(case)[0], 3).out)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 37, 3, 46)).astype(np.float32)
    for granularity in GRANULARITIES:
        for bits in (8, 4):
            spec = QuantSpec(bits, False, granularity, 12, center=True, rotate=True)
            visible = np.arange(37) < np.array([[37], [20]])
            written(quantize(x, spec, visible=visible).scale)
    x = rng.standard_normal((2, 40, 2, 64)).astype(np.float32)
    written(quantize(x, QuantSpec(center=True, rotate=True)).scale)
    x[:, ::7] *= 30
    written(quantize(x, PRESETS["int4"].key).scale)
    assert library.cache_info().currsize == len(list(SHADERS.glob("*.metal")))


if __name__ == "__main__":
    main()
