"""The backward kernels on every format, against float64 gradients of what operands stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.metal.encoder import Problem, backward, forward
from tests.support.metal.problems import DTYPES, FEATURES, QUANTIZED, draw, expected, feature

# Of 16-bit operands: three times what rounding exact gradients leaves.
BOUNDS = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}


def check(oracle, relative_error, problem, d_out, bound, with_log_sum_exp=False, **options):
    d_lse = None
    if with_log_sum_exp:
        shape = (problem.B, problem.T, problem.N)
        d_lse = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    wanted = expected(oracle, problem, d_out=np.asarray(d_out, np.float64), d_log_sum_exp=d_lse)
    found = backward(problem, forward(problem), d_out, d_lse, **options)
    for name in ("d_query", "d_key", "d_value"):
        assert relative_error(getattr(found, name), getattr(wanted, name)) <= bound, name


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feature(oracle, relative_error, dtype, name):
    q, k, v, d_out = draw(dtype)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], **feature(name))
    check(oracle, relative_error, problem, d_out, BOUNDS[dtype], name == "causal")


@pytest.mark.parametrize(
    ("dtype", "H", "V"),
    [
        ("float32", 1, 1),
        *((dtype, *dims) for dtype in ("float32", "float16")
          for dims in ((64, 5), (72, 128), (130, 256))),
    ],
)  # fmt: skip
def test_head_dim(oracle, relative_error, dtype, H, V):
    q, k, v, d_out = draw(dtype, H=H, V=V, T=41, S=50)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=True)
    check(oracle, relative_error, problem, d_out, BOUNDS[dtype])


def test_one_column(oracle, relative_error):
    """One product averages no rounding: three times the error of jax.nn with the same elements."""
    q, k, v, d_out = draw("float16", H=1, V=1, T=41, S=50)
    problem = Problem(q, k, v, out_dtype=np.float16, is_causal=True)
    wanted = expected(oracle, problem, d_out=np.asarray(d_out, np.float64))
    found = backward(problem, forward(problem), d_out)
    _, pullback = jax.vjp(
        lambda *x: jax.nn.dot_product_attention(*x, is_causal=True), *map(jnp.asarray, (q, k, v))
    )
    names = ("d_query", "d_key", "d_value")
    for name, plain in zip(names, pullback(jnp.asarray(d_out)), strict=True):
        bound = 3 * relative_error(np.asarray(plain), getattr(wanted, name))
        assert relative_error(getattr(found, name), getattr(wanted, name)) <= bound, name


@pytest.mark.parametrize("pipeline", ["baseline", "gluon"])
@pytest.mark.parametrize("gain", [1, 30, 100])
@pytest.mark.parametrize(
    ("dtype", "H", "is_causal"),
    [("float16", 64, False), ("float16", 128, True), ("bfloat16", 64, False),
     ("bfloat16", 64, True)],
)  # fmt: skip
def test_peaked_rows(oracle, relative_error, dtype, H, is_causal, gain, pipeline):
    """A rounded output makes rows of dS that do not sum to 0, unless delta is of P and dP."""
    q, k, v, d_out = draw(dtype, H=H, V=H, T=67, S=67, N=2, K=1)
    q = (q * gain).astype(q.dtype)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=is_causal)
    wanted = expected(oracle, problem, d_out=np.asarray(d_out, np.float64))
    found = backward(problem, forward(problem, pipeline=pipeline), d_out, pipeline=pipeline)
    _, pullback = jax.vjp(
        lambda *x: jax.nn.dot_product_attention(*x, is_causal=is_causal),
        *map(jnp.asarray, (q, k, v)),
    )
    names = ("d_query", "d_key", "d_value")
    for name, plain in zip(names, pullback(jnp.asarray(d_out)), strict=True):
        bound = 1.3 * relative_error(np.asarray(plain), getattr(wanted, name))
        assert relative_error(getattr(found, name), getattr(wanted, name)) <= bound, name


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 130), (130, 1), (33, 8), (64, 64)])
def test_lengths_of_blocks_and_not(oracle, relative_error, T, S):
    q, k, v, d_out = draw(T=T, S=S, B=3, N=3, K=1)
    check(oracle, relative_error, Problem(q, k, v), d_out, 3e-6, True)


@pytest.mark.parametrize("name", ["plain", "soft_cap", "everything"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_format(oracle, relative_error, kind, name):
    specs, matrix, _ = QUANTIZED[kind]
    q, k, v, d_out = draw("float32", specs)
    problem = Problem(q, k, v, **feature(name))
    bound = 3e-6 if matrix == "float" else 1e-3
    check(oracle, relative_error, problem, d_out, bound, name == "soft_cap")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_with_strides(oracle, relative_error, dtype):
    """Keys and values side by side in one array, read in place."""
    q, *_, d_out = draw(dtype, H=24, V=24)
    both = np.random.default_rng(1).standard_normal((2, 90, 2, 2, 24)).astype(DTYPES[dtype])
    problem = Problem(
        q, both[:, 5:80, 0], both[:, 5:80, 1], is_causal=True, out_dtype=DTYPES[dtype]
    )
    check(oracle, relative_error, problem, d_out, BOUNDS[dtype])


def test_any_order_of_threads_gives_the_same_bits():
    q, k, v, d_out = draw()
    problem = Problem(q, k, v, **feature("everything"))
    found = forward(problem)
    first = backward(problem, found, d_out, workers=1)
    for seed in (1, 2):
        gradients = backward(problem, found, d_out, seed=seed)
        for name in ("d_query", "d_key", "d_value"):
            np.testing.assert_array_equal(getattr(gradients, name), getattr(first, name))
