"""The oracle, against `jax.nn` where the two agree and against NumPy formulas where they don't."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gluon import QuantSpec, reference

T, S = 7, 9


@pytest.fixture(autouse=True)
def _float64(configure):
    with configure(jax_enable_x64=True):
        yield


def draw(seed=0, *, B=2, T=T, S=S, N=4, K=2, H=6, V=6):
    """query, key, value and cotangents of the output and of the log-sum-exp, in float64."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V), (B, T, N)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


def results(attention, inputs, cotangents):
    """The outputs and then the gradients of the inputs, in one list."""

    @jax.jit
    def run(inputs, cotangents):
        outputs, pullback = jax.vjp(attention, *inputs)
        return [*jax.tree.leaves(outputs), *pullback(cotangents)]

    return run(inputs, cotangents)


def random_mask(*shape, seed=1):
    return np.random.default_rng(seed).random(shape) < 0.7


def random_bias(*shape, seed=2):
    return np.random.default_rng(seed).standard_normal(shape)


def lengths(*values):
    return np.array(values, np.int32)


def assert_close(actual, expected, tolerance=1e-13):
    for x, exact in zip(actual, expected, strict=True):
        assert x.shape == exact.shape
        scale = max(1.0, float(np.max(np.abs(np.where(np.isfinite(exact), exact, 0.0)))))
        np.testing.assert_allclose(x, exact, rtol=0, atol=tolerance * scale)


# A row that sees no key is what jax.nn does differently: no such row here.
AGREEING = {
    "multi_head": {"kv_heads": 4},
    "multi_query": {"kv_heads": 1},
    "scale": {"scale": -0.3},
    "scale_0": {"scale": 0.0},
    "causal": {"is_causal": True},
    "mask": {"mask": random_mask(2, 1, T, S) | (np.arange(S) == 0)},
    "bias": {"bias": random_bias(1, 4, T, S)},
    "window": {"local_window_size": (2, 3)},
    "window_int_causal": {"local_window_size": 4, "is_causal": True},
    "key_lengths": {"key_value_seq_lengths": lengths(3, 9), "is_causal": True},
}


@pytest.mark.parametrize("case", AGREEING)
def test_equals_jax_nn(case):
    keywords = dict(AGREEING[case])
    q, k, v, d_out, d_residual = draw(K=keywords.pop("kv_heads", 2))
    bias = keywords.pop("bias", None)
    inputs = (q, k, v) if bias is None else (q, k, v, jnp.asarray(bias))

    def expect(attention):
        def with_residual(*inputs):
            return attention(*inputs, return_residual=True, **keywords)

        return results(with_residual, inputs, (d_out, d_residual))

    # jax.nn's softmax is float32 whatever the operands are.
    assert_close(
        expect(reference.dot_product_attention), expect(jax.nn.dot_product_attention), 2e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_residual_has_the_dtype_of_jax_nn(dtype):
    q, k, v = (x.astype(dtype) for x in draw()[:3])
    out, residual = reference.dot_product_attention(q, k, v, return_residual=True)
    expected = jax.nn.dot_product_attention(q, k, v, return_residual=True)
    assert (out.dtype, residual.dtype) == (expected[0].dtype, expected[1].dtype)
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        *(x.astype(jnp.float32) for x in (out, expected[0])), atol=4 * epsilon
    )
    np.testing.assert_allclose(
        *(x.astype(jnp.float32) for x in (residual, expected[1])), rtol=2 * epsilon
    )


EMPTY_MASK = random_mask(2, 1, T, S) & (np.arange(T) != 3)[:, None]
BEYOND_JAX_NN = {
    "plain": {},
    "soft_cap": {"logits_soft_cap": 1.5},
    "soft_cap_bias_inf": {
        "logits_soft_cap": 1.5,
        "bias": np.where(random_mask(1, 1, T, S), random_bias(1, 1, T, S), -np.inf),
    },
    "bias_inf": {"bias": np.where(EMPTY_MASK, random_bias(2, 4, T, S), -np.inf)},
    "bias_key": {"bias": random_bias(2, 1, 1, S)},
    "bias_row": {"bias": random_bias(1, 4, T, 1)},
    "bias_scalar": {"bias": random_bias(1, 1, 1, 1)},
    "bias_rank_2": {"bias": random_bias(T, S)},
    "empty_rows_mask": {"mask": EMPTY_MASK},
    "everything_masked": {"mask": np.zeros((1, 1, 1, 1), bool)},
    "lengths": {"query_seq_lengths": lengths(4, 50), "key_value_seq_lengths": lengths(-3, 6)},
    "window_0": {"local_window_size": 0, "key_value_seq_lengths": lengths(4, 9)},
    "together": {
        "bias": random_bias(2, 4, T, S),
        "mask": EMPTY_MASK,
        "is_causal": True,
        "local_window_size": (4, 1),
        "query_seq_lengths": lengths(6, 7),
        "key_value_seq_lengths": lengths(9, 2),
        "logits_soft_cap": 2.0,
        "scale": -0.7,
    },
}


@pytest.mark.parametrize("case", BEYOND_JAX_NN)
def test_equals_numpy(case, oracle):
    q, k, v, d_out, d_log_sum_exp = draw(V=5)
    keywords = dict(BEYOND_JAX_NN[case])
    bias = keywords.pop("bias", None)
    expected = oracle(q, k, v, bias, **keywords, d_out=d_out, d_log_sum_exp=d_log_sum_exp)
    inputs = (q, k, v) if bias is None else (q, k, v, jnp.asarray(bias))

    def attention(*inputs):
        return reference.attention_with_log_sum_exp(*inputs, **keywords)

    actual = results(attention, inputs, (d_out, d_log_sum_exp))
    assert_close(actual, [x for x in expected if x is not None])


@pytest.mark.parametrize(
    "shape", [{"T": 1}, {"S": 1}, {"H": 1}, {"V": 11}, {"B": 1, "N": 1, "K": 1}]
)
def test_awkward_extents_equal_numpy(shape, oracle):
    q, k, v, d_out, _ = draw(**shape)
    expected = oracle(q, k, v, is_causal=True, d_out=d_out)
    attention = functools.partial(reference.dot_product_attention, is_causal=True)
    assert_close(results(attention, (q, k, v), d_out), [expected.out, *expected[2:5]])


@pytest.mark.parametrize("extent", ["B", "T", "S"])
def test_extent_0(extent):
    q, k, v, d_out, d_log_sum_exp = draw(**{extent: 0})
    out, log_sum_exp, *gradients = results(
        reference.attention_with_log_sum_exp, (q, k, v), (d_out, d_log_sum_exp)
    )
    assert out.shape == d_out.shape
    assert not out.any()
    assert np.isneginf(log_sum_exp).all()
    for gradient in gradients:
        assert not gradient.any()


def test_rank_3_equals_rank_4():
    q, k, v, _, _ = draw(B=1)
    out, log_sum_exp = reference.attention_with_log_sum_exp(q, k, v)
    flat, flat_log_sum_exp = reference.attention_with_log_sum_exp(q[0], k[0], v[0])
    np.testing.assert_array_equal(flat, out[0])
    np.testing.assert_array_equal(flat_log_sum_exp, log_sum_exp[0])


def test_array_scale_takes_the_gradient_of_a_finite_difference():
    q, k, v, d_out, _ = draw()
    k = k.at[:, -1].set(np.nan)

    def loss(scale):
        return jnp.vdot(d_out[:, : S - 2], reference.dot_product_attention(
            q, k, v, scale=scale, is_causal=True)[:, : S - 2])  # fmt: skip

    scale, step = jnp.asarray(0.4), 1e-5
    difference = (loss(scale + step) - loss(scale - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(scale), difference, rtol=1e-8)


def test_a_scale_for_each_head_is_a_factor_of_its_queries():
    q, k, v, *cotangents = draw()
    scale = jnp.asarray([0.4, -0.7, 0.0, 1.1])

    def scaled(q, k, v, scale):
        return reference.attention_with_log_sum_exp(q, k, v, scale=scale)

    def multiplied(q, k, v, scale):
        return scaled(q * scale[:, None], k, v, 1.0)

    actual, expected = (
        results(f, (q, k, v, scale), tuple(cotangents)) for f in (scaled, multiplied)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_poison_hidden_from_all_rows_reaches_no_result(poison, is_mapped):
    """Rows from 5 on are beyond the length, and key 5 is hidden from those before."""
    q, k, v, d_out, d_log_sum_exp = draw()
    bias = jnp.asarray(random_bias(2, 4, T, S))
    poisoned = (
        q.at[:, 5:].set(poison),
        k.at[:, 5].set(poison),
        v.at[:, 5, :, 2].set(poison),
        bias.at[..., 5].set(poison),
    )

    def attention(q, k, v, bias):
        return reference.attention_with_log_sum_exp(
            q, k, v, bias, is_causal=True, query_seq_lengths=jnp.full(q.shape[:1], 5, jnp.int32)
        )

    def mapped(*operands):
        outputs = jax.vmap(attention)(*(x[:, None] for x in operands))
        return tuple(x[:, 0] for x in outputs)

    run = functools.partial(
        results, mapped if is_mapped else attention, cotangents=(d_out, d_log_sum_exp)
    )
    assert_close(run(poisoned), run((q, k, v, bias)))


@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_poison_reaches_the_rows_that_see_it_alone(poisoned):
    q, k, v, d_out, _ = draw()
    attention = functools.partial(reference.dot_product_attention, is_causal=True)
    out, d_query, *_ = results(attention, (q, k, v), d_out)
    k = k.at[:, 5].set(np.nan) if poisoned == "key" else k
    v = v.at[:, 5].set(np.nan) if poisoned == "value" else v
    actual, d_query_actual, *_ = results(attention, (q, k, v), d_out)
    assert_close([actual[:, :5], d_query_actual[:, :5]], [out[:, :5], d_query[:, :5]])
    assert np.isnan(actual[:, 5:]).all()
    assert np.isnan(d_query_actual[:, 5:]).all()


def test_gradients_are_finite_in_strict_modes(strict_modes):
    """Rows that are empty, and scores far below and above 0."""
    q, k, v, d_out, _ = draw()
    attention = functools.partial(
        reference.dot_product_attention, mask=jnp.asarray(EMPTY_MASK), local_window_size=5
    )
    for x in results(attention, (1e3 * q, k, v), d_out):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_operands_are_computed_in_float32(dtype, relative_error):
    narrow = [x.astype(dtype) for x in draw()[:3]]
    exact = reference.dot_product_attention(*(x.astype(jnp.float64) for x in narrow))
    out = reference.dot_product_attention(*narrow)
    assert out.dtype == dtype
    assert relative_error(out, exact) < float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("center", [False, True])
def test_fake_quantization_equals_numpy(center, fake_quantize):
    x = draw()[1].astype(jnp.float32).at[1, 3].set(0.0)
    token_counts = lengths(4, 20)
    rounded = reference.fake_quantize(
        x.astype(jnp.float64), QuantSpec(center=center), lengths=jnp.asarray(token_counts)
    )
    assert rounded.dtype == jnp.float64
    expected = fake_quantize(x, center=center, lengths=token_counts)
    np.testing.assert_allclose(rounded, expected, rtol=0, atol=2e-6)
    # The codes do something: a step is 1 / 127 of the row's largest element.
    assert np.max(np.abs(rounded - x)[0, : token_counts[0]]) > 1e-3


def test_fake_quantization_is_float32_for_narrow_operands_and_passes_the_gradient_through():
    x = draw()[1].astype(jnp.bfloat16)
    rounded, pullback = jax.vjp(lambda x: reference.fake_quantize(x, QuantSpec()), x)
    assert rounded.dtype == jnp.float32
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(x.shape), jnp.float32)
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent.astype(jnp.bfloat16))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_fake_quantization_of_a_poisoned_row_is_nan_and_leaves_the_others_alone(poison):
    x = draw()[1]
    rounded = reference.fake_quantize(x.at[0, 3, 1, 2].set(poison), QuantSpec())
    expected = reference.fake_quantize(x, QuantSpec())
    assert np.isnan(rounded[0, 3, 1]).all()
    np.testing.assert_array_equal(rounded.at[0, 3, 1].set(0.0), expected.at[0, 3, 1].set(0.0))


def test_int8_gradient_is_the_exact_one_at_the_dequantized_operands():
    q, k, v, d_out, d_log_sum_exp = draw()
    keywords = {"key_value_seq_lengths": jnp.asarray(lengths(5, 9)), "is_causal": True}
    seen = jnp.minimum(keywords["key_value_seq_lengths"], q.shape[1])

    def run(operands, quantization):
        attention = functools.partial(
            reference.attention_with_log_sum_exp, **keywords, quantization=quantization
        )
        return results(attention, operands, (d_out, d_log_sum_exp))

    rounded = (
        reference.fake_quantize(q, QuantSpec()),
        reference.fake_quantize(k, QuantSpec(center=True), lengths=seen),
        reference.fake_quantize(v, QuantSpec()),
    )
    quantized = run((q, k, v), "int8")
    # Scales are float32, and rounded as XLA happens to fuse what computes them.
    assert_close(quantized, run(rounded, None), 1e-6)
    assert np.max(np.abs(quantized[0] - run((q, k, v), None)[0])) > 1e-4


def test_bad_arguments_are_named():
    q, k, v, _, _ = draw()
    with pytest.raises(TypeError, match=r'reference.dot_product_attention.*"qantization"'):
        reference.dot_product_attention(q, k, v, qantization="int8")
    with pytest.raises(TypeError, match=r"reference.dot_product_attention: return_residual"):
        reference.dot_product_attention(q, k, v, return_residual=1)
    with pytest.raises(ValueError, match=r"reference.attention_with_log_sum_exp: key"):
        reference.attention_with_log_sum_exp(q, k[..., :-1], v)
