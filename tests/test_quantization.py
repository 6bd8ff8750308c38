"""INT8 rows, by the plugin's custom call and by `jax.numpy`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gluon import lowering
from jax_gluon.problem import AttentionOperands, AttentionProblem
from jax_gluon.quantization import QuantizedRows, dequantize, quantize_rows


@pytest.fixture
def quantize(implementation):
    """`quantize(x, center=..., lengths=...)` through the implementation under test."""

    def rows(x, *, center=False, lengths=None) -> QuantizedRows:
        problem = AttentionProblem(1.0, quantization="int8", implementation=implementation)
        operands = AttentionOperands(x, x, x, key_value_seq_lengths=lengths)
        quantized = lowering.quantize(problem, operands)
        return quantized.key if center else quantized.query

    return rows


def random_rows(seed=0, B=2, S=9, K=3, H=32, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal((B, S, K, H))
    return jnp.asarray(x * np.linspace(0.01, 100, S)[:, None, None], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("center", [False, True])
def test_codes_are_within_half_a_step(dtype, center, quantize):
    x = random_rows(dtype=dtype) + jnp.asarray(3 * center, dtype)
    rows = quantize(x, center=center)
    assert (rows.data.dtype, rows.scale.dtype) == (jnp.int8, jnp.float32)
    assert rows.data.shape == x.shape
    assert rows.scale.shape == x.shape[:-1]
    error = np.abs(np.asarray(dequantize(rows)) - np.asarray(x, np.float32))
    assert (error <= np.asarray(rows.scale)[..., None] * 0.5001).all()
    # The largest element of every row has the largest code.
    assert (np.abs(np.asarray(rows.data, np.int32)).max(-1) == 127).all()


def test_halves_round_to_even(quantize):
    codes = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49], np.float32)
    rows = quantize(jnp.asarray(codes).reshape(1, 1, 1, 8))
    np.testing.assert_array_equal(rows.data.ravel(), [127, 0, 2, 2, 0, -2, -2, 3])


def test_zero_row_is_exact(quantize):
    rows = quantize(jnp.zeros((1, 2, 1, 8)))
    assert not rows.data.any()
    assert not rows.scale.any()
    assert not dequantize(rows).any()


@pytest.mark.parametrize("magnitude", [1e-30, 2e-36, 1e30, 3e38])
def test_no_magnitude_overflows(magnitude, quantize):
    x = jnp.asarray(np.linspace(-1, 1, 16), jnp.float32).reshape(1, 1, 1, 16)
    x = jnp.concatenate([x * jnp.float32(magnitude), -x * jnp.float32(magnitude)], axis=1)
    for center in (False, True):
        rows = quantize(x, center=center)
        assert np.isfinite(rows.scale).all()
        error = np.abs(np.asarray(dequantize(rows), np.float64) - np.asarray(x, np.float64))
        assert (error <= 0.51 / 127 * magnitude).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("center", [False, True])
def test_poisoned_row_dequantizes_to_nan_and_leaves_the_others_alone(poison, center, quantize):
    x = random_rows()
    rows = quantize(x.at[1, 4, 2, 7].set(poison), center=center)
    restored = np.array(dequantize(rows))
    assert np.isnan(restored[1, 4, 2]).all()
    assert not rows.data[1, 4, 2].any()
    restored[1, 4, 2] = 0
    assert np.isfinite(restored).all()


def test_mean_is_over_the_finite_values_inside_the_lengths(quantize, fake_quantize):
    x = random_rows() + 5
    x = x.at[0, 2, 1, 3].set(jnp.inf)
    lengths = jnp.asarray([6, 0], jnp.int32)
    rows = quantize(x, center=True, lengths=lengths)
    inside = np.asarray(x, np.float64)[0, :6]
    expected = np.nanmean(np.where(np.isfinite(inside), inside, np.nan), axis=0)
    assert rows.mean.shape == (2, 1, 3, 32)
    np.testing.assert_allclose(rows.mean[0, 0], expected, rtol=1e-5)
    assert not rows.mean[1].any()
    finite = np.isfinite(x).all(-1)
    error = np.asarray(dequantize(rows)) - fake_quantize(
        np.where(np.isfinite(x), x, np.nan), center=True, lengths=lengths
    )
    # A code on the edge may round either way with a mean that differs in its last bit.
    assert (np.abs(error)[finite] <= np.asarray(rows.scale)[finite][..., None] * 1.001).all()


def test_centring_removes_what_all_tokens_share(quantize):
    """A common offset of 1000 costs float32's rounding, not codes."""
    x = random_rows()
    error = np.abs(dequantize(quantize(x + 1000, center=True)) - (x + 1000))
    scale = np.asarray(quantize(x, center=True).scale)[..., None]
    assert (error <= 0.51 * scale + 2e-4).all()


def test_both_implementations_give_the_same_codes(quantize):
    x = random_rows(seed=4, S=40)
    lengths = jnp.asarray([40, 13], jnp.int32)
    for center in (False, True):
        expected = quantize_rows(x, center=center, lengths=lengths if center else None)
        rows = quantize(x, center=center, lengths=lengths)
        difference = np.asarray(rows.data, np.int32) - np.asarray(expected.data, np.int32)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() <= 1e-3
        np.testing.assert_allclose(rows.scale, expected.scale, rtol=1e-5)


def test_vmap_over_lengths_alone(quantize):
    x = random_rows()
    lengths = jnp.asarray([[9, 9], [3, 5]], jnp.int32)
    rows = jax.vmap(lambda lengths: quantize(x, center=True, lengths=lengths))(lengths)
    for i in range(2):
        expected = quantize(x, center=True, lengths=lengths[i])
        for actual, exact in zip(jax.tree.leaves(rows), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(actual[i], exact)
