"""Attention sinks: a logit of each query head that is in the denominator of the softmax alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_gluon
from jax_gluon import AttentionQuantization, QuantSpec, reference
from tests.support import oracle as numpy_oracle
from tests.support.arrays import placed

N = 4
#: About as large as the logits, smaller, larger, and none.
SINKS = np.array([1.5, -9.0, 6.0, -np.inf], np.float32)
#: Of what the gradient of the sinks is made: the output, which 8-bit probabilities round.
BARS = {"float32": (2e-6, 4e-6, 2e-5), "bfloat16": (7e-3, 1e-2, 1e-2),
        "float16": (8e-4, 1.2e-3, 2e-3), "codes": (1e-2, 1.2e-2, 3e-2)}  # fmt: skip
#: Zero points and centers of keys and values: what kernels add at the end is the keys' part alone.
CENTERED = AttentionQuantization(
    query=QuantSpec(),
    key=QuantSpec(symmetric=False, center=True),
    value=QuantSpec(symmetric=False, center=True),
)
FORMATS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None),
           "float16": ("float16", None), "int8": ("float32", "int8"), "int4": ("float32", "int4"),
           "centered": ("float32", CENTERED), "bfloat16_int8": ("bfloat16", "int8")}  # fmt: skip


def draw(B, T, S, H=22, V=26, dtype="float32"):
    rng = np.random.default_rng(T + S)
    shapes = (B, T, N, H), (B, S, 2, H), (B, S, 2, V), (B, T, N, V)
    q, k, v, d_out = (rng.standard_normal(x, np.float32).astype(dtype) for x in shapes)
    # Off center, so that what centering takes away matters.
    one = np.asarray(1, dtype)
    d_log_sum_exp = rng.standard_normal((B, T, N), np.float32)
    return tuple(map(placed, (q, k + one, v + one, d_out))), placed(d_log_sum_exp)


def rules(T, S):
    """Every rule, rows that see no key by lengths and by the mask, and a bias."""
    rng = np.random.default_rng(T)
    mask = rng.random((2, N, T, S)) < 0.6
    mask[1, :, T // 2] = False
    return dict(
        is_causal=T == S, local_window_size=(S - 1, 9), logits_soft_cap=3.0, mask=mask,
        query_seq_lengths=np.array([T, T - 1], np.int32),
        key_value_seq_lengths=np.array([0, S - 1], np.int32),
        bias=rng.standard_normal((1, N, T, S), np.float32),
    )  # fmt: skip


def gradients(attention, sinks, q, k, v, bias, cotangents):
    """Output, log-sum-exp, and the gradients of query, key, value, sinks and bias."""

    @jax.jit
    def run(arrays, cotangents):
        def function(sinks, q, k, v, *bias):
            return attention(q, k, v, *bias, sinks=sinks)

        results, pullback = jax.vjp(function, *arrays)
        d_sinks, *others = pullback(cotangents)
        return *results, *others[:3], d_sinks, *others[3:]

    arrays = (jnp.asarray(sinks), q, k, v, *(() if bias is None else (bias,)))
    return run(arrays, cotangents)


@functools.lru_cache(maxsize=8)
def of_reference(form, shape, with_rules):
    """What codes give on all kernels: the reference at the dequantized operands, in float32."""
    dtype, quantization = FORMATS[form]
    (q, k, v, d_out), d_lse = draw(2, *shape, dtype=dtype)
    keywords = rules(*shape) if with_rules else {}
    bias = keywords.pop("bias", None)
    attend = functools.partial(
        reference.attention_with_log_sum_exp, **keywords, quantization=quantization
    )
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    exact = numpy_oracle.attention(q, k, v, bias, **keywords, sinks=SINKS)
    d_lse = jnp.where(np.isfinite(exact.log_sum_exp), d_lse, 0)
    return gradients(attend, SINKS, *wide, bias, (d_out.astype(jnp.float32), d_lse))


def check(
    oracle, relative_error, implementation, kernel, form, shape, with_rules, sinks=SINKS, loose=1
):  # fmt: skip
    dtype, quantization = FORMATS[form]
    (q, k, v, d_out), d_lse = draw(2, *shape, dtype=dtype)
    keywords = rules(*shape) if with_rules else {}
    bias = keywords.pop("bias", None)
    # A row without any term has a log-sum-exp of -inf.
    exact = oracle(q, k, v, bias, **keywords, sinks=sinks)
    d_lse = jnp.where(np.isfinite(exact.log_sum_exp), d_lse, 0)
    cotangents = (d_out, d_lse)
    attend = functools.partial(
        jax_gluon.attention_with_log_sum_exp, **keywords, quantization=quantization,
        implementation=implementation, kernel=kernel,
    )  # fmt: skip
    actual = gradients(attend, sinks, q, k, v, bias, cotangents)
    if quantization is None:
        exact = oracle(q, k, v, bias, **keywords, sinks=sinks, d_out=d_out, d_log_sum_exp=d_lse)
        expected = (*exact[:5], exact.d_sinks, *(() if bias is None else (exact.d_bias,)))
    else:
        expected = of_reference(form, shape, with_rules)
    forward, backward, of_sinks = (loose * x for x in BARS["codes" if quantization else dtype])
    # Each head by itself: the larger its sink is, the smaller the rest.
    for n in range(N):
        assert relative_error(actual[0][:, :, n], expected[0][:, :, n]) <= forward, n
        assert relative_error(actual[2][:, :, n], expected[2][:, :, n]) <= backward, n
    # INT4 keys are rounded once more, to INT8.
    error = 1e-2 if quantization else 2e-5 if dtype == "float32" else 2e-4
    np.testing.assert_allclose(actual[1], expected[1], atol=error, rtol=1e-6)
    for label, x, y in zip(("dk", "dv"), actual[3:5], expected[3:5], strict=True):
        for k in range(2):
            assert relative_error(x[:, :, k], y[:, :, k]) <= backward, (label, k)
    assert relative_error(actual[5], expected[5]) <= of_sinks
    assert actual[5][3] == 0
    if bias is not None:
        assert relative_error(actual[6], expected[6]) <= backward


SHAPES = {None: (37, 291), "baseline": (37, 291), "gluon": (37, 291), "decode": (3, 301),
          "small": (49, 50), "one_key": (5, 1)}  # fmt: skip
CODES = ("int8", "int4", "centered", "bfloat16_int8")
KERNELS = [
    *(("cpu", "gluon", form) for form in FORMATS),
    *(("cpu", kernel, form) for kernel in ("baseline", "decode") for form in ("float32", "int8")),
    *(("cpu", "small", form) for form in FORMATS if form not in CODES),
    ("cpu", "one_key", "float32"),
    *(("metal", kernel, form) for kernel in ("baseline", "gluon", "decode")
      for form in ("bfloat16", "centered")),
    *(("xla", None, form) for form in ("float32", "int8")),
]  # fmt: skip


@pytest.mark.parametrize(("implementation", "kernel", "form"), KERNELS)
def test_kernels_match_float64(
    monkeypatch, require, oracle, relative_error, implementation, kernel, form
):
    require(implementation)
    monkeypatch.setenv("JAX_GLUON_POISON", "1")
    name = {"one_key": "small", "decode": ("decode", None)}.get(kernel, kernel)
    run = functools.partial(check, oracle, relative_error, implementation, name, form)
    run(SHAPES[kernel], with_rules=True)
    if (implementation, form) in (("cpu", "float32"), ("cpu", "int8"), ("cpu", "centered")):
        run(SHAPES[kernel], with_rules=False)


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("variant", ["portable", "emulated_avx512"])
def test_other_instruction_sets(monkeypatch, oracle, relative_error, variant, form):
    plugin = pytest.importorskip("jax_gluon._plugin")
    if variant not in plugin.cpu_isas_supported():
        pytest.skip(f"built without {variant}")
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    check(oracle, relative_error, "cpu", "baseline", form, (21, 70), with_rules=True)


def test_sinks_far_above_and_below_the_logits(implementation, oracle, relative_error):
    # The last bit of a number of 70 is a part of 4e-6 of its exponential.
    sinks = np.array([70.0, -70.0, 30.0, -np.inf], np.float32)
    check(
        oracle, relative_error, implementation, None, "float32", (21, 70), with_rules=True,
        sinks=sinks, loose=4,
    )  # fmt: skip


def test_the_reference_matches_the_oracle(configure, oracle):
    with configure(jax_enable_x64=True):
        (q, k, v, d_out), d_lse = draw(2, 13, 13, dtype="float64")
        keywords = rules(13, 13)
        bias = keywords.pop("bias").astype(np.float64)
        d_lse = d_lse.at[:, :, 3].set(0).astype(jnp.float64)
        attend = functools.partial(reference.attention_with_log_sum_exp, **keywords)
        actual = gradients(attend, SINKS.astype(float), q, k, v, bias, (d_out, d_lse))
        exact = oracle(q, k, v, bias, **keywords, sinks=SINKS, d_out=d_out, d_log_sum_exp=d_lse)
        for x, y in zip(actual, (*exact[:5], exact.d_sinks, exact.d_bias), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_gradients_are_finite_differences_in_float64(configure):
    with configure(jax_enable_x64=True):
        (q, k, v, d_out), d_lse = draw(1, 5, 7, 4, 3, dtype="float64")
        sinks = jnp.array([0.3, -2.0, 2.0, 0.0])

        def loss(sinks, q):
            out, lse = jax_gluon.attention_with_log_sum_exp(q, k, v, sinks=sinks, is_causal=True)
            return jnp.sum(out * d_out) + jnp.sum(lse * d_lse)

        check_grads(jax.jit(loss), (sinks, q), order=1, modes=["rev"], atol=1e-7)


def test_minus_infinity_is_no_sink(implementation):
    (q, k, v, d_out), d_lse = draw(2, 21, 70)
    attend = functools.partial(jax_gluon.attention_with_log_sum_exp, implementation=implementation)
    none = np.full(N, -np.inf, np.float32)
    actual = gradients(attend, none, q, k, v, None, (d_out, d_lse))
    results, pullback = jax.vjp(jax.jit(attend), q, k, v)
    for x, y in zip(actual, (*results, *pullback((d_out, d_lse)), np.zeros(N)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_rows_without_keys(implementation):
    """Their log-sum-exp is the sink, and its cotangent all that the sink gets of them."""
    (q, k, v, d_out), d_lse = draw(2, 5, 7)
    d_lse = d_lse.at[:, :, 3].set(0)
    q, d_out = (x.at[0].set(jnp.nan) for x in (q, d_out))

    def attend(sinks, q, k, v, lengths=(0, 7)):
        return jax_gluon.attention_with_log_sum_exp(
            q, k, v, sinks=sinks, key_value_seq_lengths=lengths, implementation=implementation
        )

    (out, lse), pullback = jax.vjp(attend, jnp.asarray(SINKS), q, k, v)
    d_sinks, *others = pullback((d_out, d_lse))
    (_, _), pullback = jax.vjp(
        functools.partial(attend, lengths=(7,)), jnp.asarray(SINKS), q[1:], k[1:], v[1:]
    )
    seen, *others_seen = pullback((d_out[1:], d_lse[1:]))
    assert not out[0].any()
    np.testing.assert_array_equal(lse[0], np.broadcast_to(SINKS, (5, N)))
    np.testing.assert_allclose(d_sinks, seen + d_lse[0].sum(0), rtol=1e-5, atol=1e-6)
    for x, y in zip(others, others_seen, strict=True):
        assert not x[0].any()
        np.testing.assert_allclose(x[1:], y, rtol=1e-5, atol=1e-6)
    # No keys at all.
    empty = jnp.zeros((2, 0, 2, 4))
    out, residual = jax_gluon.dot_product_attention(
        jnp.ones((2, 3, N, 4)), empty, empty, sinks=SINKS, implementation=implementation,
        return_residual=True,
    )  # fmt: skip
    assert not out.any()
    np.testing.assert_array_equal(residual, np.broadcast_to(SINKS, (2, 3, N)))


@pytest.mark.parametrize("sink", [np.nan, np.inf])
def test_sinks_that_are_not_finite_spoil_their_head_alone(implementation, sink):
    (q, k, v, d_out), _ = draw(1, 5, 37)
    sinks = jnp.array([0.5, sink, 0.0, 1.0])

    def attend(q, k, v, sinks):
        return jax_gluon.dot_product_attention(q, k, v, sinks=sinks, implementation=implementation)

    out, pullback = jax.vjp(attend, q, k, v, sinks)
    expected = attend(q, k, v, jnp.zeros(N).at[:].set(sinks.at[1].set(0)))
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(out[:, :, others], expected[:, :, others])
    assert np.isnan(out[:, :, 1]).all() if np.isnan(sink) else not out[:, :, 1].any()
    d_query, _, _, d_sinks = pullback(d_out)
    assert np.isfinite(d_query[:, :, others]).all()
    assert np.isfinite(d_sinks[others]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_sinks(dtype):
    (q, k, v, _), _ = draw(1, 5, 7)
    sinks = jnp.asarray(SINKS, dtype)

    def attend(sinks):
        return jax_gluon.dot_product_attention(q, k, v, sinks=sinks, implementation="cpu")

    out, pullback = jax.vjp(attend, sinks)
    np.testing.assert_array_equal(out, attend(sinks.astype(jnp.float32)))
    assert pullback(out)[0].dtype == dtype


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_a_shift_of_all_logits_and_sinks_changes_nothing(implementation, form):
    """So the gradients of the two add up to nothing, also where values have much in common."""
    dtype, quantization = FORMATS[form]
    (q, k, v, d_out), _ = draw(2, 37, 291, dtype=dtype)
    v += jnp.asarray(5, dtype)

    def attend(bias, sinks):
        return jax_gluon.dot_product_attention(
            q, k, v, bias, sinks=sinks, quantization=quantization, implementation=implementation
        )

    sinks = jnp.array([4.0, 0.0, -3.0, 8.0])
    _, pullback = jax.vjp(jax.jit(attend), jnp.zeros((1, N, 1, 1)), sinks)
    d_bias, d_sinks = pullback(d_out)
    assert np.linalg.norm(d_bias.ravel() + d_sinks) <= BARS["codes" if quantization else dtype][
        2
    ] * np.linalg.norm(d_sinks)


def test_explain_names_the_kernels_that_there_are_without_sinks():
    x = jax.ShapeDtypeStruct((1, 4, N, 8), jnp.float32)
    sinks = jax.ShapeDtypeStruct((N,), jnp.bfloat16)
    assert jax_gluon.explain(x, x, x, sinks=sinks) == jax_gluon.explain(x, x, x)


def test_transformations(implementation):
    """Rank 3, jit, scan over layers and checkpoint."""
    (q, k, v, d_out), _ = draw(1, 5, 7, 8, 8)
    sinks = jnp.stack([jnp.zeros(N), jnp.linspace(-1, 1, N)])
    attend = functools.partial(jax_gluon.dot_product_attention, implementation=implementation)

    def plain(sinks):
        x = q[0]
        for i in range(2):
            x = attend(x, k[0], v[0], sinks=sinks[i])
        return jnp.sum(x * d_out[0])

    policy = jax.checkpoint_policies.save_only_these_names(*jax_gluon.CHECKPOINT_NAMES)

    def scanned(sinks):
        step = jax.checkpoint(lambda x, s: (attend(x, k, v, sinks=s), None), policy=policy)
        return jnp.sum(jax.lax.scan(step, q, sinks)[0] * d_out)

    actual, expected = (jax.jit(jax.value_and_grad(f))(sinks) for f in (scanned, plain))
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(jax.lax, "pcast"), reason="this JAX has no such meshes")
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("kind", ["shard_map", "explicit"])
def test_meshes(kind, implementation, require):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    require(implementation)
    (q, k, v, d_out), _ = draw(2, 5, 7, 8, 8)

    def loss(sinks, q, k, v):
        out = jax_gluon.dot_product_attention(q, k, v, sinks=sinks, implementation=implementation)
        return jnp.sum(out * d_out)

    expected = jax.grad(loss)(jnp.asarray(SINKS), q, k, v)
    axis_type = AxisType.Auto if kind == "shard_map" else AxisType.Explicit
    mesh = jax.make_mesh((1,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:1])
    if kind == "shard_map":

        def summed(*operands):
            return jax.lax.psum(loss(*operands), "x")

        spec = (P(), P("x"), P("x"), P("x"))
        function = jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=P())
        actual = jax.jit(jax.grad(function))(jnp.asarray(SINKS), q, k, v)
    else:
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
        d_out = put(d_out)
        actual = jax.jit(jax.grad(loss))(*map(put, (jnp.asarray(SINKS), q, k, v)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_block_like_gpt_oss(implementation, relative_error):
    """8 query heads for each kv head, H 64, a window of 128 in every other layer."""
    T, heads, kv_heads, H = 150, 16, 2, 64
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, T, heads * H), np.float32))
    sinks = jnp.asarray(rng.standard_normal((2, heads), np.float32))

    def block(attention, x, sinks):
        for i, window in enumerate((127, None)):
            heads_of_x = x.reshape(1, T, heads, H)
            key, value = heads_of_x[:, :, :kv_heads], heads_of_x[:, :, -kv_heads:]
            x += attention(heads_of_x, key, value, sinks[i], window).reshape(x.shape)
        return x

    def ours(q, k, v, sinks, window):
        return jax_gluon.dot_product_attention(
            q, k, v, is_causal=True, sinks=sinks, implementation=implementation,
            local_window_size=None if window is None else (window, 0),
        )  # fmt: skip

    def plain(q, k, v, sinks, window):
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / np.sqrt(H)
        distance = np.arange(T)[:, None] - np.arange(T)[None, :]
        seen = (distance >= 0) & (distance <= (T if window is None else window))
        logits = jnp.where(seen, logits, -jnp.inf)
        sink = jnp.broadcast_to(sinks[None, :, None, None], (1, heads, T, 1))
        p = jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", p[..., :-1], v, precision="highest")

    cotangent = jnp.asarray(rng.standard_normal(x.shape, np.float32))
    results = []
    for attention in (ours, plain):
        out, pullback = jax.vjp(jax.jit(functools.partial(block, attention)), x, sinks)
        results.append((out, *pullback(cotangent)))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_a_cache_decodes_as_full_attention(implementation, window, relative_error, require):
    require(implementation)
    T = 90
    (q, k, v, _), _ = draw(2, T, T, 16, 16)
    cache = jax_gluon.QuantizedKVCache.create(2, 64 if window else 96, 2, 16, window=window)
    keywords = dict(sinks=SINKS, implementation=implementation)
    expected = jax_gluon.dot_product_attention(
        q, k, v, is_causal=True, quantization="int8", **keywords,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    for t in range(0, T, 15):
        cache = cache.append(k[:, t : t + 15], v[:, t : t + 15])
    actual = jax.jit(lambda cache, q: cache.attention(q, **keywords))(cache, q[:, -3:])
    assert relative_error(actual, expected[:, -3:]) <= 1e-2
    without = cache.attention(q[:, -3:], implementation=implementation)
    assert relative_error(without[:, :, :3], expected[:, -3:, :3]) > 0.1
