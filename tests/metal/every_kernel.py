"""Runs every kernel once or more: a program for the sanitizers.

python -m softmetal run --sanitize thread -- python tests/metal/every_kernel.py
"""

from __future__ import annotations

import numpy as np
from encoder import Problem, backward, backward_bias, decode, forward, quantize
from problems import DTYPES, QUANTIZED, draw, feature

from jax_gluon.formats import GRANULARITIES, QuantSpec

WHOLE = (QuantSpec(symmetric=False, center=True),) * 3
PLAIN = (None, None, None)
CASES = (
    ("float32", PLAIN, "everything", {}),
    ("float16", PLAIN, "causal", {}),
    ("bfloat16", PLAIN, "plain", {}),
    ("float32", WHOLE, "everything", {}),
    ("float32", QUANTIZED["int4"][0], "window", {}),
    ("float32", QUANTIZED["int4_zero_point"][0], "mask", {}),
    ("float32", PLAIN, "lengths", dict(H=72, V=100)),
    ("float16", PLAIN, "plain", dict(H=130, V=129)),
)


def main() -> None:
    for dtype, specs, name, shape in CASES:
        q, k, v, d_out = draw(dtype, specs, **shape)
        problem = Problem(q, k, v, out_dtype=DTYPES[dtype], **feature(name))
        found = forward(problem)
        decode(problem, 3)
        backward(problem, found, d_out, np.ones((problem.B, problem.T, problem.N), np.float32))
        if problem.bias is not None:
            backward_bias(problem, found, d_out)
    x = np.random.default_rng(0).standard_normal((2, 37, 3, 46)).astype(np.float32)
    for granularity in GRANULARITIES:
        for bits in (8, 4):
            spec = QuantSpec(bits, False, granularity, 12, center=True, rotate=True)
            quantize(x, spec, lengths=[37, 20])


if __name__ == "__main__":
    main()
