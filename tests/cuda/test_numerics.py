"""Every rule on an NVIDIA GPU, by what is chosen there, against the float64 oracle.

`python -m pytest --noconftest tests/cuda` on a machine that has one; elsewhere it is skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._cuda import mosaic, quantizer
from jax_gluon._quantization.formats import PRESETS
from tests.support import oracle
from tests.support.cases import BARS, CASES, operands

if jax.default_backend() != "gpu":
    pytest.skip("JAX finds no GPU", allow_module_level=True)

RNG = np.random.default_rng(7)


def _bias(*shape):
    bias = RNG.standard_normal(shape, np.float32)
    bias[..., 3:9, :] = -np.inf  # rows that see no key
    bias[..., 5] = -np.inf
    return np.asarray(bias, jnp.bfloat16)


# What cuDNN takes in forms of its own.
FORMS = {
    "wide_causal": dict(T=256, S=256, H=128, V=128, is_causal=True),
    "odd_rows": dict(T=77, S=131, H=64, V=64, is_causal=True),
    "window_of_lengths": dict(
        T=140, S=140, is_causal=True, local_window_size=(31, 0),
        key_value_seq_lengths=np.array([140, 3], np.int32),
    ),
    "wide_192": dict(T=70, S=70, H=192, V=192),
    "wide_256": dict(T=70, S=70, H=256, V=256, is_causal=True),
    "odd_lengths": dict(
        T=77, S=131, H=64, V=64, is_causal=True,
        query_seq_lengths=np.array([77, 40], np.int32),
        key_value_seq_lengths=np.array([30, 131], np.int32),
    ),
    "left_window_S_more": dict(T=90, S=210, local_window_size=(20, 0)),
    "both_lengths": dict(
        T=120, S=200, is_causal=True, query_seq_lengths=np.array([100, 64], np.int32),
        key_value_seq_lengths=np.array([150, 0], np.int32),
    ),
    "bias_16": dict(T=100, S=300, bias=_bias(2, 4, 100, 300)),
    "bias_16_heads": dict(T=100, S=300, bias=_bias(1, 4, 100, 300), is_causal=True),
    "bias_16_batch": dict(T=100, S=300, bias=_bias(2, 1, 100, 300)),
    "gqa_1": dict(T=130, S=130, N=8, K=1, H=128, V=128),
    "decode": dict(T=1, S=700, N=8, K=2, H=128, V=128),
}  # fmt: skip
XLA = ("everything", "packed", "mask_in_blocks", "holes", "sinks", "head_dim_257")


def relative(actual, exact):
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), 1e-30)


def _names():
    for name, case in (CASES | FORMS).items():
        given = operands(case, "bfloat16")
        takes = jax_gluon.explain(*given.arrays, **given.keywords).implementation == "cudnn"
        assert takes or name not in FORMS, name
        if takes or name in XLA:
            yield name


@pytest.mark.parametrize("hides_nan", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", list(_names()))
def test_rule(name, quantization, hides_nan):
    case = (CASES | FORMS)[name]
    arrays, keywords, d_out, _ = operands(case, "bfloat16")
    lengths = keywords.get("key_value_seq_lengths")
    if hides_nan:
        if lengths is None or quantization:
            pytest.skip("no tokens are padding")
        hidden = np.arange(case["S"]) >= np.asarray(lengths)[:, None]
        exact_arrays = list(arrays)
        arrays = (
            arrays[0],
            *(jnp.where(hidden[..., None, None], jnp.nan, x) for x in arrays[1:3]),
            *arrays[3:],
        )
    else:
        exact_arrays = list(arrays)
    rules = dict(keywords)
    if quantization:
        if name in XLA:
            pytest.skip("the XLA implementation's codes are tested on the CPU")
        exact_arrays[:3] = _dequantized(arrays, keywords, case)
        # By its name a preset leaves few queries in float.
        keywords["quantization"] = PRESETS[quantization]

    @jax.jit
    def run(arrays, d_out):
        def attention(*arrays):
            return jax_gluon.dot_product_attention(*arrays, **keywords)

        out, pullback = jax.vjp(attention, *arrays)
        return out, *pullback(d_out)

    out, *gradients = run(arrays, d_out)
    exact = oracle.attention(
        *(np.asarray(x, np.float64) for x in exact_arrays), d_out=d_out, **rules
    )
    forward, backward = BARS["int8" if quantization else "bfloat16"]
    wanted = exact.out, *exact[2 : 2 + len(arrays)]
    errors = [relative(x, y) for x, y in zip((out, *gradients), wanted, strict=True)]
    print(name, quantization, hides_nan, " ".join(f"{x:.1e}" for x in errors))
    assert errors[0] <= forward
    # Of one key the gradients of query and key are 0: cuDNN's are what rounding leaves.
    assert max(errors[3:] if case["S"] == 1 else errors[1:]) <= backward
    with_sum = jax.jit(functools.partial(jax_gluon.attention_with_log_sum_exp, **keywords))
    log_sum_exp = np.asarray(with_sum(*arrays)[1], np.float64)
    seen = np.isfinite(exact.log_sum_exp)
    assert np.array_equal(seen, np.isfinite(log_sum_exp))
    # cuDNN's codes are of 16 bits.
    np.testing.assert_allclose(
        log_sum_exp[seen], exact.log_sum_exp[seen], rtol=0, atol=1.5e-2 if quantization else 2e-3
    )


ROWS, CENTERED = jax_gluon.QuantSpec(), jax_gluon.QuantSpec(center=True)
BLOCKS = jax_gluon.QuantSpec(granularity="block", block_size=128, center=True)
# Of the kernel that multiplies codes: rows and keys around its 64, 128 and 192, one chunk and many.
CODES = {
    "whole": (dict(T=384, S=512), ROWS, BLOCKS, "bfloat16"),
    "whole_rows": (dict(T=200, S=384, K=4), ROWS, CENTERED, "bfloat16"),
    "whole_float16": (dict(T=64, S=128, K=1), ROWS, CENTERED, "float16"),
    "odd": (dict(T=77, S=131, K=1), ROWS, ROWS, "bfloat16"),
    "odd_blocks": (dict(T=333, S=1001), ROWS, BLOCKS, "bfloat16"),
    "causal": (dict(T=640, S=640, is_causal=True), ROWS, CENTERED, "bfloat16"),
    "causal_blocks": (dict(T=450, S=450, K=4, is_causal=True), ROWS, BLOCKS, "bfloat16"),
    "causal_T_over_S": (dict(T=400, S=270, is_causal=True), ROWS, BLOCKS, "bfloat16"),
    "causal_S_over_T": (dict(T=150, S=600, is_causal=True), ROWS, CENTERED, "bfloat16"),
    "one_key": (dict(T=70, S=1), ROWS, ROWS, "bfloat16"),
    "two_blocks_a_scale": (
        dict(T=100, S=700), ROWS,
        jax_gluon.QuantSpec(granularity="block", block_size=256), "bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CODES)
def test_products_of_codes(name):
    """Forward, log-sum-exp and gradients, against the oracle at the dequantized point."""
    sizes, query_spec, key_spec, dtype = CODES[name]
    case = dict(H=128, V=128) | sizes
    arrays, keywords, d_out, _ = operands(case, dtype)
    arrays = (arrays[0], arrays[1] + jnp.asarray(0.5, arrays[1].dtype), arrays[2])
    quantization = jax_gluon.AttentionQuantization(query_spec, key_spec)
    keywords |= dict(quantization=quantization, implementation="pallas")

    @jax.jit
    def run(arrays, d_out):
        attention = functools.partial(jax_gluon.dot_product_attention, **keywords)
        out, pullback = jax.vjp(attention, *arrays)
        # The residual of `dot_product_attention` is of 16 bits.
        _, log_sum_exp = jax_gluon.attention_with_log_sum_exp(*arrays, **keywords)
        return out, log_sum_exp, *pullback(d_out)

    out, log_sum_exp, *gradients = run(arrays, d_out)
    # Of the same codes: of an element half way between two, XLA may take the other.
    query, key = (
        jax.jit(lambda x, spec=spec: quantizer.quantize(x, spec, None).dequantize(jnp.float32))(x)
        for x, spec in ((arrays[0], query_spec), (arrays[1], key_spec))
    )
    exact = oracle.attention(
        *(np.asarray(x, np.float64) for x in (query, key, arrays[2])),
        d_out=d_out, is_causal=case.get("is_causal", False),
    )  # fmt: skip
    errors = [
        relative(x, y) for x, y in zip((out, *gradients), exact[:1] + exact[2:5], strict=True)
    ]
    print(name, " ".join(f"{x:.1e}" for x in errors))
    # P of 16 bits.
    assert errors[0] <= 3e-3
    assert max(errors[3:] if case["S"] == 1 else errors[1:]) <= BARS["int8"][1]
    np.testing.assert_allclose(log_sum_exp, exact.log_sum_exp, rtol=0, atol=2e-3)


def test_many_tokens_take_the_products_of_codes():
    """What None takes is what "pallas" takes; JAX maps it over an axis, and it gives the same."""
    if (why := mosaic.missing()) is not None:
        pytest.skip(why)
    shape = (2, 1, 4100, 2, 128)
    arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4)]

    @functools.partial(jax.jit, static_argnames=("mapped", "implementation"))
    def run(*arrays, mapped, implementation):
        def both(q, k, v, d_out):
            attend = functools.partial(
                jax_gluon.dot_product_attention,
                quantization="int8", is_causal=True, implementation=implementation,
            )  # fmt: skip
            out, pullback = jax.vjp(attend, q, k, v)
            return out, *pullback(d_out)

        return jax.vmap(both)(*arrays) if mapped else both(*arrays)

    chosen = run(*arrays, mapped=True, implementation=None)
    program = run.lower(*arrays, mapped=True, implementation=None).as_text()
    assert "mosaic_gpu" in program
    for i in range(2):
        named = run(*(x[i] for x in arrays), mapped=False, implementation="pallas")
        for x, y in zip(chosen, named, strict=True):
            assert relative(x[i], y) <= 1e-3


@pytest.mark.parametrize("spec", [ROWS, CENTERED, BLOCKS])
@pytest.mark.parametrize("T", [1, 20, 300])
def test_quantizer(spec, T):
    """Codes and scales of XLA's; what is not finite becomes NaN, and nothing else does."""
    x = jax.random.normal(jax.random.key(T), (2, T, 3, 128), jnp.bfloat16) * 7
    x = x.at[1, 0, 1, 5].set(jnp.nan).at[0, T // 2, 2, 9].set(-jnp.inf).at[0, T - 1, 0].set(0)
    found = jax.jit(lambda x: quantizer.quantize(x, spec, None))(x)
    exact = jax_gluon.quantize(x, spec, implementation="xla")
    scales = (np.asarray(x.scale, np.float32) for x in (found, exact))
    np.testing.assert_array_equal(*scales)
    difference = np.abs(np.asarray(found.data, np.int32) - np.asarray(exact.data, np.int32))
    assert difference.max() <= 1  # of elements half way between two codes
    assert np.mean(difference > 0) < 2e-3
    if spec.center:
        np.testing.assert_array_equal(found.center, exact.center)


def _dequantized(arrays, keywords, case):
    preset = PRESETS["int8"]
    lengths = keywords.get("query_seq_lengths"), *(keywords.get("key_value_seq_lengths"),) * 2
    return [
        jax_gluon.quantize(x, spec, lengths=length, implementation="xla").dequantize(jnp.float32)
        for x, spec, length in zip(
            arrays, (preset.query, preset.key, preset.value), lengths, strict=False
        )
    ]


def test_gradient_of_the_log_sum_exp():
    case = FORMS["wide_causal"]
    arrays, keywords, d_out, d_log_sum_exp = operands(case, "bfloat16")

    def loss(*arrays):
        out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(*arrays, **keywords)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(log_sum_exp * d_log_sum_exp)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    exact = oracle.attention(
        *(np.asarray(x, np.float64) for x in arrays),
        d_out=d_out, d_log_sum_exp=d_log_sum_exp, **keywords,
    )  # fmt: skip
    for x, y in zip(gradients, exact[2:5], strict=True):
        assert relative(x, y) <= BARS["bfloat16"][1]


def test_vmap_and_checkpoint():
    arrays, keywords, *_ = operands(FORMS["odd_rows"], "bfloat16")

    def loss(*arrays):
        attend = jax.checkpoint(lambda *x: jax_gluon.dot_product_attention(*x, **keywords))
        return jnp.sum(attend(*arrays).astype(jnp.float32) ** 2)

    whole = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*(x[:, None] for x in arrays))
    for x, y in zip(whole, mapped, strict=True):
        assert relative(y[:, 0], x) <= 1e-2
