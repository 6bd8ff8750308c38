"""Dropout: one mask for every implementation, whose bits are independent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import _dropout, _lowering
from jax_gluon._problem import AttentionOperands, AttentionProblem

B, T, S, N, K, H, V = 2, 70, 210, 4, 2, 22, 26
KEY = jax.random.key(7)
RULES = dict(is_causal=True, local_window_size=(120, 60), query_offset=130, logits_soft_cap=5.0)


def philox(counter, key, rounds):
    """In Python's integers."""
    x, (k0, k1) = list(counter), key
    for _ in range(rounds):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k0, b % 2**32, a >> 32 ^ x[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x


def test_the_generator_is_philox():
    """The known answers of Random123 for ten rounds; and the mask is that of seven."""
    assert philox([0] * 4, (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert philox([ones] * 4, (ones, ones), 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    key = tuple(int(x) for x in jax.random.bits(KEY, (2,), jnp.uint32))
    mask = jax_gluon.dropout_mask(KEY, (B, N, T, S), 0.3)
    for b, n, i, j in [
        (0, 0, 0, 0),
        (1, 3, 69, 209),
        (1, 0, 5, 63),
        (0, 2, 33, 64),
        (1, 1, 8, 140),
    ]:
        words = philox([8 * (j // 64) + j % 8, i, n, b], key, 7)
        slot = j // 8 % 8
        assert mask[b, n, i, j] == (
            words[slot // 2] >> 16 * (slot % 2) & 0xFFFF >= round(0.3 * 2**16)
        )


def test_the_number_that_is_the_threshold_is_kept(implementation):
    """One number in 2**16, which a mask of many would hide."""
    key = tuple(int(x) for x in jax.random.bits(KEY, (2,), jnp.uint32))
    number = philox([0] * 4, key, 7)[0] & 0xFFFF
    one = jnp.ones((1, 1, 1, 8))
    for threshold, is_kept in ((number, True), (number + 1, False)):
        rate = threshold / 2**16
        assert jax_gluon.dropout_mask(KEY, (1, 1, 1, 1), rate).item() is is_kept
        out = jax_gluon.dot_product_attention(
            one, one, one, dropout_rng=KEY, dropout_rate=rate, implementation=implementation
        )
        np.testing.assert_allclose(out, is_kept / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.9])
def test_what_is_dropped_is_independent(rate):
    """The share, and correlations along every axis, within four (five) standard deviations."""
    shape = (4, 4, 256, 512)
    mask = np.asarray(jax_gluon.dropout_mask(KEY, shape, rate), np.float64)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(mask.mean() - (1 - rate)) <= 4 * deviation / np.sqrt(mask.size)
    assert largest_correlation(mask, rate) <= 5
    other = np.asarray(jax_gluon.dropout_mask(jax.random.key(8), shape, rate), np.float64)
    product = (mask - (1 - rate)) * (other - (1 - rate)) / deviation**2
    assert abs(product.mean()) <= 5 / np.sqrt(mask.size)


def largest_correlation(mask, rate):
    """Of a mask with itself moved along one axis, or two, in standard deviations."""
    x = (mask - (1 - rate)) / np.sqrt(rate * (1 - rate))
    moves = [(axis, shift) for axis in (0, 1) for shift in (1, 2, 3)]
    moves += [(axis, shift) for axis in (2, 3) for shift in (1, 2, 7, 8, 16, 64, 128)]
    moves += [(axes, (1, 1)) for axes in ((2, 3), (1, 2), (0, 1))]
    means = [abs((x * np.roll(x, shift, axis)).mean()) for axis, shift in moves]
    return max(means) * np.sqrt(x.size)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, (2, 3)])
def test_a_stream_that_repeats_or_is_shifted_is_found(axis):
    """The measure sees a second half that is the first, and rows that are the row before, moved."""
    mask = np.random.default_rng(0).random((4, 4, 256, 256)) >= 0.5
    if axis == (2, 3):
        mask[:, :, 1::2] = np.roll(mask[:, :, ::2], 1, 3)
    else:
        first, second = np.split(np.moveaxis(mask, axis, 0), 2)
        second[:] = first
    moved = largest_correlation(mask.astype(np.float64), 0.5)
    assert moved > 50


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ((KEY, 7, 0.1), ValueError, r"shape is 7; allowed: \(B, N, T, S\)"),
        ((KEY, (2, 3, 4), 0.1), ValueError, r"shape is \(2, 3, 4\); allowed: \(B, N, T, S\)"),
        ((KEY, (2, 3, -4, 5), 0.1), ValueError, r"shape\[T\] is -4; allowed: an int of at least 0"),
        ((KEY, (2, 3, 4, 5), 1.0), ValueError, r"rate is 1.0; allowed: a number in \[0, 1\)"),
        ((3, (2, 3, 4, 5), 0.1), TypeError, "key is a int; allowed: a key of jax.random"),
    ],
)  # fmt: skip
def test_a_bad_mask_is_refused(arguments, error, complaint):
    with pytest.raises(error, match=f"jax_gluon.dropout_mask: {complaint}"):
        jax_gluon.dropout_mask(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(implementation, keywords, rng, d_out, bias, q, k, v):
    def attention(bias, q, k, v):
        return jax_gluon.attention_with_log_sum_exp(
            q, k, v, bias, implementation=implementation, dropout_rng=rng, **dict(keywords)
        )

    (out, log_sum_exp), pullback = jax.vjp(attention, bias, q, k, v)
    d_bias, *gradients = pullback((d_out, jnp.cos(log_sum_exp)))
    return out, log_sum_exp, *gradients, d_bias


@pytest.mark.parametrize(
    ("kernel", "dtype", "bars"),
    [
        (None, "float32", (2e-6, 3e-6)), ("gluon", "float32", (2e-6, 3e-6)),
        ("gluon", "bfloat16", (5e-3, 8e-3)), ("baseline", "float16", (8e-4, 1e-3)),
    ],
)  # fmt: skip
def test_every_implementation_is_the_oracle(
    kernel, dtype, bars, implementation, oracle, relative_error, random_operands
):
    """With the published mask: output, log-sum-exp and all gradients."""
    if implementation == "xla" and (kernel, dtype) == ("gluon", "float32"):
        pytest.skip("it has one kernel")
    kernel = None if implementation == "xla" else kernel
    rate = 0.3
    q, k, v, d_out = random_operands(B, T, S, N, K, H, V, dtype=dtype)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, N, T, S), np.float32))
    keywords = tuple({**RULES, "dropout_rate": rate, "kernel": kernel}.items())
    found = results(implementation, keywords, KEY, d_out, bias, q, k, v)
    mask = jax_gluon.dropout_mask(KEY, (B, N, T, S), rate)
    expected = oracle(
        q, k, v, bias, kept=mask, dropout_rate=rate, d_out=d_out,
        d_log_sum_exp=np.cos(np.asarray(found[1])), **RULES,
    )  # fmt: skip
    assert relative_error(found[0], expected.out) <= bars[0]
    assert relative_error(found[1], expected.log_sum_exp) <= 2e-6
    for gradient, exact in zip(found[2:], expected[2:], strict=True):
        assert relative_error(gradient, exact) <= bars[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def of_codes(attention, quantization, q, k, v, d_out):
    def attend(q, k, v):
        return attention(
            q, k, v, is_causal=True, quantization=quantization, dropout_rate=0.2, dropout_rng=KEY
        )

    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(d_out)


#: What each quantization gives, to compare every kernel with.
OF_REFERENCE = {}


@pytest.mark.parametrize("quantization", ["int8", "int4", "centered"])
@pytest.mark.parametrize("kernel", ["baseline", "gluon"])
def test_codes(kernel, quantization, implementation, relative_error, random_operands):
    """As the reference, whose operands are dequantized; centers and offsets of values too."""
    if implementation == "xla" and kernel == "gluon":
        pytest.skip("it has one kernel")
    if quantization == "centered":
        row = jax_gluon.QuantSpec(symmetric=False, center=True)
        quantization = jax_gluon.AttentionQuantization(jax_gluon.QuantSpec(), row, row)
    q, k, v, d_out = random_operands(B, T, S, N, K, 32, 24)
    v = v + 3.0

    operands = (q, k, v, d_out)
    attention = functools.partial(
        jax_gluon.dot_product_attention, implementation=implementation, kernel=kernel
    )
    found = of_codes(attention, quantization, *operands)
    if quantization not in OF_REFERENCE:
        reference = jax_gluon.reference.dot_product_attention
        OF_REFERENCE[quantization] = of_codes(reference, quantization, *operands)
    expected = OF_REFERENCE[quantization]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1.3e-2


def test_nothing_but_the_key_and_the_place_matters(implementation, random_operands):
    """Parts of a batch and of rows drop what the whole drops; `vmap` changes nothing."""
    q, k, v, _ = random_operands(3, 40, 130, N, K, 16, 16)
    attend = functools.partial(
        jax_gluon.dot_product_attention, dropout_rate=0.4, implementation=implementation
    )
    ones = jnp.ones_like(v)
    # With equal values a row is the share of its weights that is kept, over 1 - rate.
    whole = attend(jnp.zeros_like(q), k, ones, dropout_rng=KEY)
    mask = np.asarray(jax_gluon.dropout_mask(KEY, (3, N, 40, 130), 0.4))
    expected = mask.mean(-1).transpose(0, 2, 1)[..., None] / 0.6
    np.testing.assert_allclose(whole, np.broadcast_to(expected, whole.shape), rtol=1e-5)
    alone = attend(jnp.zeros_like(q[:1, :20]), k[:1], ones[:1], dropout_rng=KEY)
    np.testing.assert_allclose(alone, whole[:1, :20], rtol=1e-6)
    keys = jax.random.split(KEY, 3)
    mapped = jax.vmap(lambda q, k, v, key: attend(q, k, v, dropout_rng=key))(q, k, v, keys)
    each = [attend(*x[:3], dropout_rng=x[3]) for x in zip(q, k, v, keys, strict=True)]
    np.testing.assert_allclose(mapped, jnp.stack(each), rtol=1e-5, atol=1e-6)


def test_broadcast_dropout(implementation, random_operands):
    """All heads of all entries drop alike."""
    q, k, v, _ = random_operands(2, 9, 80, N, K, 16, 16)
    found = jax_gluon.dot_product_attention(
        jnp.zeros_like(q), k, jnp.ones_like(v), dropout_rate=0.5, dropout_rng=KEY,
        broadcast_dropout=True, implementation=implementation,
    )  # fmt: skip
    mask = np.asarray(jax_gluon.dropout_mask(KEY, (2, N, 9, 80), 0.5, broadcast=True))
    assert (mask == mask[:1, :1]).all()
    expected = mask.mean(-1).transpose(0, 2, 1)[..., None] / 0.5
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-5)


def test_a_dropped_value_is_not_read(implementation, random_operands):
    """NaN reaches the rows that keep it alone."""
    q, k, v, _ = random_operands(1, 12, 40, 2, 1, 16, 16)
    v = v.at[0, 17].set(jnp.nan)
    found = jax_gluon.dot_product_attention(
        q, k, v, dropout_rate=0.5, dropout_rng=KEY, implementation=implementation
    )
    mask = np.asarray(jax_gluon.dropout_mask(KEY, (1, 2, 12, 40), 0.5))[0, :, :, 17]
    np.testing.assert_array_equal(np.isnan(found[0]).all(-1), mask.T)
    np.testing.assert_array_equal(np.isnan(found[0]).any(-1), mask.T)


def test_no_rate_needs_no_key_and_changes_nothing(random_operands):
    """Also under `jax.checkpoint` with a rate, where forward runs twice."""
    q, k, v, _ = random_operands()
    plain = jax_gluon.dot_product_attention(q, k, v)
    np.testing.assert_array_equal(jax_gluon.dot_product_attention(q, k, v, dropout_rate=0.0), plain)

    def loss(q):
        return jax_gluon.dot_product_attention(q, k, v, dropout_rate=0.3, dropout_rng=KEY).sum()

    np.testing.assert_array_equal(jax.grad(jax.checkpoint(loss))(q), jax.grad(loss)(q))


@pytest.mark.parametrize("kernel", ["baseline", "gluon"])
def test_with_sinks_and_segments(kernel, implementation, oracle, relative_error, random_operands):
    """All that may leave a row less than its keys, at once."""
    rng = np.random.default_rng(4)
    q, k, v, d_out = random_operands(B, T, S, N, K, H, V)
    sinks = jnp.asarray(rng.standard_normal(N), jnp.float32)
    rules = dict(
        is_causal=True, query_positions=rng.integers(80, 200, (B, T)),
        key_value_positions=rng.permutation(S), query_segment_ids=rng.integers(0, 2, (B, T)),
        key_value_segment_ids=rng.integers(0, 2, (B, S)), logits_soft_cap=4.0,
        key_value_seq_lengths=np.array([S, 150]),
    )  # fmt: skip
    if implementation == "xla":
        if kernel == "gluon":
            pytest.skip("it has one kernel")
        kernel = None

    def attention(q, k, v, sinks):
        return jax_gluon.dot_product_attention(
            q, k, v, sinks=sinks, dropout_rate=0.4, dropout_rng=KEY, kernel=kernel,
            implementation=implementation, **rules,
        )  # fmt: skip

    @jax.jit
    def results(d_out, *operands):
        out, pullback = jax.vjp(attention, *operands)
        return out, *pullback(d_out)

    out, *gradients, d_sinks = results(d_out, q, k, v, sinks)
    mask = jax_gluon.dropout_mask(KEY, (B, N, T, S), 0.4)
    exact = oracle(q, k, v, sinks=sinks, kept=mask, dropout_rate=0.4, d_out=d_out, **rules)
    assert relative_error(out, exact.out) <= 2e-6
    for gradient, expected in zip(gradients, exact[2:5], strict=True):
        assert relative_error(gradient, expected) <= 3e-6
    assert relative_error(d_sinks, exact.d_sinks) <= 3e-6


def test_tokens_of_a_part_have_the_bits_of_their_places(implementation):
    """Rows and keys may be a part of others, as where devices share them."""
    B, N, T, S, rate = 2, 3, 9, 33, 0.4
    key, first_row, first_key = jax.random.key(4), 5, 70
    problem = AttentionProblem(1.0, dropout_rate=rate, implementation=implementation)
    seeds = _dropout.of_later_tokens(_dropout.seeds_of(key, B, False), first_row, first_key)
    # Of equal logits; values tell which keys are there.
    query, keys = jnp.zeros((B, T, N, 4)), jnp.zeros((B, S, N, 4))
    value = jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (B, S, N, S))
    operands = AttentionOperands(query, keys, value, dropout_seeds=seeds)
    _, residuals = _lowering.forward(problem, np.dtype(np.float32), operands)
    kept = np.swapaxes(np.asarray(residuals.out), 1, 2) > 0.5 / S
    mask = jax_gluon.dropout_mask(key, (B, N, first_row + T, first_key + S), rate)
    np.testing.assert_array_equal(kept, mask[:, :, first_row:, first_key:])
