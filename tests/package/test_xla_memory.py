"""The XLA implementation's temporaries, by XLA's own account."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jax_gluon._problem import AttentionOperands, AttentionProblem
from jax_gluon._xla import attention as xla


def temporary_bytes(function, *arguments):
    """What the compiled function allocates beside its arguments and results."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def shapes(T, dtype, logits=None):
    """Operands of one batch entry, 2 heads and H 64, with a bias and a mask of shape `logits`."""
    x = jax.ShapeDtypeStruct((1, T, 2, 64), dtype)
    row = jax.ShapeDtypeStruct((1, T, 2), jnp.float32)
    bias, mask = (logits and jax.ShapeDtypeStruct(logits, t) for t in (dtype, jnp.bool_))
    return AttentionOperands(x, x, x, bias, mask), (x, row, row, x)


def forward_bytes(problem, T, dtype, logits=None):
    operands, _ = shapes(T, dtype, logits)
    return temporary_bytes(functools.partial(xla.forward, problem), operands)


def backward_bytes(problem, T, dtype, logits=None, backward=xla.backward):
    operands, cotangents = shapes(T, dtype, logits)
    function = functools.partial(backward, problem, d_log_sum_exp=None)
    return temporary_bytes(function, operands, *cotangents)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("measure", [forward_bytes, backward_bytes])
def test_memory_grows_with_the_length_and_not_its_square(measure, is_causal):
    problem = AttentionProblem(0.125, is_causal=is_causal)
    short, long = (measure(problem, T, jnp.float32) for T in (2048, 16384))
    assert long <= 8 * short
    operand_bytes = 16384 * 2 * 64 * 4
    assert long <= (3 if measure is forward_bytes else 5) * operand_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("measure", [forward_bytes, backward_bytes])
def test_bias_and_mask_are_not_copied(measure, dtype):
    problem = AttentionProblem(0.125)
    temporary = measure(problem, 4096, jnp.dtype(dtype), logits=(1, 2, 4096, 4096))
    assert temporary < 4096 * 4096


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bias_gradient_takes_no_wider_matrix(dtype):
    dtype = jnp.dtype(dtype)
    temporary = backward_bytes(
        AttentionProblem(0.125), 4096, dtype, (1, 2, 4096, 4096), xla.backward_bias
    )
    # Turning the bits of bfloat16 into numbers in the end copies them once.
    results = 1 if dtype == jnp.bfloat16 else 0
    assert temporary < (results + 0.3) * 2 * 4096 * 4096 * dtype.itemsize


def test_many_heads_share_a_bounded_tile():
    """64 x 32 heads would make a tile of 512 MiB at the usual block size."""
    x = jax.ShapeDtypeStruct((64, 512, 32, 8), jnp.float32)
    temporary = temporary_bytes(
        lambda q, k, v: xla.forward(AttentionProblem(0.3), AttentionOperands(q, k, v)), x, x, x
    )
    assert temporary < 2**29
