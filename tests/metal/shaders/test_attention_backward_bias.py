"""The gradient of the bias, summed over every set of axes, against float64."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from tests.support.metal.encoder import Problem, backward_bias, forward
from tests.support.metal.problems import DTYPES, QUANTIZED, draw, expected, feature

SHAPE = dict(B=2, N=4, T=45, S=77)


def check(relative_error, problem, d_out, wanted, bound, **options):
    found = backward_bias(problem, forward(problem), d_out, **options)
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= bound


@pytest.mark.parametrize("axes", list(itertools.product((False, True), repeat=4)))
def test_sums_over_axes(oracle, relative_error, axes):
    shape = [1 if summed else n for n, summed in zip(SHAPE.values(), axes, strict=True)]
    q, k, v, d_out = draw()
    bias = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    problem = Problem(q, k, v, bias=bias, soft_cap=2.0, window=(15, 40), query_lengths=[45, 30])
    wanted = expected(oracle, problem, d_out=d_out).d_bias[None]
    check(relative_error, problem, d_out, wanted, 3e-6)


@pytest.mark.parametrize("name", ["bias", "broadcast_bias", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_feature(oracle, relative_error, dtype, name):
    q, k, v, d_out = draw(dtype)
    problem = Problem(q, k, v, **feature(name))
    wanted = expected(oracle, problem, d_out=np.asarray(d_out, np.float64)).d_bias[None]
    bound = {np.float32: 1e-4, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}
    bound = max(bound[problem.bias.dtype.type], 5e-3 if dtype == "float16" else 0)
    check(relative_error, problem, d_out, wanted, bound)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
def test_a_bias_equal_for_all_keys_has_no_gradient(kind):
    """But that of the log-sum-exp, whatever the output was rounded to."""
    q, k, v, d_out = draw(
        kind if kind in DTYPES else "float32", QUANTIZED.get(kind, [[None] * 3])[0]
    )
    bias = np.random.default_rng(2).standard_normal((2, 4, 45, 1)).astype(np.float32)
    d_lse = np.random.default_rng(3).standard_normal((2, 45, 4)).astype(np.float32)
    problem = Problem(q, k, v, bias=bias, out_dtype=DTYPES.get(kind, np.float32))
    found = backward_bias(problem, forward(problem), d_out, d_lse)[0, ..., 0]
    np.testing.assert_allclose(found, d_lse.swapaxes(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["offset_causal", "offset_window", "far_offset"])
def test_offset_of_the_query(oracle, relative_error, name):
    q, k, v, d_out = draw()
    bias = np.random.default_rng(2).standard_normal((1, 4, 45, 77)).astype(np.float32)
    problem = Problem(q, k, v, bias=bias, **feature(name))
    wanted = expected(oracle, problem, d_out=d_out).d_bias[None]
    check(relative_error, problem, d_out, wanted, 3e-6)


@pytest.mark.parametrize(("H", "V"), [(72, 100), (130, 256)])
def test_axes_of_vmap(oracle, relative_error, H, V):
    q, k, v, d_out = draw(B=4, H=H, V=V)
    bias = np.random.default_rng(2).standard_normal((1, 4, 1, 77)).astype(np.float32)
    problem = Problem(q, k, v, bias=bias)
    halves = [
        expected(
            oracle,
            Problem(q[b : b + 2], k[b : b + 2], v[b : b + 2], bias=bias),
            d_out=d_out[b : b + 2],
        ).d_bias
        for b in (0, 2)
    ]
    check(relative_error, problem, d_out, np.stack(halves), 1e-5, maps=2)
