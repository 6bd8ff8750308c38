"""Every variant of the kernels, Metal's too, against float64, at sizes that reach every tail.

Results and scratch start as NaN (JAX_GLUON_POISON), so that nothing unwritten passes.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import _lowering, reference
from jax_gluon._quantization.formats import PRESETS

plugin = pytest.importorskip("jax_gluon._plugin")

# Relative L2, forward and gradients: the design's bars for float32 operands and for 8-bit
# probabilities, and for 16-bit operands twice and three times what plain jnp of their type makes
# (test_16_bit_operands_are_as_accurate_as_the_bars_say measures that).
BARS = {
    "float32": (2e-6, 3e-6),
    "bfloat16": (7e-3, 1e-2),
    "float16": (8e-4, 1.2e-3),
    "int8": (8e-3, 1e-2),
}
RNG = np.random.default_rng(5)


def _use(monkeypatch, variant):
    """Chooses an instruction-set variant of the CPU kernels, or Metal: the `implementation`."""
    if variant == "metal":
        name, why = plugin.metal_device()
        if not name:
            (pytest.fail if os.environ.get("SOFTMETAL_REQUIRED") else pytest.skip)(why)
        return "metal"
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    assert plugin.cpu_isa() == variant
    return "cpu"


def _mask(B, N, T, S):
    mask = RNG.random((B, N, T, S)) < 0.6
    mask[0, 0, T // 2] = False
    return mask


# Sizes around the tiles (6 or 12 rows, 16 or 32 keys), the blocks (96 rows, 192 and 256 keys) and
# the subtiles (64 keys).
CASES = {
    "odd": dict(T=70, S=90),
    "blocks": dict(T=200, S=530, N=2, K=1, H=64, V=64),
    "causal": dict(T=130, S=130, is_causal=True),
    "causal_T_over_S": dict(T=300, S=150, N=2, is_causal=True),
    "causal_S_over_T": dict(T=150, S=300, N=2, is_causal=True),
    "window": dict(T=200, S=330, N=2, local_window_size=(20, 5)),
    "window_left_of_causal": dict(T=400, S=400, N=2, is_causal=True, local_window_size=(33, 0)),
    "window_past_the_keys": dict(T=300, S=40, N=2, local_window_size=(3, 3)),
    "lengths": dict(
        T=70, S=300,
        query_seq_lengths=np.array([0, 65], np.int32),
        key_value_seq_lengths=np.array([299, 5], np.int32),
    ),
    "bias": dict(T=33, S=300, bias=RNG.standard_normal((2, 4, 33, 300), np.float32)),
    "bias_keys": dict(T=100, S=70, bias=RNG.standard_normal((1, 4, 1, 70), np.float32)),
    "bias_rows": dict(T=100, S=70, bias=RNG.standard_normal((2, 1, 100, 1), np.float32)),
    "mask": dict(T=70, S=300, mask=_mask(2, 4, 70, 300)),
    "mask_blocks": dict(
        T=120, S=600, N=2, mask=np.broadcast_to(np.arange(600) // 256 == 1, (2, 1, 1, 600)).copy()
    ),
    "soft_cap": dict(T=70, S=90, scale=1.0, logits_soft_cap=2.0),
    "everything": dict(
        T=150, S=270, is_causal=True, local_window_size=(120, 9), logits_soft_cap=4.0, scale=-0.4,
        bias=RNG.standard_normal((2, 1, 150, 270), np.float32), mask=_mask(2, 4, 150, 270),
        key_value_seq_lengths=np.array([260, 100], np.int32),
    ),
    "head_dim_1": dict(T=20, S=70, H=1, V=1),
    "head_dim_257": dict(B=1, T=20, S=40, H=257, V=3),
    "value_dim_100": dict(T=20, S=70, H=12, V=100),
    "one_row": dict(T=1, S=700, N=2),
    "five_rows": dict(T=5, S=700, N=2),
    "one_key": dict(T=70, S=1),
    "multi_query": dict(T=100, S=100, K=1),
    # Heads of few queries and keys, computed at once, and few rows of many heads, stacked.
    "one": dict(T=1, S=1, N=4, K=4),
    "small": dict(T=9, S=7, N=3, K=1, H=20, V=36),
    "small_everything": dict(
        T=21, S=30, is_causal=True, local_window_size=(20, 9), logits_soft_cap=4.0, scale=-0.4,
        bias=RNG.standard_normal((2, 1, 21, 30), np.float32), mask=_mask(2, 4, 21, 30),
        key_value_seq_lengths=np.array([27, 5], np.int32),
        query_seq_lengths=np.array([20, 21], np.int32),
    ),
    "stacked": dict(T=3, S=250, N=39, K=3, is_causal=False),
    "stacked_everything": dict(
        T=5, S=230, N=44, K=2, local_window_size=(2, 210), logits_soft_cap=4.0,
        bias=RNG.standard_normal((2, 44, 5, 230), np.float32), mask=_mask(2, 44, 5, 230),
        query_seq_lengths=np.array([4, 5], np.int32),
    ),
    "many_chunks": dict(B=1, T=60, S=2500, N=1, K=1, H=16, V=16),
}  # fmt: skip
# The emulated variant is slow and shares every line but the intrinsics: it runs what differs.
EMULATED = [
    "odd", "causal", "everything", "head_dim_1", "head_dim_257", "one_key", "bias_rows", "one",
    "small_everything", "stacked_everything",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    monkeypatch.setenv("JAX_GLUON_POISON", "1")


def _operands(case, dtype):
    rng = np.random.default_rng(3)
    size = {"B": 2, "N": 4, "K": 2, "H": 24, "V": 24} | case
    B, T, S, N, K, H, V = (size[letter] for letter in "BTSNKHV")
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)  # noqa: E731
    # Keys off center, so that removing their mean matters.
    query, key, value = (
        draw(B, T, N, H),
        draw(B, S, K, H) + jnp.asarray(0.5, dtype),
        draw(B, S, K, V),
    )
    d_out, d_log_sum_exp = (
        draw(B, T, N, V),
        jnp.asarray(rng.standard_normal((B, T, N)), jnp.float32),
    )
    keywords = {name: x for name, x in case.items() if len(name) > 1 and name != "bias"}
    return (query, key, value, case.get("bias")), keywords, d_out, d_log_sum_exp


def _exact(operands, keywords, d_out, d_log_sum_exp):
    """Attention and gradients in float64 NumPy: out, log_sum_exp, dq, dk, dv, full dbias."""
    query, key, value, bias = (None if x is None else np.asarray(x, np.float64) for x in operands)
    (_, T, _, H), (_, S, K, _) = query.shape, key.shape
    group = query.shape[2] // K
    keys, values = np.repeat(key, group, 2), np.repeat(value, group, 2)
    scale = keywords.get("scale", H**-0.5)
    logits = np.einsum("btnh,bsnh->bnts", query, keys) * scale
    if bias is not None:
        logits = logits + bias
    cap, slope = keywords.get("logits_soft_cap"), 1.0
    if cap is not None:
        tanh = np.tanh(logits / cap)
        logits, slope = cap * tanh, 1 - tanh**2
    i, j = np.arange(T)[:, None], np.arange(S)[None]
    visible = np.ones(logits.shape, bool) & keywords.get("mask", True)
    visible &= (j <= i) | (not keywords.get("is_causal", False))
    left, right = keywords.get("local_window_size", (T + S, T + S))
    visible &= (i - left <= j) & (j <= i + right)
    visible &= i < keywords.get("query_seq_lengths", np.array([T]))[:, None, None, None]
    visible &= j < keywords.get("key_value_seq_lengths", np.array([S]))[:, None, None, None]
    maximum = np.max(logits, -1, keepdims=True, where=visible, initial=-1e300)
    p = np.where(visible, np.exp(np.where(visible, logits - maximum, 0)), 0)
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_sum_exp = np.where(total > 0, maximum + np.log(total), -np.inf)[..., 0]
    p /= np.where(total > 0, total, 1)
    out = np.einsum("bnts,bsnh->btnh", p, values)
    d_out = np.asarray(d_out, np.float64)
    delta = np.sum(d_out * out, -1) - np.asarray(d_log_sum_exp, np.float64)
    d_p = np.einsum("btnh,bsnh->bnts", d_out, values)
    d_logits = p * (d_p - delta.transpose(0, 2, 1)[..., None]) * slope
    over_group = lambda x: x.reshape(*x.shape[:2], K, group, -1).sum(3)  # noqa: E731
    return (
        out,
        log_sum_exp.transpose(0, 2, 1),
        np.einsum("bnts,bsnh->btnh", d_logits, keys) * scale,
        over_group(np.einsum("bnts,btnh->bsnh", d_logits, query) * scale),
        over_group(np.einsum("bnts,btnh->bsnh", p, d_out)),
        d_logits,
    )


def _dequantized(operands, keywords):
    """The point that the kernels' INT8 codes stand for."""
    query, key, value, bias = operands
    B, S = key.shape[:2]
    specs = PRESETS["int8"]
    lengths = keywords.get("key_value_seq_lengths")
    seen = np.arange(S) < (np.full(B, S) if lengths is None else np.asarray(lengths))[:, None]
    mask = keywords.get("mask")
    if mask is not None and mask.shape[2] == 1:
        seen = seen & mask.any((1, 2))
    codes = (
        _lowering.quantize(specs.query, "cpu", jnp.asarray(query), None),
        _lowering.quantize(specs.key, "cpu", jnp.asarray(key), jnp.asarray(seen)),
        _lowering.quantize(specs.value, "cpu", jnp.asarray(value), None),
    )
    exact = [
        np.asarray(x.data, np.float64) * np.asarray(x.scale, np.float64)
        + (0 if x.center is None else np.asarray(x.center, np.float64))
        for x in codes
    ]
    return (*exact, bias)


def _parameters():
    """Each variant meets each case; what only differs by conversion, some of them."""
    best, *others = plugin.cpu_isas_supported()
    for variant in (best, *others, "metal"):
        for name in EMULATED if variant.startswith("emulated") else CASES:
            if variant == "metal" and name == "head_dim_257":
                continue  # refused: its kernels take head dims to 256
            for dtype in BARS:
                if dtype == "int8" and name in ("one", "small", "small_everything"):
                    continue  # only floats have a kernel of their own there
                if variant == best or dtype in ("float32", "int8") or name in EMULATED:
                    yield pytest.param(variant, dtype, name, id=f"{variant}-{dtype}-{name}")


@pytest.mark.parametrize(("variant", "dtype", "name"), list(_parameters()))
def test_kernels_match_float64(monkeypatch, relative_error, variant, dtype, name):
    implementation = _use(monkeypatch, variant)
    quantization = "int8" if dtype == "int8" else None
    operands, keywords, d_out, d_log_sum_exp = _operands(
        CASES[name], "float32" if quantization else dtype
    )
    exact = _exact(
        _dequantized(operands, keywords) if quantization else operands,
        keywords, d_out, d_log_sum_exp,
    )  # fmt: skip
    # The -inf of an empty row takes no cotangent.
    d_log_sum_exp = jnp.where(np.isfinite(exact[1]), d_log_sum_exp, 0)

    @jax.jit
    def attention(inputs, cotangents):
        def function(*x):
            return jax_gluon.attention_with_log_sum_exp(
                *x, **keywords, implementation=implementation, quantization=quantization
            )

        results, pullback = jax.vjp(function, *inputs)
        return *results, *pullback(cotangents)

    inputs = tuple(jnp.asarray(x) for x in operands if x is not None)
    actual = attention(inputs, (d_out, d_log_sum_exp))
    forward, backward = BARS[dtype]
    # Where probabilities have 8 or 16 bits their exponentials are good to 7.5e-5.
    log_sum_exp_error = 2e-5 if dtype == "float32" else 2e-4
    np.testing.assert_allclose(actual[1], exact[1], atol=log_sum_exp_error, rtol=2e-6)
    expected = list(exact)
    if operands[3] is None:
        expected.pop()
    else:
        summed = tuple(axis for axis in range(4) if operands[3].shape[axis] == 1)
        expected[5] = exact[5].sum(summed, keepdims=True)
    for label, x, y in zip(
        ("out", "lse", "dq", "dk", "dv", "dbias"), actual, expected, strict=False
    ):
        if label == "lse":
            continue
        # Where one key is all there is, dS is zero and only rounding is left of it.
        if np.linalg.norm(y) <= 1e-9 * np.linalg.norm(exact[0]):
            assert np.linalg.norm(np.asarray(x, np.float64)) <= backward * np.linalg.norm(exact[0])
        else:
            assert relative_error(x, y) <= (forward if label == "out" else backward), label


# A bias that leaves nothing of the logits it is added to, on whole rows and in parts of others.
VARIANTS = sorted({*plugin.cpu_isas_supported(), "emulated_avx512", "metal"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("least", [-1e9, -1e30])
@pytest.mark.parametrize("T", [70, 3], ids=["blocks", "decode"])
def test_rows_whose_logits_are_all_large_and_negative(
    monkeypatch, relative_error, variant, dtype, least, T
):
    """A mask of finite numbers, and left padding: each such row is uniform over what it sees."""
    implementation = _use(monkeypatch, variant)
    quantization = dtype if dtype.startswith("int") else None
    causal = T > 3
    S = 70 if causal else 330
    case = dict(T=T, S=S, N=2, K=1, H=16, V=16, is_causal=causal)
    operands, keywords, d_out, _ = _operands(case, "float32" if quantization else dtype)
    query, key, value, _ = operands
    bias = np.zeros((2, 1, T, S), np.float32)
    bias[0, :, T // 3 : 2 * T // 3] = least
    bias[1, :, :, : 30 if causal else S] = least
    bias[1, :, -1, S // 2 :] = 0
    # What is left of the products is nothing here, and all of them in float64.
    query = query.at[0, T // 3 : 2 * T // 3].set(0).at[1, : 30 if causal else T - 1].set(0)
    # Scales that vary from row to row, which 8-bit probabilities take in.
    value = value * jnp.exp2(jnp.arange(S) % 5 - 2).astype(value.dtype)[:, None, None]
    point = (query, key, value)
    if quantization:
        specs = PRESETS[quantization]
        point = tuple(
            jax_gluon.quantize(x, spec, implementation=implementation).dequantize(jnp.float32)
            for x, spec in zip(point, (specs.query, specs.key, specs.value), strict=True)
        )
    exact = _exact((*point, bias), keywords, d_out, np.zeros(d_out.shape[:-1]))

    def attention(*x):
        return jax_gluon.attention_with_log_sum_exp(
            *x, **keywords, implementation=implementation, quantization=quantization
        )

    results, pullback = jax.vjp(attention, query, key, value, jnp.asarray(bias))
    actual = (*results, *pullback((d_out, jnp.zeros_like(results[1]))))
    expected = (*exact[:5], exact[5].sum(1, keepdims=True))
    forward, backward = (1.3e-2, 2e-2) if dtype == "int4" else BARS[dtype]
    log_sum_exp_error = 2e-2 if dtype == "int4" else 1e-3
    np.testing.assert_allclose(actual[1], exact[1], atol=log_sum_exp_error, rtol=2e-6)
    for label, x, y in zip(
        ("out", "lse", "dq", "dk", "dv", "dbias"), actual, expected, strict=True
    ):
        if label != "lse":
            assert relative_error(x, y) <= (forward if label == "out" else backward), label
    # Row by row: where a row is wrong alone the norm of all may hide it.
    rows = np.linalg.norm(np.asarray(actual[0], np.float64) - exact[0], axis=-1)
    assert (rows <= 10 * forward * np.linalg.norm(exact[0], axis=-1).max()).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("T", "S"),
    [(20, 100), (2, 100), (20, 30), (4, 2)],
    ids=["blocks", "decode", "small", "two_keys"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_logit_of_minus_infinity_and_the_least_bias_hide(monkeypatch, variant, T, S, dtype):
    """The same bits as a bias of -inf gives, in results and gradients."""
    implementation = _use(monkeypatch, variant)
    operands, _, d_out, _ = _operands(dict(T=T, S=S, N=2, K=1), dtype)
    query, key, value = (jnp.abs(x) + jnp.asarray(0.1, dtype) for x in operands[:3])

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
    infinite = run(key.at[:, hidden, :, 3].set(-np.inf), query.at[:, 1, :, 5].set(-np.inf), bias)
    for x, y in zip(infinite, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("variant", [*plugin.cpu_isas_supported(), "metal"])
@pytest.mark.parametrize(
    ("quantization", "T", "S"),
    [(None, 40, 150), (None, 24, 30), ("int8", 40, 150)],
    ids=["float", "small", "int8"],
)
def test_what_is_hidden_never_leaks(monkeypatch, variant, quantization, T, S):
    """NaN, infinities and the largest numbers in hidden keys, values and biases change no bit."""
    implementation = _use(monkeypatch, variant)
    operands, keywords, d_out, _ = _operands(dict(T=T, S=S, is_causal=True), "float32")
    query, key, value, _ = operands
    mask = np.ones((2, 1, T, S), bool)
    mask[:, :, :, 17] = False
    lengths = np.array([20, 20], np.int32)
    bias = np.zeros((2, 4, T, S), np.float32)

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
    ("quantization", "T"), [(None, 90), (None, 24), ("int8", 90)], ids=["float", "small", "int8"]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_visible_value_that_is_not_finite_reaches_exactly_the_rows_that_see_it(
    monkeypatch, variant, quantization, T, bad
):
    implementation = _use(monkeypatch, variant)
    operands, keywords, *_ = _operands(dict(T=T, S=T, is_causal=True), "float32")
    query, key, value, _ = operands
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_operands_are_as_accurate_as_the_bars_say(relative_error, dtype):
    operands, _, d_out, d_log_sum_exp = _operands(CASES["odd"], dtype)
    exact = _exact(operands, {}, d_out, 0 * d_log_sum_exp)

    def errors(attention):
        out, pullback = jax.vjp(jax.jit(attention), *operands[:3])
        results = (out, *pullback(d_out))
        return [relative_error(x, y) for x, y in zip(results, (exact[0], *exact[2:5]), strict=True)]

    plain = errors(reference.dot_product_attention)
    kernel = errors(lambda *x: jax_gluon.dot_product_attention(*x, implementation="cpu"))
    forward, backward = BARS[dtype]
    assert kernel[0] <= 2 * plain[0] <= 1.2 * forward
    for error, bar in zip(kernel[1:], plain[1:], strict=True):
        assert error <= 3 * bar
    assert max(kernel[1:]) <= backward


def _best_and_others(best, others):
    """Every case for the best variant and for XLA, some for the other variants."""
    first, *rest = plugin.cpu_isas_supported()
    return [
        pytest.param(variant, *case, id="-".join(map(str, (variant, *case))))
        for variant in (first, *rest, "xla")
        for case in (best if variant in (first, "xla") else others)
    ]


@pytest.mark.parametrize(
    ("variant", "dtype", "H", "is_causal"),
    _best_and_others(
        [("bfloat16", 64, False), ("bfloat16", 128, True), ("float16", 64, True),
         ("float16", 128, False)],
        [("bfloat16", 64, True)],
    ),
)  # fmt: skip
def test_gradients_of_peaked_rows_are_as_accurate_as_those_of_jax_nn(
    monkeypatch, relative_error, variant, dtype, H, is_causal
):
    """An output of 16 bits takes no part in D: dS is a difference of nearly equal numbers there."""
    implementation = "xla" if variant == "xla" else _use(monkeypatch, variant)
    case = dict(T=65, S=65, N=3, K=3, H=H, V=H)
    (query, key, value, _), _, d_out, d_log_sum_exp = _operands(case, dtype)

    def gradients(attention, **more):
        def function(*x):
            return attention(*x, is_causal=is_causal, **more)

        return lambda *x: jax.vjp(function, *x)[1](d_out)

    ours = jax.jit(gradients(jax_gluon.dot_product_attention, implementation=implementation))
    # On the CPU jax.nn takes float16 outside of jit only.
    theirs = gradients(jax.nn.dot_product_attention)
    for gain in (1, 30, 100):
        operands = query * gain, key, value
        exact = _exact((*operands, None), {"is_causal": is_causal}, d_out, 0 * d_log_sum_exp)
        for x, y, expected in zip(ours(*operands), theirs(*operands), exact[2:5], strict=True):
            assert relative_error(x, expected) <= 1.3 * relative_error(y, expected), gain


@pytest.mark.parametrize(
    ("variant", "dtype", "quantization"),
    _best_and_others(
        [("bfloat16", None), ("float16", None), ("float32", "int8"), ("bfloat16", "int8"),
         ("float16", "int4")],
        [("bfloat16", None)],
    ),
)  # fmt: skip
def test_a_bias_that_is_equal_for_all_keys_has_no_gradient(
    monkeypatch, variant, dtype, quantization
):
    implementation = "xla" if variant == "xla" else _use(monkeypatch, variant)
    case = dict(T=65, S=211, N=3, K=3, H=64, V=64)
    (query, key, value, _), _, d_out, _ = _operands(case, dtype)

    def attention(bias):
        return jax_gluon.dot_product_attention(
            3 * query, key, value, bias, quantization=quantization, implementation=implementation
        )

    (d_bias,) = jax.vjp(attention, jnp.zeros((1, 3, 65, 1), dtype))[1](d_out)
    assert jnp.abs(d_bias).max() <= 2e-5


@pytest.mark.parametrize("is_causal", [False, True])
def test_parts_of_a_head_add_up(monkeypatch, relative_error, is_causal):
    """One kv head whose rows are split over tasks, each with sums over the keys that it sees."""
    case = dict(B=1, T=1100, S=900, N=2, K=1, H=16, V=24, local_window_size=(70, 40))
    operands, keywords, d_out, d_log_sum_exp = _operands(case | {"is_causal": is_causal}, "float32")
    exact = _exact(operands, keywords, d_out, 0 * d_log_sum_exp)

    def attention(*x):
        return jax_gluon.dot_product_attention(*x, **keywords, implementation="cpu")

    gradients = jax.vjp(attention, *operands[:3])[1](d_out)
    for gradient, expected in zip(gradients, exact[2:5], strict=True):
        assert relative_error(gradient, expected) <= BARS["float32"][1]


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", "sse9")
    query = jnp.ones((1, 2, 1, 4))
    # Jax raises either, by whether the call has run before.
    errors = (ValueError, jax.errors.JaxRuntimeError)
    with pytest.raises(errors, match="JAX_GLUON_CPU_ISA is 'sse9', expected"):
        jax_gluon.dot_product_attention(query, query, query, implementation="cpu")
