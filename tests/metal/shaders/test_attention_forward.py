"""The forward kernel on every format, against float64 attention of what operands stand for."""

from __future__ import annotations

import numpy as np
import pytest

from jax_gluon._quantization.formats import QuantSpec
from tests.support import quantizer
from tests.support.metal.encoder import (
    EMPTY_ROW_LOG2_SUM,
    Problem,
    forward,
    head_dim_class,
    matrix_type,
)
from tests.support.metal.problems import DTYPES, FEATURES, QUANTIZED, draw, expected, feature, wide

# Of 16-bit operands: twice what rounding exact results leaves.
BOUNDS = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 3.4e-3}


def check(oracle, relative_error, problem, bound, **options):
    found, wanted = forward(problem, **options), expected(oracle, problem)
    assert relative_error(found.out, wanted.out) <= bound
    empty = np.isneginf(wanted.log_sum_exp)
    np.testing.assert_array_equal(found.log2_sum == EMPTY_ROW_LOG2_SUM, empty)
    assert not found.row_maximum[empty].any()
    assert not found.out[empty].any()
    log_sum_exp = (found.row_maximum.astype(np.float64) + found.log2_sum) * np.log(2)
    np.testing.assert_allclose(
        log_sum_exp[~empty], wanted.log_sum_exp[~empty], rtol=bound, atol=2 * bound
    )


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature(oracle, relative_error, dtype, name):
    q, k, v, _ = draw(dtype)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], **feature(name))
    check(oracle, relative_error, problem, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "V"), [(1, 1), (64, 5), (72, 128), (130, 256)])
def test_head_dim(oracle, relative_error, dtype, H, V):
    q, k, v, _ = draw(dtype, H=H, V=V, T=41, S=50)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=True)
    check(oracle, relative_error, problem, BOUNDS[dtype])


def test_bfloat16_without_the_type(oracle, relative_error):
    q, k, v, _ = draw("bfloat16")
    problem = Problem(q, k, v, out_dtype=np.float32, is_causal=True)
    check(oracle, relative_error, problem, 2e-6, matrix="float")


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 130), (130, 1), (33, 8), (64, 64)])
def test_lengths_of_blocks_and_not(oracle, relative_error, T, S):
    q, k, v, _ = draw(T=T, S=S, B=3, N=3, K=1)
    check(oracle, relative_error, Problem(q, k, v), 2e-6)


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_format(oracle, relative_error, kind, name):
    specs, matrix, bound = QUANTIZED[kind]
    q, k, v, _ = draw("float32", specs)
    problem = Problem(q, k, v, **feature(name))
    assert matrix_type(problem) == matrix
    check(oracle, relative_error, problem, bound)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4_zero_point"])
@pytest.mark.parametrize(("H", "V"), [(72, 40), (128, 128), (256, 192)])
def test_format_and_head_dim(oracle, relative_error, kind, H, V):
    specs, _, bound = QUANTIZED[kind]
    q, k, v, _ = draw("float32", specs, H=H, V=V, T=40)
    problem = Problem(q, k, v, is_causal=True, out_dtype=np.float16)
    assert head_dim_class(problem) >= max(H, V)
    check(oracle, relative_error, problem, max(bound, 5e-4))


def test_codes_that_the_batch_shares(oracle, relative_error):
    """As under vmap, where operands are not mapped."""
    specs, _, bound = QUANTIZED["int4"]
    q, *_ = draw(B=3)
    _, k, v, _ = draw("float32", specs, B=1)
    lengths = np.array([50], np.int32)
    found = forward(Problem(q, k, v, key_value_lengths=lengths))
    k, v = (np.repeat(wide(x), 3, axis=0) for x in (k, v))
    wanted = oracle(q, k, v, key_value_seq_lengths=np.repeat(lengths, 3))
    assert relative_error(found.out, wanted.out) <= bound


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_with_strides(oracle, relative_error, dtype):
    """Keys and values side by side in one array, read in place."""
    q, *_ = draw(dtype, H=24)
    both = np.random.default_rng(1).standard_normal((2, 90, 2, 2, 24)).astype(DTYPES[dtype])
    problem = Problem(q, both[:, 5:80, 0], both[:, 5:80, 1], is_causal=True)
    check(oracle, relative_error, problem, BOUNDS[dtype])


def test_no_keys_at_all(oracle, relative_error):
    q, k, v, _ = draw(S=0)
    check(oracle, relative_error, Problem(q, k, v), 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_order_of_threads_gives_the_same_bits(dtype):
    q, k, v, _ = draw(dtype)
    problem = Problem(q, k, v, **feature("everything"))
    first = forward(problem, workers=1)
    for seed in (1, 2):
        found = forward(problem, seed=seed)
        for name in ("out", "row_maximum", "log2_sum"):
            np.testing.assert_array_equal(getattr(found, name), getattr(first, name))


def test_values_of_very_different_sizes(oracle):
    """Row by row: those who see small values alone get them as precisely, whatever is hidden."""
    spec = QuantSpec(symmetric=False)
    rng = np.random.default_rng(4)
    q, k, v, _ = draw(B=1, T=40, S=80)
    v *= 10.0 ** rng.integers(-6, 7, (1, 80, 1, 1)).astype(np.float32)
    mask = np.arange(80) // 2 % 40 == np.arange(40)[:, None]
    operands = (quantizer.quantize(x, spec) for x in (q, k, v))
    problem = Problem(*operands, mask=mask[None, None])
    found, wanted = forward(problem).out, expected(oracle, problem).out
    error = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert error.max() <= 2e-3
