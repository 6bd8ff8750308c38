"""Codes know nothing of tokens that can't be seen, and earlier rows nothing of later tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

B, T, S, N, K, H, V = 2, 6, 75, 4, 2, 32, 24
# Of the second entry no key can be seen; of the first the last block is hidden wholly.
LENGTHS = np.array([40, 0], np.int32)


def hidden_by(way):
    """Which keys are hidden `[B, S]`, and the arguments that hide them."""
    hidden = np.arange(S) >= LENGTHS[:, None]
    if way == "lengths":
        return hidden, dict(key_value_seq_lengths=LENGTHS)
    hidden = hidden | (np.random.default_rng(7).random((B, S)) < 0.3)
    if way == "key_value_mask":
        return hidden, dict(key_value_mask=jnp.asarray(~hidden, jnp.int32))
    if way == "mask":
        return hidden, dict(mask=jnp.asarray(~hidden[:, None, None, :]))
    # Of two rules, each hides keys of every head.
    bias = np.where(hidden[:, None, None, :], -np.inf, 0.5).astype(np.float16)
    return hidden, dict(bias=jnp.asarray(bias), key_value_seq_lengths=np.array([70, S], np.int32))


@pytest.mark.parametrize(
    ("way", "poison"),
    [("lengths", np.nan), ("key_value_mask", np.nan), ("mask", np.inf), ("bias", 1e30)],
)
@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.02), ("int4", 0.2)])
def test_hidden_keys_change_no_bit(
    quantization, bound, way, poison, implementation, oracle, relative_error, random_operands
):
    """The same bits as with zeros there, and no more error than visible tokens make."""
    if implementation != "cpu" and (quantization == "int8") == (way in ("lengths", "bias")):
        pytest.skip("each way and each format once")
    q, k, v, d_out = random_operands(B, T, S, N, K, H, V)
    hidden, keywords = hidden_by(way)
    rows = hidden[:, :, None, None]

    @jax.jit
    def results(fill):
        def attention(q, k, v):
            return jax_gluon.dot_product_attention(
                q, k, v, quantization=quantization, implementation=implementation, **keywords
            )

        operands = q, jnp.where(rows, fill, k), jnp.where(rows, fill, v)
        out, pullback = jax.vjp(attention, *operands)
        return out, *pullback(d_out)

    found = results(poison)
    for a, b in zip(found, results(0.0), strict=True):
        np.testing.assert_array_equal(a, b)
    keywords |= {"bias": np.asarray(keywords["bias"], np.float32)} if way == "bias" else {}
    expected = oracle(q, jnp.where(rows, 0, k), jnp.where(rows, 0, v), **keywords, d_out=d_out)
    assert relative_error(found[0], expected.out) <= bound
    assert not found[0][1].any()
    for gradient, exact in zip(found[1:], expected[2:5], strict=True):
        assert relative_error(gradient, exact) <= 2 * bound


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def of_earlier_rows(operands, at, factor, quantization, implementation):
    """Causal output and gradients of rows before `at`, whose key and value are `factor` larger."""
    q, k, v, d_out = operands

    def attention(q, k, v):
        return jax_gluon.dot_product_attention(
            q, k, v, is_causal=True, quantization=quantization, implementation=implementation
        )

    out, pullback = jax.vjp(attention, q, k.at[:, at].mul(factor), v.at[:, at].mul(factor))
    return [x[:, :at] for x in (out, *pullback(d_out.at[:, at:].set(0)))]


@pytest.mark.parametrize("outlier", [100.0, 1e4])
def test_earlier_rows_do_not_notice_a_later_outlier(
    outlier, implementation, relative_error, random_operands
):
    """INT8, causal: scales are those of a row, and the center is a median."""
    operands = random_operands(B, 50, 50, N, K, H, V)
    found, expected = (
        of_earlier_rows(operands, 49, factor, "int8", implementation) for factor in (outlier, 1.0)
    )
    # The CPU rounds P to 8 bits in units of the head's largest scale: a few round otherwise.
    bound = 1e-3 if implementation == "cpu" else 1e-5
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= bound


@pytest.mark.parametrize(("at", "outlier", "growth"), [(21, 100.0, 1.1), (60, 1e4, 1.03)])
def test_int4_errors_of_earlier_rows_grow_little(
    at, growth, outlier, implementation, oracle, relative_error, random_operands
):
    """The outlier shares its keys' scales: it is divided by a power of 4 that is kept beside it."""
    operands = random_operands(B, 64, 64, N, K, H, V)
    expected = oracle(*operands[:3], is_causal=True, d_out=operands[3].at[:, at:].set(0))
    exact = [x[:, :at] for x in (expected.out, *expected[2:5])]
    errors = [
        [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        for found in (
            of_earlier_rows(operands, at, factor, "int4", implementation)
            for factor in (outlier, 1.0)
        )
    ]
    for a, b in zip(*errors, strict=True):
        assert a <= growth * b
