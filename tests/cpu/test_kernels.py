"""Every variant of the kernels, Metal's too, against float64, at sizes that reach every tail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import _lowering, reference
from jax_gluon._quantization.formats import PRESETS
from tests.support import cases
from tests.support import oracle as numpy_oracle
from tests.support.cases import BARS

plugin = pytest.importorskip("jax_gluon._plugin")

pytestmark = pytest.mark.usefixtures("poison")

GRADIENTS = ("dq", "dk", "dv", "dbias")
CASES = cases.RULES | cases.SHAPES
# Of variants that share all but what these reach: the emulated one is slow.
FEW = [
    "odd", "causal", "everything", "head_dim_1", "head_dim_257", "one_key", "bias_rows", "one",
    "mask_in_blocks_of_heads", "small_everything", "small_scattered", "stacked_everything",
]  # fmt: skip


def _dequantized(arrays, keywords):
    """The point that the kernels' INT8 codes stand for."""
    query, key, value, *bias = arrays
    B, S = key.shape[:2]
    specs = PRESETS["int8"]
    lengths = keywords.get("key_value_seq_lengths")
    seen = np.arange(S) < (np.full(B, S) if lengths is None else np.asarray(lengths))[:, None]
    seen = seen & (np.asarray(keywords.get("key_value_mask", True)) != 0)
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
    return (*exact, *bias)


def _is_met(variant, dtype, name):
    """Whether the case shows something that no other does."""
    if dtype == "int8" and (name == "one" or name.startswith("small")):
        return False  # only floats have a kernel of their own there
    if variant == "metal":
        # Its kernels take head dims to 256. Other types than float32 have parameters of the host of
        # their own; their rules are tested in tests/metal/shaders.
        return name != "head_dim_257" and (dtype == "float32" or name in FEW)
    if variant.startswith("emulated") or dtype == "float16":
        return name in FEW  # float16 is float32 but for conversions
    # Of bfloat16 the best variant may have products of its own.
    return dtype != "bfloat16" or variant == plugin.cpu_isas_supported()[0] or name in FEW


@functools.lru_cache(maxsize=2)
def _operands_and_exact(dtype, name):
    """Of the variants that follow one another: operands, and what they give in float64."""
    arrays, keywords, d_out, d_log_sum_exp = cases.operands(
        CASES[name], "float32" if dtype == "int8" else dtype
    )
    point = _dequantized(arrays, keywords) if dtype == "int8" else arrays
    exact = numpy_oracle.attention(*point, **keywords, d_out=d_out, d_log_sum_exp=d_log_sum_exp)
    # The -inf of an empty row takes no cotangent.
    d_log_sum_exp = np.where(np.isfinite(exact.log_sum_exp), d_log_sum_exp, np.float32(0))
    return arrays, keywords, (d_out, d_log_sum_exp), exact


def _parameters():
    for dtype in BARS:
        for name in CASES:
            for variant in (*plugin.cpu_isas_supported(), "metal"):
                if _is_met(variant, dtype, name):
                    yield pytest.param(variant, dtype, name, id=f"{variant}-{dtype}-{name}")


@functools.lru_cache(maxsize=8)
def _program(implementation, dtype, name, kernels):
    """What the variants that choose these kernels run: compiled once for all of them."""
    del kernels
    _, keywords, _, _ = _operands_and_exact(dtype, name)
    quantization = PRESETS.get(dtype)  # by its name it leaves few queries in float

    @jax.jit
    def attention(inputs, cotangents):
        def function(*x):
            return jax_gluon.attention_with_log_sum_exp(
                *x, **keywords, implementation=implementation, quantization=quantization
            )

        results, pullback = jax.vjp(function, *inputs)
        return *results, *pullback(cotangents)

    return attention


@pytest.mark.parametrize(("variant", "dtype", "name"), list(_parameters()))
def test_kernels_match_float64(use, relative_error, variant, dtype, name):
    implementation = use(variant)
    arrays, keywords, cotangents, exact = _operands_and_exact(dtype, name)
    quantization = PRESETS.get(dtype)  # by its name it leaves few queries in float
    plan = jax_gluon.explain(
        *arrays, **keywords, implementation=implementation, quantization=quantization
    )
    kernels = plan.forward, plan.backward, plan.backward_bias
    jax_gluon.debug.kernels()
    results = _program(implementation, dtype, name, kernels)(arrays, cotangents)
    out, log_sum_exp, *gradients = jax.block_until_ready(results)
    ran = jax_gluon.debug.kernels()
    assert {x["kernel"] for x in ran} == {x.name for x in kernels if x is not None}
    assert implementation == "metal" or {x["variant"] for x in ran} == {variant}
    forward, backward = BARS[dtype]
    # Where probabilities have 8 or 16 bits their exponentials are good to 7.5e-5.
    log_sum_exp_error = 2e-5 if dtype == "float32" else 2e-4
    np.testing.assert_allclose(log_sum_exp, exact.log_sum_exp, atol=log_sum_exp_error, rtol=2e-6)
    assert relative_error(out, exact.out) <= forward
    size = np.linalg.norm(exact.out)
    for label, x, y in zip(GRADIENTS, gradients, exact[2:], strict=False):
        # Where one key is all there is, dS is zero and only rounding is left of it.
        if np.linalg.norm(y) <= 1e-9 * size:
            assert np.linalg.norm(np.asarray(x, np.float64)) <= backward * size
        else:
            assert relative_error(x, y) <= backward, label


@pytest.mark.parametrize("pipeline", ["baseline", "gluon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
def test_dropout_is_that_of_the_published_mask(
    use, oracle, relative_error, variant, dtype, pipeline
):
    implementation = use(variant)
    quantization = PRESETS.get(dtype)  # by its name it leaves few queries in float
    case = dict(T=100, S=330, N=2, is_causal=True, query_offset=200)
    arrays, keywords, d_out, _ = cases.operands(case, "float32" if quantization else dtype)
    key, rate = jax.random.key(5), 0.3
    mask = jax_gluon.dropout_mask(key, (2, 2, 100, 330), rate)
    point = _dequantized(arrays, keywords) if quantization else arrays
    exact = oracle(*point, **keywords, kept=mask, dropout_rate=rate, d_out=d_out)

    def attention(*x):
        return jax_gluon.dot_product_attention(
            *x, **keywords, dropout_rate=rate, dropout_rng=key, implementation=implementation,
            quantization=quantization, kernel=pipeline,
        )  # fmt: skip

    out, pullback = jax.vjp(jax.jit(attention), *arrays)
    forward, backward = BARS[dtype]
    assert relative_error(out, exact.out) <= forward
    for x, y in zip(pullback(d_out), exact[2:5], strict=True):
        assert relative_error(x, y) <= backward


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_operands_are_as_accurate_as_the_bars_say(oracle, relative_error, dtype):
    arrays, _, d_out, _ = cases.operands(CASES["odd"], dtype)
    exact = oracle(*arrays, d_out=d_out)

    def errors(attention):
        out, pullback = jax.vjp(jax.jit(attention), *arrays)
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
    use, oracle, relative_error, variant, dtype, H, is_causal
):
    """An output of 16 bits takes no part in D: dS is a difference of nearly equal numbers there."""
    implementation = use(variant)
    case = dict(T=65, S=65, N=3, K=3, H=H, V=H)
    (query, key, value), _, d_out, _ = cases.operands(case, dtype)

    def gradients(attention, **more):
        def function(*x):
            return attention(*x, is_causal=is_causal, **more)

        return lambda *x: jax.vjp(function, *x)[1](d_out)

    ours = jax.jit(gradients(jax_gluon.dot_product_attention, implementation=implementation))
    # On the CPU jax.nn takes float16 outside of jit only.
    theirs = gradients(jax.nn.dot_product_attention)
    for gain in (1, 30, 100):
        arrays = query * gain, key, value
        exact = oracle(*arrays, is_causal=is_causal, d_out=d_out)
        for x, y, expected in zip(ours(*arrays), theirs(*arrays), exact[2:5], strict=True):
            assert relative_error(x, expected) <= 1.3 * relative_error(y, expected), gain


@pytest.mark.parametrize(
    ("variant", "dtype", "quantization"),
    _best_and_others(
        [("bfloat16", None), ("float16", None), ("float32", "int8"), ("bfloat16", "int8"),
         ("float16", "int4")],
        [("bfloat16", None)],
    ),
)  # fmt: skip
def test_a_bias_that_is_equal_for_all_keys_has_no_gradient(use, variant, dtype, quantization):
    implementation = use(variant)
    case = dict(T=65, S=211, N=3, K=3, H=64, V=64)
    (query, key, value), _, d_out, _ = cases.operands(case, dtype)

    def attention(bias):
        return jax_gluon.dot_product_attention(
            3 * query, key, value, bias, quantization=quantization, implementation=implementation
        )

    (d_bias,) = jax.vjp(attention, jnp.zeros((1, 3, 65, 1), dtype))[1](d_out)
    assert jnp.abs(d_bias).max() <= 2e-5


@pytest.mark.parametrize("quantization", ["int4"])
@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
def test_gradients_of_peaked_rows_of_codes(use, oracle, relative_error, variant, quantization):
    """Forward multiplies INT8 rows of the 4-bit key: its log-sum-exp is not that of backward."""
    implementation = use(variant)
    (query, key, value), _, d_out, _ = cases.operands(dict(T=65, S=211, N=3, K=3, H=64, V=64))
    bias = jnp.zeros((1, 3, 65, 211))
    specs = PRESETS[quantization]
    arrays = 6 * query, key, value

    def gradients(implementation, *x, **keywords):
        def attention(*x):
            return jax_gluon.dot_product_attention(
                *x, quantization=specs, implementation=implementation, **keywords
            )

        return jax.vjp(attention, *x)[1](d_out)

    point = [
        np.asarray(jax_gluon.quantize(x, spec).dequantize(), np.float64)
        for x, spec in zip(arrays, (specs.query, specs.key, specs.value), strict=True)
    ]
    exact = oracle(*point, bias, d_out=d_out)
    for x, expected in zip(gradients(implementation, *arrays), exact[2:5], strict=True):
        assert relative_error(x, expected) <= 0.01
    (d_bias,) = gradients(implementation, *arrays, bias)[3:]
    assert relative_error(d_bias, exact.d_bias) <= 0.01
    # Of what dropout keeps.
    dropout = dict(dropout_rate=0.3, dropout_rng=jax.random.key(5))
    for x, y in zip(
        gradients(implementation, *arrays, **dropout),
        gradients("xla", *arrays, **dropout),
        strict=True,
    ):
        assert relative_error(x, y) <= 0.01


@pytest.mark.parametrize("is_causal", [False, True])
def test_parts_of_a_head_add_up(oracle, relative_error, is_causal):
    """One kv head whose rows are split over tasks, each with sums over the keys that it sees."""
    case = dict(B=1, T=1100, S=900, N=2, K=1, H=16, V=24, local_window_size=(70, 40))
    arrays, keywords, d_out, _ = cases.operands(case | {"is_causal": is_causal})
    exact = oracle(*arrays, **keywords, d_out=d_out)

    def attention(*x):
        return jax_gluon.dot_product_attention(*x, **keywords, implementation="cpu")

    gradients = jax.vjp(attention, *arrays)[1](d_out)
    for gradient, expected in zip(gradients, exact[2:5], strict=True):
        assert relative_error(gradient, expected) <= BARS["float32"][1]


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", "sse9")
    query = jnp.ones((1, 2, 1, 4))
    # Jax raises either, by whether the call has run before.
    errors = (ValueError, jax.errors.JaxRuntimeError)
    with pytest.raises(errors, match="JAX_GLUON_CPU_ISA is 'sse9', expected"):
        jax_gluon.dot_product_attention(query, query, query, implementation="cpu")
