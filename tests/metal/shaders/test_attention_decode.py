"""Few query rows with the keys in parts: the same answers as the oracle's, whatever the split."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.metal.encoder import EMPTY_ROW_LOG2_SUM, Problem, decode
from tests.support.metal.problems import DTYPES, QUANTIZED, draw, expected, feature

# Of 16-bit operands: twice what rounding exact results leaves.
BOUNDS = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 3.4e-3}


def check(oracle, relative_error, problem, bound, splits):
    found, wanted = decode(problem, splits), expected(oracle, problem)
    assert relative_error(found.out, wanted.out) <= bound
    empty = np.isneginf(wanted.log_sum_exp)
    np.testing.assert_array_equal(found.log2_sum == EMPTY_ROW_LOG2_SUM, empty)
    log_sum_exp = (found.row_maximum.astype(np.float64) + found.log2_sum) * np.log(2)
    np.testing.assert_allclose(
        log_sum_exp[~empty], wanted.log_sum_exp[~empty], rtol=bound, atol=2 * bound
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "splits"), [(1, 4, 2, 1), (1, 3, 3, 5), (3, 8, 2, 4), (2, 5, 1, 7)]
)
def test_splits(oracle, relative_error, T, N, K, splits, dtype):
    q, k, v, _ = draw(dtype, T=T, N=N, K=K, S=301, H=60, V=40)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], key_value_lengths=[301, 90])
    check(oracle, relative_error, problem, BOUNDS[dtype], splits)


@pytest.mark.parametrize(
    "name",
    [
        "causal", "window", "lengths", "bias", "mask", "offset_causal", "offset_window",
        "far_offset", "everything",
    ],
)  # fmt: skip
def test_feature(oracle, relative_error, name):
    shape = dict(T=15, S=140, N=4, K=1)
    q, k, v, _ = draw(**shape)
    check(oracle, relative_error, Problem(q, k, v, **feature(name, **shape)), 2e-6, 3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4_zero_point"])
def test_format(oracle, relative_error, kind, head_dim):
    specs, _, bound = QUANTIZED[kind]
    q, k, v, _ = draw("float32", specs, T=1, S=200, H=head_dim, V=head_dim)
    check(oracle, relative_error, Problem(q, k, v), bound, 3)


@pytest.mark.parametrize(("H", "V"), [(72, 128), (130, 256)])
def test_head_dim_of_bfloat16(oracle, relative_error, H, V):
    q, k, v, _ = draw("bfloat16", T=2, S=200, H=H, V=V)
    problem = Problem(q, k, v, out_dtype=DTYPES["bfloat16"])
    check(oracle, relative_error, problem, BOUNDS["bfloat16"], 3)
