"""Every variant of the kernels, Metal's too: keys that are hidden, numbers that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._quantization.formats import PRESETS
from tests.support import cases, quantizer
from tests.support.arrays import placed
from tests.support.cases import BARS
from tests.support.variants import cpu_variants

plugin = pytest.importorskip("jax_gluon._plugin")
pytestmark = pytest.mark.usefixtures("poison")

# A bias that leaves nothing of the logits it is added to, on whole rows and in parts of others.
VARIANTS = sorted({*cpu_variants(), "metal"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "least"),
    # Logits come out of products in float32 whatever the operands are.
    [("float32", -1e9), *((x, -1e30) for x in ("float32", "bfloat16", "int8", "int4"))],
)
@pytest.mark.parametrize("T", [70, 3], ids=["blocks", "decode"])
def test_rows_whose_logits_are_all_large_and_negative(
    use, oracle, relative_error, variant, dtype, least, T
):
    """A mask of finite numbers, and left padding: each such row is uniform over what it sees."""
    implementation = use(variant)
    quantization = dtype if dtype.startswith("int") else None
    causal = T > 3
    S = 70 if causal else 330
    case = dict(T=T, S=S, N=2, K=1, H=16, V=16, is_causal=causal)
    arrays, keywords, d_out, _ = cases.operands(case, "float32" if quantization else dtype)
    query, key, value = arrays
    bias = np.zeros((2, 1, T, S), np.float32)
    bias[0, :, T // 3 : 2 * T // 3] = least
    bias[1, :, :, : 30 if causal else S] = least
    bias[1, :, -1, S // 2 :] = 0
    # What is left of the products is nothing here, and all of them in float64.
    query = np.array(query)
    query[0, T // 3 : 2 * T // 3] = query[1, : 30 if causal else T - 1] = 0
    # Scales that vary from row to row, which 8-bit probabilities take in.
    value = np.asarray(value) * np.exp2(np.arange(S) % 5 - 2).astype(value.dtype)[:, None, None]
    query, key, value = point = tuple(map(placed, (query, key, value)))
    specs = PRESETS.get(quantization)  # the preset by its name leaves few queries in float
    if specs:
        point = tuple(
            quantizer.values(jax_gluon.quantize(x, spec, implementation=implementation))
            for x, spec in zip(point, (specs.query, specs.key, specs.value), strict=True)
        )
    exact = oracle(*point, bias, **keywords, d_out=d_out)

    def attention(*x):
        return jax_gluon.attention_with_log_sum_exp(
            *x, **keywords, implementation=implementation, quantization=specs
        )

    (out, log_sum_exp), pullback = jax.vjp(attention, query, key, value, placed(bias))
    gradients = pullback((d_out, jnp.zeros_like(log_sum_exp)))
    forward, backward = (1.3e-2, 2e-2) if dtype == "int4" else BARS[dtype]
    log_sum_exp_error = 2e-2 if dtype == "int4" else 1e-3
    np.testing.assert_allclose(log_sum_exp, exact.log_sum_exp, atol=log_sum_exp_error, rtol=2e-6)
    assert relative_error(out, exact.out) <= forward
    for label, x, y in zip(("dq", "dk", "dv", "dbias"), gradients, exact[2:], strict=True):
        assert relative_error(x, y) <= backward, label
    # Row by row: where a row is wrong alone the norm of all may hide it.
    rows = np.linalg.norm(np.asarray(out, np.float64) - exact.out, axis=-1)
    assert (rows <= 10 * forward * np.linalg.norm(exact.out, axis=-1).max()).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("T", "S"),
    [(20, 300), (2, 100), (70, 49), (4, 2)],
    ids=["blocks", "decode", "small", "two_keys"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_logit_of_minus_infinity_and_the_least_bias_hide(use, variant, T, S, dtype):
    """The same bits as a bias of -inf gives, in results and gradients."""
    implementation = use(variant)
    arrays, _, d_out, _ = cases.operands(dict(T=T, S=S, N=2, K=1), dtype)
    query, key, value = (np.abs(x) + np.asarray(0.1, x.dtype) for x in map(np.asarray, arrays))

    @jax.jit
    def run(key, query, bias):
        def attention(*x):
            return jax_gluon.dot_product_attention(*x, implementation=implementation)

        out, pullback = jax.vjp(attention, query, key, value, bias)
        return out, *pullback(d_out)

    bias = np.zeros((1, 1, T, S), np.float32)
    hidden = slice(7, 10) if S > 10 else slice(1, 2)
    hides = bias.copy()
    hides[..., hidden] = -np.inf
    hides[:, :, 1] = -np.inf
    expected = run(key, query, hides)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in expected)
    least = np.maximum(hides, np.finfo(np.float32).min)
    actual = run(key, query, least)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    key[:, hidden, :, 3] = query[:, 1, :, 5] = -np.inf
    infinite = run(key, query, bias)
    for x, y in zip(infinite, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
@pytest.mark.parametrize("kernel", ["baseline", "gluon"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_blocks_that_a_mask_hides_are_as_if_they_were_not_there(use, variant, kernel, quantization):
    """The same bits without their keys, whatever these hold: where steps of the softmax agree."""
    implementation = use(variant)
    arrays, _, d_out, _ = cases.operands(dict(T=150, S=704, N=2, K=1, H=16, V=16))
    query, key, value = map(np.array, arrays)
    shown = np.repeat([True, False, True], (128, 448, 128))
    key[:, ~shown], value[:, ~shown] = np.nan, np.inf
    mask = np.broadcast_to(shown, (150, 704)).copy()
    mask[:64, 640:] = False

    def run(key, value, mask):
        def attention(*x):
            return jax_gluon.dot_product_attention(
                *x, mask=mask, implementation=implementation, kernel=kernel,
                quantization=quantization,
            )  # fmt: skip

        def results(*x):
            out, pullback = jax.vjp(attention, *x)
            return out, *pullback(d_out)

        return jax.jit(results)(query, key, value)

    out, dq, dk, dv = run(key, value, mask)
    expected = run(key[:, shown], value[:, shown], mask[:, shown])
    for x, y in zip((out, dq, dk[:, shown], dv[:, shown]), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert not dk[:, ~shown].any()
    assert not dv[:, ~shown].any()


@pytest.mark.parametrize("variant", [*plugin.cpu_isas_supported(), "metal"])
@pytest.mark.parametrize(
    ("quantization", "T", "S"),
    [(None, 40, 280), (None, 80, 65), ("int8", 40, 150)],
    ids=["float", "small", "int8"],
)
def test_what_is_hidden_never_leaks(use, variant, quantization, T, S):
    """NaN, infinities and the largest numbers in hidden keys, values and biases change no bit."""
    implementation = use(variant)
    arrays, keywords, d_out, _ = cases.operands(dict(T=T, S=S, is_causal=True))
    query, key, value = arrays
    mask = np.ones((2, 1, T, S), bool)
    mask[:, :, :, 17] = False
    lengths = np.array([20, 20], np.int32)
    bias = np.zeros((2, 4, T, S), np.float32)

    @jax.jit
    def gradients(query, key, value, bias):
        def loss(query, key, value, bias):
            out = jax_gluon.dot_product_attention(
                query, key, value, bias, mask, **keywords, key_value_seq_lengths=lengths,
                query_seq_lengths=np.array([T, T - 10], np.int32),
                quantization=quantization, implementation=implementation,
            )  # fmt: skip
            return jnp.sum(out * d_out), out

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(query, key, value, bias)

    for bad in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
        hidden_key, hidden_value = np.array(key), np.array(value)
        hidden_query, hidden_bias = np.array(query), bias.copy()
        for hidden in (hidden_key, hidden_value):
            hidden[:, 17] = bad  # by the mask
            hidden[:, 20:] = bad  # by the lengths and, for most rows, causally
        hidden_query[1, T - 10 :] = bad
        hidden_bias[:, :, :, 17] = bad
        hidden_bias[:, :, 3, 4] = bad  # causally
        # The same numbers, but zero where they are hidden; centering leaves hidden keys out by the
        # lengths only, so key 17 counts in the mean: it is zero in both, or not finite in one.
        plain_key, plain_value, plain_query = np.array(key), np.array(value), np.array(query)
        plain_key[:, 20:] = plain_value[:, 17] = plain_value[:, 20:] = 0
        plain_query[1, T - 10 :] = 0
        if quantization is None:
            plain_key[:, 17] = 0
        elif np.isfinite(bad):
            continue
        else:
            plain_key[:, 17] = np.nan
        actual = gradients(hidden_query, hidden_key, hidden_value, hidden_bias)
        expected = gradients(plain_query, plain_key, plain_value, bias)
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert np.all(np.isfinite(y))
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("variant", [*plugin.cpu_isas_supported(), "metal"])
@pytest.mark.parametrize(
    ("quantization", "T"), [(None, 260), (None, 90), ("int8", 90)], ids=["float", "small", "int8"]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_visible_value_that_is_not_finite_reaches_exactly_the_rows_that_see_it(
    use, variant, quantization, T, bad
):
    implementation = use(variant)
    arrays, keywords, *_ = cases.operands(dict(T=T, S=T, is_causal=True))
    query, key, value = arrays
    value = np.array(value)
    value[0, T // 2, 1, 3] = bad
    out = jax_gluon.dot_product_attention(
        query, key, value, **keywords, quantization=quantization, implementation=implementation
    )
    affected = ~np.isfinite(out)
    expected = np.zeros_like(affected)
    # kv head 1 serves query heads 2 and 3; an INT8 row has one scale, so all of it is lost.
    expected[0, T // 2 :, 2:, slice(3, 4) if quantization is None else slice(None)] = True
    np.testing.assert_array_equal(affected, expected)
