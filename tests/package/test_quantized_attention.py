"""Attention on codes of every format: against float64 attention of what the codes stand for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._quantization.formats import (
    GRANULARITIES,
    PRESETS,
    AttentionQuantization,
    QuantSpec,
    preset,
)
from tests.support import quantizer

WAYS = {
    "symmetric": dict(symmetric=True),
    "zero_point": dict(symmetric=False),
    "minimum": dict(symmetric=False, float_minimum=True),
}
FORMATS = {
    f"int{bits}-{granularity}-{way}": QuantSpec(
        bits, granularity=granularity, block_size=12, **WAYS[way]
    )
    for bits, granularity, way in itertools.product((8, 4), GRANULARITIES, WAYS)
}
OPERANDS = ("query", "key", "value")
SHAPE = dict(B=2, T=37, S=130, N=4, K=2, H=28, V=22)


def specs_of(specs):
    return [getattr(preset(specs), name) for name in OPERANDS]


def bounds(specs):
    """Of forward and gradients, relative L2: section 5 of the design."""
    named = specs_of(specs)
    in_float = any(spec is None or (spec.bits == 8 and spec.head_block) for spec in named)
    if in_float or named[0].center:
        return 1e-5, 1e-4
    rounded_again = any(spec.head_block for spec in named)
    return (1.3e-2 if rounded_again else 8e-3), 1e-2


def check(
    specs,
    oracle,
    relative_error,
    draw,
    seen_lengths,
    *,
    bias=None,
    implementation="cpu",
    **keywords,
):
    q, k, v, d_out = draw(**SHAPE)
    limits = (1e-5, 1e-4) if implementation == "xla" else bounds(specs)
    B, T, S = (SHAPE[axis] for axis in "BTS")
    rows, keys = seen_lengths(B, T, S, **keywords)

    def attention(q, k, v, bias):
        return jax_gluon.attention_with_log_sum_exp(
            q, k, v, bias, quantization=specs, implementation=implementation, **keywords
        )

    @jax.jit
    def results(*arrays):
        (out, log_sum_exp), pullback = jax.vjp(attention, *arrays)
        codes = [
            x if spec is None
            else jax_gluon.quantize(x, spec, lengths=lengths, implementation=implementation)
            for x, spec, lengths in zip(
                arrays[:3], specs_of(specs), (rows, keys, keys), strict=True
            )
        ]  # fmt: skip
        return out, log_sum_exp, pullback((d_out, jnp.zeros_like(log_sum_exp))), codes

    out, log_sum_exp, (d_query, d_key, d_value, d_bias), codes = results(q, k, v, bias)
    exact = map(quantizer.values, codes)
    expected = oracle(*exact, bias, **keywords, d_out=d_out)
    assert relative_error(out, expected.out) <= limits[0]
    seen = np.isfinite(expected.log_sum_exp)
    np.testing.assert_array_equal(np.isfinite(log_sum_exp), seen)
    np.testing.assert_allclose(
        np.asarray(log_sum_exp)[seen], expected.log_sum_exp[seen], atol=20 * limits[0], rtol=0
    )
    for name, gradient in zip(
        ("d_query", "d_key", "d_value"), (d_query, d_key, d_value), strict=True
    ):
        assert relative_error(gradient, getattr(expected, name)) <= limits[1], name
    if bias is not None:
        assert relative_error(d_bias, expected.d_bias) <= 2 * limits[1]


@pytest.mark.parametrize(
    ("name", "operand"),
    # Keys of every format; queries of one half of them and values of the other, each of which has
    # every pair of width, granularity and way.
    [
        *((name, "key") for name in FORMATS),
        *((name, OPERANDS[2 * (i % 2)]) for i, name in enumerate(FORMATS)),
    ],
)
def test_every_format_for_every_operand(
    name, operand, oracle, relative_error, random_operands, seen_lengths
):
    """Forward and all three gradients, the other operands as INT8 rows."""
    specs = AttentionQuantization(**{x: QuantSpec() for x in OPERANDS} | {operand: FORMATS[name]})
    check(specs, oracle, relative_error, random_operands, seen_lengths)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(
    "name", ["int8-row-minimum", "int4-channel_block-minimum", "int4-group-zero_point"]
)
def test_float_operands_beside_codes_stay_float(
    name, operand, oracle, relative_error, random_operands, seen_lengths
):
    specs = AttentionQuantization(**{operand: FORMATS[name]})
    check(specs, oracle, relative_error, random_operands, seen_lengths)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rotate", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("bits", [8, 4])
def test_centered_and_rotated(bits, rotate, center, oracle, relative_error, random_operands):
    query, key = (QuantSpec(bits, rotate=turn, center=center) for turn in rotate)
    specs = AttentionQuantization(query, key, QuantSpec(bits, center=center, rotate=rotate[0]))
    q, k, v, d_out = random_operands(**SHAPE)
    limits = 8e-3, 1e-2

    @jax.jit
    def results(*arrays):
        out, pullback = jax.vjp(
            lambda *x: jax_gluon.dot_product_attention(*x, quantization=specs), *arrays
        )
        codes = [
            jax_gluon.quantize(x, spec) for x, spec in zip(arrays, specs_of(specs), strict=True)
        ]
        return out, pullback(d_out), codes

    out, gradients, codes = results(q, k, v)
    expected = oracle(*map(quantizer.values, codes), d_out=d_out)
    assert relative_error(out, expected.out) <= limits[0]
    for gradient, exact in zip(gradients, expected[2:5], strict=True):
        assert relative_error(gradient, exact) <= limits[1]


MIXED = AttentionQuantization(
    QuantSpec(symmetric=False, granularity="block", block_size=9),
    QuantSpec(4, symmetric=False, granularity="head"),
    QuantSpec(symmetric=False, float_minimum=True, center=True),
)
RULES = {
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(40, 9)),
    "lengths": dict(
        query_seq_lengths=jnp.asarray([37, 20]), key_value_seq_lengths=jnp.asarray([0, 77])
    ),
    "mask": dict(mask=jnp.asarray(np.random.default_rng(1).random((2, 1, 37, 130)) < 0.4)),
    "soft_cap": dict(logits_soft_cap=3.0, scale=0.4),
    "bias": dict(bias=jnp.asarray(np.random.default_rng(2).standard_normal((4, 37, 130)))),
}


def _rules_of_codes():
    """Each rule with each kind of codes on the CPU, with one kind each on Metal.

    XLA sees the floats behind them: a rule that hides keys from the quantizer, and the bias, do.
    tests/metal/shaders has every format on Metal.
    """
    kinds = {"int8": "int8", "int4": "int4", "mixed": MIXED}
    for i, rule in enumerate(RULES):
        for j, (name, specs) in enumerate(kinds.items()):
            others = ["metal"] if i % 3 == j else []
            if i % 3 == j and rule in ("lengths", "bias"):
                others.append("xla")
            for implementation in ("cpu", *others):
                yield pytest.param(
                    rule, specs, implementation, id=f"{implementation}-{rule}-{name}"
                )


@pytest.mark.parametrize(("rule", "specs", "implementation"), list(_rules_of_codes()))
def test_rules_apply_to_codes(
    rule, specs, implementation, require, oracle, relative_error, random_operands, seen_lengths
):
    require(implementation)
    check(
        specs, oracle, relative_error, random_operands, seen_lengths, implementation=implementation,
        **RULES[rule],
    )  # fmt: skip


@pytest.mark.parametrize("isa", ["portable", "emulated_avx512", "avx2"])
@pytest.mark.parametrize("specs", ["int4", MIXED], ids=["int4", "mixed"])
def test_every_instruction_set(
    isa, specs, monkeypatch, oracle, relative_error, random_operands, seen_lengths
):
    import jax_gluon._plugin as plugin

    if isa not in plugin.cpu_isas_supported():
        pytest.skip(f"{isa} is not in this build, or not on this processor")
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", isa)
    monkeypatch.setenv("JAX_GLUON_POISON", "1")
    check(specs, oracle, relative_error, random_operands, seen_lengths, is_causal=True)


@pytest.mark.parametrize("specs", ["int8", "int4"])
def test_codes_given_as_tensors_are_what_the_argument_makes(specs, implementation, random_operands):
    """Of the keys that causal rows can see."""
    q, k, v, _ = random_operands(**SHAPE)
    seen = np.full(SHAPE["B"], SHAPE["T"], np.int32)
    tensors = [
        jax_gluon.quantize(x, spec, lengths=seen, implementation=implementation)
        for x, spec in zip((q, k, v), specs_of(specs), strict=True)
    ]
    keywords = dict(is_causal=True, implementation=implementation, return_residual=True)
    given = jax_gluon.dot_product_attention(*tensors, **keywords)
    made = jax_gluon.dot_product_attention(q, k, v, quantization=specs, **keywords)
    for a, b in zip(given, made, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    # The argument quantizes what is still float, and leaves codes alone.
    beside = jax_gluon.dot_product_attention(q, *tensors[1:], quantization=specs, **keywords)
    np.testing.assert_allclose(beside[0], made[0], rtol=1e-6, atol=1e-6)
    flat = [jax.tree.map(lambda leaf: leaf[1], x) for x in tensors]
    np.testing.assert_array_equal(
        jax_gluon.dot_product_attention(*flat, **keywords)[0], given[0][1]
    )


def test_gradient_of_codes_is_zero_and_of_floats_beside_them_is_not(
    implementation, random_operands
):
    q, k, v, d_out = random_operands(**SHAPE)
    key = jax_gluon.quantize(k, PRESETS["int8"].key)

    def loss(q, key, v):
        out = jax_gluon.dot_product_attention(q, key, v, implementation=implementation)
        return jnp.vdot(out, d_out)

    d_query, d_key, d_value = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)(q, key, v)
    assert d_query.any()
    assert d_value.any()
    assert isinstance(d_key, jax_gluon.QuantizedTensor)
    assert d_key.data.dtype == jax.dtypes.float0
    assert not d_key.scale.any()
    assert not d_key.center.any()


def test_residuals_are_the_codes():
    """Of float32 q, k, v at H = 64: INT8 at most 0.30, INT4 with INT8 queries at most 0.21."""
    x = jnp.zeros((1, 256, 2, 64), jnp.float32)

    def operand_bytes(quantization):
        _, pullback = jax.vjp(
            lambda *x: jax_gluon.dot_product_attention(*x, quantization=quantization), x, x, x
        )
        leaves = jax.tree.leaves(pullback)
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        # The output and the two parts of the log-sum-exp are kept beside the operands.
        return kept - x.size * 4 - 2 * x.size // 64 * 4

    plain = operand_bytes(None)
    assert plain == 3 * x.size * 4
    assert operand_bytes("int8") <= 0.30 * plain
    assert operand_bytes("int4") <= 0.21 * plain


def test_powers_of_tokens(implementation, oracle, relative_error, random_operands, seen_lengths):
    """Every seventh token is large; on Metal not of the query, which would need more pipelines."""
    block_size = 32 if implementation == "metal" else 12
    spec = dataclasses.replace(PRESETS["int4"].key, block_size=block_size)
    specs = AttentionQuantization(QuantSpec() if implementation == "metal" else spec, spec, spec)

    def draw(**shape):
        *operands, d_out = random_operands(**shape)
        return *(x.at[:, 1::7].mul(8) for x in operands), d_out

    check(
        specs, oracle, relative_error, draw, seen_lengths,
        implementation=implementation, is_causal=True,
    )  # fmt: skip


@pytest.mark.parametrize("specs", ["int8", "int4"])
def test_array_scale_and_vmap(specs, implementation, random_operands):
    q, k, v, _ = (jnp.stack([x, 2 * x]) for x in random_operands(**SHAPE))
    scales = jnp.asarray([0.1, 0.3], jnp.float32)

    def attention(q, k, v, scale):
        return jax_gluon.dot_product_attention(
            q, k, v, scale=scale, quantization=specs, implementation=implementation
        )

    mapped = jax.vmap(attention)(q, k, v, scales)
    for i in range(2):
        np.testing.assert_allclose(
            mapped[i], attention(q[i], k[i], v[i], scales[i]), rtol=1e-4, atol=2e-3
        )
    codes = jax.vmap(lambda x: jax_gluon.quantize(x, specs_of(specs)[1]))(k)
    over_codes = jax.vmap(lambda q, k, v: attention(q, k, v, 0.2))(q, codes, v)
    one = attention(q[1], jax.tree.map(lambda leaf: leaf[1], codes), v[1], 0.2)
    np.testing.assert_allclose(over_codes[1], one, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    "name", ["int8-row-symmetric", "int4-channel_block-minimum", "int8-head-zero_point"]
)
@pytest.mark.parametrize("operand", OPERANDS)
def test_hidden_tokens_that_are_not_finite_leak_nowhere(name, operand, random_operands):
    """Where a token has scales of its own; others spread NaN over what shares them."""
    spec = dataclasses.replace(FORMATS[name], granularity="row")
    specs = AttentionQuantization(**{x: QuantSpec() for x in OPERANDS} | {operand: spec})
    arrays = dict(zip(OPERANDS, random_operands(**SHAPE)[:3], strict=True))
    arrays[operand] = arrays[operand].at[:, 30].set(jnp.nan)
    out = jax_gluon.dot_product_attention(
        **arrays, quantization=specs,
        query_seq_lengths=jnp.asarray([30, 30]), key_value_seq_lengths=jnp.asarray([30, 30]),
    )  # fmt: skip
    assert np.isfinite(out).all()
