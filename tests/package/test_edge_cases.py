"""Extents of 0 and 1, rows that see nothing, and NaN and infinity, seen and hidden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import reference

QUANTIZATIONS = pytest.mark.parametrize("quantization", [None, "int8"])


@functools.partial(jax.jit, static_argnums=0)
def _results(static, arrays, d_out, *inputs):
    def attention(q, k, v, bias=None):
        return jax_gluon.attention_with_log_sum_exp(q, k, v, bias, **dict(static), **arrays)

    outputs, pullback = jax.vjp(attention, *inputs)
    return outputs, pullback((d_out, jnp.ones_like(outputs[1])))


def attention_and_gradients(operands, d_out, bias=None, **keywords):
    """(out, lse), and gradients of query, key, value and, where there is one, bias.

    One program, and the same for other numbers.
    """
    inputs = (*operands, *(() if bias is None else (bias,)))
    arrays = {name: x for name, x in keywords.items() if isinstance(x, (np.ndarray, jax.Array))}
    static = tuple((name, x) for name, x in keywords.items() if name not in arrays)
    return _results(static, arrays, d_out, *inputs)


@QUANTIZATIONS
@pytest.mark.parametrize("extent", ["B", "T", "S", "BTS"])
def test_extent_0(extent, quantization, implementation, random_operands):
    q, k, v, d_out = random_operands(**dict.fromkeys(extent, 0), H=4, V=6)
    B, T, N, _ = q.shape
    bias = jnp.ones((B, N, T, k.shape[1]))
    (out, log_sum_exp), gradients = attention_and_gradients(
        (q, k, v), d_out, bias, quantization=quantization, implementation=implementation,
        is_causal=True,
    )  # fmt: skip
    assert out.shape == (B, T, N, 6)
    assert not out.any()
    assert log_sum_exp.shape == (B, T, N)
    assert np.isneginf(log_sum_exp).all()
    for gradient, x in zip(gradients, (q, k, v, bias), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def test_extent_0_in_rank_3(implementation):
    q, k = jnp.ones((3, 2, 4), jnp.bfloat16), jnp.ones((0, 1, 4), jnp.bfloat16)
    out, residual = jax_gluon.dot_product_attention(
        q, k, k, return_residual=True, implementation=implementation
    )
    assert (out.shape, out.dtype) == ((3, 2, 4), jnp.bfloat16)
    assert (residual.shape, residual.dtype) == ((3, 2), jnp.bfloat16)
    assert np.isneginf(residual.astype(jnp.float32)).all()


def test_vmap_over_an_axis_of_extent_0(implementation):
    q = jnp.ones((0, 1, 3, 2, 4))
    out = jax.vmap(
        lambda q: jax_gluon.dot_product_attention(q, q, q, implementation=implementation)
    )(q)
    assert out.shape == q.shape


@pytest.mark.parametrize(
    "shape",
    [
        {"H": 1, "V": 1},
        {"H": 257, "V": 257},
        {"H": 1, "V": 257},
        {"T": 1},
        {"S": 1},
        {"T": 1, "S": 1, "B": 1, "N": 1, "K": 1, "H": 1, "V": 1},
        {"T": 65, "S": 129, "B": 1, "N": 1, "K": 1},
    ],
    ids=lambda shape: "-".join(f"{letter}{extent}" for letter, extent in shape.items()),
)
def test_awkward_extents(shape, implementation, oracle, relative_error, random_operands):
    q, k, v, d_out = random_operands(**shape)
    if implementation == "metal" and shape.get("V") == 257:
        with pytest.raises(ValueError, match="a head dim of 257"):
            jax_gluon.dot_product_attention(q, k, v, implementation=implementation)
        return
    (out, _), gradients = attention_and_gradients((q, k, v), d_out, implementation=implementation)
    expected = oracle(q, k, v, d_out=d_out, d_log_sum_exp=np.ones(out.shape[:-1]))
    assert relative_error(out, expected.out) <= 2e-6
    for gradient, exact in zip(gradients, expected[2:5], strict=True):
        # With one key dP - D cancels to 0: what is left is rounding.
        error = np.linalg.norm(np.asarray(gradient, np.float64) - exact)
        assert error <= 3e-6 * max(np.linalg.norm(exact), np.linalg.norm(d_out))


MASKED = np.zeros((2, 4, 5, 7), bool)
MASKED[0, :, 2:] = True
MASKED[1, 1, 0, 3] = True
# Each hides every key from some rows in its own way.
EMPTY_ROWS = {
    "mask": {"mask": MASKED},
    "mask_all": {"mask": np.zeros((1, 1, 1, 1), bool)},
    "window": {"local_window_size": (0, 0), "key_value_seq_lengths": np.array([2, 3], np.int32)},
    "query_lengths": {"query_seq_lengths": np.array([0, 3], np.int32)},
    "key_lengths": {"key_value_seq_lengths": np.array([0, 4], np.int32), "is_causal": True},
    "bias": {"bias": np.where(MASKED, np.float32(0.5), -np.inf)},
    "bias_and_mask": {
        "bias": np.where(MASKED, np.float32(0.5), -np.inf),
        "mask": ~MASKED[:1, :1],
    },
}


def _empty_rows():
    """Each case; codes, which are read alike whatever hides, on the CPU and a few elsewhere.

    XLA's rules are in tests/package/test_xla.py.
    """
    for case in EMPTY_ROWS:
        for implementation in ("cpu", "metal"):
            yield case, None, implementation
            if implementation == "cpu" or case in ("mask", "key_lengths"):
                yield case, "int8", implementation
    yield from (("window", None, "xla"), ("bias_and_mask", None, "xla"))
    yield "key_lengths", "int8", "xla"


@pytest.mark.parametrize(
    ("case", "quantization", "implementation"), list(_empty_rows()), indirect=["implementation"]
)
def test_row_that_sees_no_key(
    case, quantization, implementation, oracle, fake_quantize, relative_error, random_operands
):
    keywords = dict(EMPTY_ROWS[case])
    q, k, v, d_out = random_operands(B=2, T=5, S=7, N=4, K=2, H=16, V=8)
    bias = keywords.pop("bias", None)
    (out, log_sum_exp), gradients = attention_and_gradients(
        (q, k, v), d_out, bias, quantization=quantization, implementation=implementation, **keywords
    )
    exact_operands = (q, k, v)
    tolerance = (2e-6, 3e-6)
    if quantization:
        lengths = keywords.get("key_value_seq_lengths")
        exact_operands = (
            fake_quantize(q),
            fake_quantize(k, center=True, lengths=lengths),
            fake_quantize(v),
        )
        tolerance = (8e-3, 1e-2)
    expected = oracle(
        *exact_operands, bias, **keywords, d_out=d_out, d_log_sum_exp=np.ones((2, 5, 4))
    )
    empty = np.isneginf(expected.log_sum_exp)
    assert empty.any()
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), empty)
    assert not np.asarray(out)[empty].any()
    assert not np.asarray(gradients[0])[empty].any()
    assert relative_error(out, expected.out) <= tolerance[0]
    for gradient, exact in zip(gradients, expected[2:], strict=False):
        assert relative_error(gradient, exact) <= tolerance[1]


@pytest.mark.filterwarnings("ignore:.*these keys stay visible")
def test_minus_infinity_bias_under_a_soft_cap_is_the_cap_itself(
    implementation, oracle, relative_error, random_operands
):
    q, k, v, d_out = random_operands(T=5, S=7)
    hidden = np.random.default_rng(3).random((5, 7)) < 0.5
    keywords = {"logits_soft_cap": 4.0}
    (out, log_sum_exp), gradients = attention_and_gradients(
        (q, k, v), d_out, np.where(hidden, -np.inf, 0.0).astype(np.float32),
        implementation=implementation, **keywords,
    )  # fmt: skip
    expected = oracle(
        q, k, v, np.where(hidden, -1e6, 0.0), **keywords,
        d_out=d_out, d_log_sum_exp=np.ones(out.shape[:-1]),
    )  # fmt: skip
    assert relative_error(out, expected.out) <= 2e-6
    assert relative_error(log_sum_exp, expected.log_sum_exp) <= 2e-6
    for gradient, exact in zip(gradients, expected[2:], strict=True):
        assert relative_error(gradient, exact) <= 3e-6


def _hiding_ways():
    """Each way; on XLA those that tests/package/test_xla.py does not poison, and one of codes."""
    for way in ("mask", "key_lengths", "causal", "window", "bias"):
        for implementation in ("cpu", "metal"):
            for quantization in (None, "int8"):
                yield way, quantization, implementation
    yield from (("mask", None, "xla"), ("window", None, "xla"), ("bias", None, "xla"))
    yield "key_lengths", "int8", "xla"


@pytest.mark.parametrize(
    ("way", "quantization", "implementation"), list(_hiding_ways()), indirect=["implementation"]
)
def test_hidden_key_and_value_leak_nowhere(way, quantization, implementation, random_operands):
    """The last keys are hidden from every row; what they hold changes no bit of any result."""
    q, k, v, d_out = random_operands(B=2, T=4, S=7, H=8, V=8)
    seen = np.arange(7) < 4
    keywords = {
        "mask": {"mask": seen},
        "key_lengths": {"key_value_seq_lengths": np.array([4, 4], np.int32)},
        "causal": {"is_causal": True},
        "window": {"local_window_size": (4, 0)},
        "bias": {"bias": np.where(seen, np.float32(0.25), -np.inf)[None]},
    }[way]

    def run(fill):
        poisoned = (k.at[:, 4:].set(fill), v.at[:, 4:].set(fill))
        return attention_and_gradients(
            (q, *poisoned), d_out, keywords.get("bias"),
            quantization=quantization, implementation=implementation,
            **{name: x for name, x in keywords.items() if name != "bias"},
        )  # fmt: skip

    # INT8 centres the key by the finite values of the tokens inside the lengths, so that the clean
    # run has to leave the mean alone as well: NaN does.
    clean = run(np.nan if quantization else 0.0)
    poisoned = run(jnp.asarray([np.nan, np.inf, -np.inf])[:, None, None])
    for x, y in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_key_hidden_from_some_rows_only_reaches_the_others(
    poison, implementation, oracle, relative_error, random_operands
):
    """Key 4 is poisoned; causality hides it from rows 0 to 3 alone."""
    q, k, v, d_out = random_operands(T=6, S=6)
    bad_k, bad_v = (x.at[:, 4].set(poison) for x in (k, v))
    # The poisoned rows take no cotangent, so that the others' gradients can be compared.
    d_out = d_out.at[:, 4:].set(0.0)
    (out, _), gradients = attention_and_gradients(
        (q, bad_k, bad_v), d_out, is_causal=True, implementation=implementation
    )
    expected = oracle(q[:, :4], k[:, :4], v[:, :4], is_causal=True)
    assert relative_error(out[:, :4], expected.out) <= 2e-6
    assert np.isnan(out[:, 4:]).all()
    assert np.isfinite(gradients[0][:, :4]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_hidden_bias_leaks_nowhere(poison, implementation, random_operands):
    q, k, v, d_out = random_operands(T=5, S=7)
    mask = np.random.default_rng(5).random((5, 7)) < 0.6

    def run(fill):
        return attention_and_gradients(
            (q, k, v), d_out, np.where(mask, np.float32(0.5), np.float32(fill)), mask=mask,
            implementation=implementation,
        )  # fmt: skip

    for x, y in zip(jax.tree.leaves(run(poison)), jax.tree.leaves(run(0.0)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_hidden_query_rows_leak_nowhere(poison, implementation, random_operands):
    q, k, v, d_out = random_operands(T=5, S=7)
    lengths = jnp.asarray([3, 0], jnp.int32)
    seen = (np.arange(5) < np.asarray(lengths)[:, None])[:, :, None, None]

    def run(fill):
        return attention_and_gradients(
            (jnp.where(seen, q, fill), k, v), d_out,
            query_seq_lengths=lengths, implementation=implementation,
        )  # fmt: skip

    for x, y in zip(jax.tree.leaves(run(poison)), jax.tree.leaves(run(0.0)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("K", [4, 2])
def test_hidden_rows_of_one_key_leak_nowhere(K, implementation, random_operands):
    """Neither their queries nor what comes back of their outputs."""
    q, k, v, d_out = random_operands(B=2, T=1, S=1, N=4, K=K)
    mask = np.array([[True, False, True, False], [False] * 4])[:, :, None, None]
    seen = mask.transpose(0, 2, 1, 3)

    def run(fill):
        return attention_and_gradients(
            (jnp.where(seen, q, fill), k, v), jnp.where(seen, d_out, fill),
            mask=mask, implementation=implementation,
        )  # fmt: skip

    for x, y in zip(jax.tree.leaves(run(np.nan)), jax.tree.leaves(run(0.0)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_visible_poison_stays_in_the_rows_that_see_it(
    operand, poison, implementation, random_operands
):
    q, k, v, _ = random_operands(B=2, T=3, S=4, N=2, K=2)
    q, k = (jnp.abs(x) + 0.1 for x in (q, k))
    clean = jax_gluon.dot_product_attention(q, k, v, implementation=implementation)
    arrays = {"query": q, "key": k, "value": v}
    arrays[operand] = arrays[operand].at[0, 1, 1].set(poison)
    out = jax_gluon.dot_product_attention(**arrays, implementation=implementation)
    touched = np.zeros(out.shape[:3], bool)
    touched[0, 1 if operand == "query" else slice(None), 1] = True
    np.testing.assert_array_equal(np.asarray(out)[~touched], np.asarray(clean)[~touched])
    if operand == "value":
        expected = np.full_like(np.asarray(out)[touched], poison)
        np.testing.assert_array_equal(np.asarray(out)[touched], expected)
    elif np.isnan(poison) or poison > 0:
        assert np.isnan(np.asarray(out)[touched]).all()
    elif operand == "key":  # Logits of -inf: this key weighs nothing.
        others = [0, 2, 3]
        expected = jax_gluon.dot_product_attention(
            q, k[:, others], v[:, others], implementation=implementation
        )
        np.testing.assert_allclose(
            np.asarray(out)[touched], np.asarray(expected)[touched], rtol=1e-5, atol=1e-6
        )


def test_large_logits_do_not_overflow(implementation, oracle, relative_error, random_operands):
    q, k, v, d_out = random_operands(T=5, S=7)
    q = q * 1e4
    (out, log_sum_exp), gradients = attention_and_gradients(
        (q, k, v), d_out, implementation=implementation
    )
    expected = oracle(q, k, v, d_out=d_out, d_log_sum_exp=np.ones(out.shape[:-1]))
    # Logits of 1e4 carry an absolute error of about 1e-3 into the exponent.
    assert relative_error(out, expected.out) <= 1e-2
    assert relative_error(log_sum_exp, expected.log_sum_exp) <= 2e-6
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("T", "least", "dtype"),
    [(40, -1e9, "float32"), (40, -1e30, "bfloat16"), (2, -1e30, "float32"), (2, -1e9, "bfloat16")],
)
def test_rows_whose_logits_are_all_large_and_negative(
    T, least, dtype, oracle, relative_error, random_operands
):
    """A mask of finite numbers, on whole rows and as left padding under causal.

    In XLA; tests/cpu/test_hidden.py has the same for the kernels of CPU and Metal.
    """
    q, k, v, d_out = random_operands(T=T, S=40, dtype=dtype)
    bias = np.zeros((2, 1, T, 40), np.float32)
    bias[0, :, 0] = bias[0, :, 20:30] = least
    bias[1, :, :, :15] = least
    # What is left of the products is nothing here, and all of them in float64.
    q = np.array(q)
    q[0, 0] = q[0, 20:30] = q[1, :15] = 0
    q = jnp.asarray(q)
    (out, log_sum_exp), gradients = attention_and_gradients(
        (q, k, v), d_out, bias, is_causal=True, implementation="xla"
    )
    expected = oracle(
        q, k, v, bias, is_causal=True, d_out=d_out, d_log_sum_exp=np.ones(out.shape[:-1])
    )
    forward, backward = (2e-6, 3e-6) if dtype == "float32" else (7e-3, 1e-2)
    assert relative_error(out, expected.out) <= forward
    np.testing.assert_allclose(log_sum_exp, expected.log_sum_exp, rtol=2e-6, atol=2e-3)
    for gradient, exact in zip(gradients, expected[2:], strict=True):
        assert relative_error(gradient, exact) <= backward


@pytest.fixture(params=["cpu", "metal", "xla", "reference"])
def attention(request, require):
    """Each implementation, and the oracle of the package."""
    require(request.param)
    return request.param


@functools.partial(jax.jit, static_argnums=0)
def run_attention(attention, d_out, *operands):
    """Output, log-sum-exp and gradients, of an implementation or of the oracle."""
    if attention == "reference":
        function = reference.attention_with_log_sum_exp
    else:
        function = functools.partial(jax_gluon.attention_with_log_sum_exp, implementation=attention)
    outputs, pullback = jax.vjp(function, *operands)
    seen = jnp.isfinite(outputs[1]).astype(jnp.float32)
    return *outputs, *pullback((d_out, seen))


@pytest.mark.parametrize("T", [8, 2])
@pytest.mark.parametrize("operand", ["query", "key", "value_of_hidden"])
def test_a_logit_of_minus_infinity_hides_its_key(
    operand, T, attention, oracle, relative_error, random_operands
):
    q, k, v, d_out = random_operands(T=T, S=9)
    q, k = (jnp.abs(x) + 0.1 for x in (q, k))
    bias = np.zeros((2, 4, T, 9), np.float32)
    if operand == "query":
        infinite = (q.at[0, 1, 2, 3].set(-np.inf), k, v)
        bias[0, 2, 1] = -np.inf
    else:
        infinite = (q, k.at[1, 4, 0, 3].set(-np.inf), v)
        bias[1, :2, :, 4] = -np.inf
    if operand == "value_of_hidden":
        infinite = (q, infinite[1], v.at[1, 4, 0].set(np.nan))
    actual = run_attention(attention, d_out, *infinite)
    seen = np.isfinite(np.asarray(actual[1]))
    expected = oracle(q, k, v, bias, d_out=d_out, d_log_sum_exp=seen)
    np.testing.assert_array_equal(seen, np.isfinite(expected.log_sum_exp))
    assert relative_error(np.asarray(actual[1])[seen], expected.log_sum_exp[seen]) <= 2e-6
    for x, y in zip((actual[0], *actual[2:]), (expected.out, *expected[2:5]), strict=True):
        assert relative_error(x, y) <= 3e-6


@pytest.mark.parametrize(
    ("T", "logit", "dtype"),
    [(8, np.nan, "float32"), (8, np.inf, "bfloat16"), (2, np.inf, "float32"),
     (2, np.nan, "bfloat16")],
)  # fmt: skip
def test_a_logit_of_nan_or_infinity_makes_its_row_nan(T, logit, dtype, attention, random_operands):
    q, k, v, d_out = random_operands(T=T, S=9, dtype=dtype)
    bias = jnp.zeros((2, 4, T, 9)).at[0, 1, 1, 5].set(logit)
    out, log_sum_exp, d_query, *_ = run_attention(attention, d_out, q, k, v, bias)
    touched = np.zeros(out.shape[:3], bool)
    touched[0, 1, 1] = True
    np.testing.assert_array_equal(np.isnan(log_sum_exp), touched)
    for x in (out, d_query):
        np.testing.assert_array_equal(np.isnan(x), np.broadcast_to(touched[..., None], x.shape))


@pytest.mark.parametrize("T", [8, 2])
@pytest.mark.parametrize("least", [np.finfo(np.float32).min, -2.36e38, -np.inf])
def test_the_least_bias_hides_its_key(least, T, attention, oracle, relative_error, random_operands):
    q, k, v, d_out = random_operands(T=T, S=9)
    bias = np.zeros((1, 4, T, 9), np.float32)
    bias[:, :2, 1] = bias[:, 3, :, 4] = least
    actual = run_attention(attention, d_out, q, k, v, jnp.asarray(bias))
    hides = np.where(bias < 0, -np.inf, bias)
    seen = np.isfinite(np.asarray(actual[1]))
    expected = oracle(q, k, v, hides, d_out=d_out, d_log_sum_exp=seen)
    np.testing.assert_array_equal(seen, np.isfinite(expected.log_sum_exp))
    assert not seen.all()
    for x, y in zip((actual[0], *actual[2:]), (expected.out, *expected[2:]), strict=True):
        assert relative_error(x, y) <= 3e-6


@pytest.mark.filterwarnings("ignore:.*these keys stay visible")
def test_the_least_bias_under_a_soft_cap_is_the_cap(attention, random_operands):
    q, k, v, _ = random_operands(T=3, S=4)
    bias = jnp.full((1, 1, 3, 4), np.finfo(np.float32).min)
    if attention == "reference":
        function = reference.attention_with_log_sum_exp
    else:
        function = functools.partial(jax_gluon.attention_with_log_sum_exp, implementation=attention)
    out, log_sum_exp = function(q, k, v, bias, logits_soft_cap=4.0)
    mean = np.repeat(np.asarray(v).mean(1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-6)
    np.testing.assert_allclose(log_sum_exp, np.log(4) - 4, atol=1e-5)
