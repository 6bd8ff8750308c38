"""NaN and infinity: what is hidden changes no bit, what is seen reaches the rows that see it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.support.metal.encoder import Problem, backward, backward_bias, decode, forward
from tests.support.metal.problems import DTYPES, QUANTIZED, draw, expected

BAD = (np.nan, np.inf, -np.inf)


def everything(problem, d_out):
    found = forward(problem)
    gradients = backward(problem, found, d_out)
    results = [found.out, found.row_maximum, found.log2_sum, decode(problem, 3).out]
    results += [gradients.d_query, gradients.d_key, gradients.d_value]
    if problem.bias is not None:
        results.append(backward_bias(problem, found, d_out))
    return results


def hiding(T, S):
    """Ways to hide keys from S - 20, key 3 and rows from T - 6."""
    seen = np.ones((1, 1, T, S), bool)
    seen[..., S - 20 :] = seen[..., 3] = seen[:, :, T - 6 :] = False
    bias = np.where(seen, np.float32(0.25), np.float32(-np.inf))
    return {
        "mask": dict(mask=seen),
        "bias": dict(bias=bias),
        "both": dict(mask=seen, bias=np.zeros_like(bias)),
    }


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", ["mask", "bias", "both"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_hidden_changes_no_bit(dtype, way, bad):
    T, S = 30, 90
    query, key, value, d_out = draw(dtype, T=T, S=S)
    keywords = hiding(T, S)[way]

    def run(fill):
        q, k, v = (x.copy() for x in (query, key, value))
        q[:, T - 6 :] = fill
        for x in (k, v):
            x[:, S - 20 :] = x[:, 3] = fill
        return everything(Problem(q, k, v, out_dtype=DTYPES[dtype], **keywords), d_out)

    for x, y in zip(run(bad), run(0.0), strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_visible_values_reach_exactly_the_rows_that_see_them(dtype, bad):
    query, key, value, _ = draw(dtype, T=50, S=50)
    clean = forward(Problem(query, key, value, is_causal=True)).out
    value = value.copy()
    value[0, 21, 1, 3] = bad
    problem = Problem(query, key, value, is_causal=True)
    touched = np.zeros(clean.shape, bool)
    touched[0, 21:, 2:, 3] = True
    for out in (forward(problem).out, decode(problem, 2).out):
        np.testing.assert_array_equal(out[touched], np.full(touched.sum(), bad, np.float32))
        assert np.isfinite(out[~touched]).all()
    np.testing.assert_array_equal(forward(problem).out[~touched], clean[~touched])


@pytest.mark.parametrize("bad", BAD)
def test_keys_and_values_hidden_from_some_rows_reach_the_others(oracle, relative_error, bad):
    query, key, value, d_out = draw(T=40, S=40)
    key, value, d_out = key.copy(), value.copy(), d_out.copy()
    key[:, 20] = value[:, 20] = bad
    # The rows that see them take no cotangent, so that the gradients of the others can be compared.
    d_out[:, 20:] = 0
    problem = Problem(query, key, value, is_causal=True)
    found = forward(problem)
    assert np.isnan(found.out[:, 20:]).all()
    short = Problem(query[:, :20], key[:, :20], value[:, :20], is_causal=True)
    wanted = expected(oracle, short, d_out=d_out[:, :20])
    assert relative_error(found.out[:, :20], wanted.out) <= 2e-6
    gradients = backward(problem, found, d_out)
    assert relative_error(gradients.d_query[:, :20], wanted.d_query) <= 3e-6


@pytest.mark.parametrize("operand", ["query", "key"])
def test_logits_of_minus_infinity_hide_their_keys(oracle, relative_error, operand):
    arrays = dict(zip(("query", "key", "value"), draw(T=20, S=40)[:3], strict=True))
    d_out = draw(T=20, S=40)[3]
    for name in ("query", "key"):
        arrays[name] = np.abs(arrays[name]) + np.float32(0.1)
    bias = np.zeros((2, 4, 20, 40))
    clean = {name: x.copy() for name, x in arrays.items()}
    if operand == "query":
        arrays["query"][0, 11, 2, 3] = -np.inf
        bias[0, 2, 11] = -np.inf
    else:
        arrays["key"][1, 14, 0, 3] = -np.inf
        arrays["value"][1, 14, 0] = np.nan
        bias[1, :2, :, 14] = -np.inf
    problem = Problem(**arrays)
    wanted = expected(oracle, Problem(**clean, bias=bias), d_out=d_out)
    found = forward(problem)
    gradients = backward(problem, found, d_out)
    assert relative_error(found.out, wanted.out) <= 2e-6
    for name in ("d_query", "d_key", "d_value"):
        assert relative_error(getattr(gradients, name), getattr(wanted, name)) <= 3e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_makes_its_row_nan(bad):
    query, key, value, d_out = draw(T=20, S=40)
    bias = np.zeros((2, 4, 20, 40), np.float32)
    bias[0, 1, 9, 5] = bad
    problem = Problem(query, key, value, bias=bias)
    touched = np.zeros((2, 20, 4), bool)
    touched[0, 9, 1] = True
    found = forward(problem)
    d_query = backward(problem, found, d_out).d_query
    np.testing.assert_array_equal(np.isnan(found.row_maximum + found.log2_sum), touched)
    for x in (found.out, decode(problem, 2).out, d_query):
        np.testing.assert_array_equal(np.isnan(x), np.broadcast_to(touched[..., None], x.shape))


@pytest.mark.parametrize("kind", ["int8", "int8_value_group", "float_query"])
@pytest.mark.parametrize("operand", [1, 2])
def test_codes_of_nan_are_hidden_or_seen(kind, operand):
    operands = draw("float32", QUANTIZED[kind][0], T=40, S=40)
    *codes, d_out = operands
    problem = Problem(*codes, is_causal=True)
    clean = everything(problem, d_out)
    scale = codes[operand].scale.copy()
    scale[:, 25] = np.nan
    codes[operand] = dataclasses.replace(codes[operand], scale=scale)
    out, *_ = everything(Problem(*codes, is_causal=True), d_out)
    np.testing.assert_array_equal(out[:, :25], clean[0][:, :25])
    assert np.isnan(out[:, 25:]).all()
