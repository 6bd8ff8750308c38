"""The kernel for few queries over many keys: every storage of keys and values, every variant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._quantization.formats import AttentionQuantization, QuantSpec, preset
from tests.support import quantizer
from tests.support.arrays import placed
from tests.support.variants import cpu_variants

plugin = pytest.importorskip("jax_gluon._plugin")
pytestmark = pytest.mark.usefixtures("poison")

MINIMUM = dict(symmetric=False, float_minimum=True)
# The query stays in float, so products and probabilities are float32.
STORAGES = {
    "float32": None,
    "bfloat16": None,
    "float16": None,
    "int8": "int8",
    "int4": "int4",
    "int8_rows_centered": AttentionQuantization(
        None, QuantSpec(center=True), QuantSpec(symmetric=False, center=True)
    ),
    "int8_channel_and_group": AttentionQuantization(
        None, QuantSpec(granularity="channel"), QuantSpec(granularity="group", block_size=64)
    ),
    "int4_group_keys": AttentionQuantization(
        None,
        QuantSpec(4, granularity="group", block_size=10, **MINIMUM),
        QuantSpec(4, granularity="channel_block", block_size=12, **MINIMUM),
    ),
    "int4_rows": AttentionQuantization(
        None, QuantSpec(4, symmetric=False), QuantSpec(4, granularity="tensor")
    ),
    "short_key_blocks": AttentionQuantization(
        None, QuantSpec(4, granularity="channel_block", block_size=4), QuantSpec(4)
    ),
}
ROWS = QuantSpec()
# All operands are codes, so products are made of integers: a float query's are not.
INTEGERS = {
    "int8": "int8",
    "int4": "int4",
    "asymmetric_rows": AttentionQuantization(*[QuantSpec(symmetric=False)] * 3),
    "int4_rows": AttentionQuantization(
        QuantSpec(4, symmetric=False),
        QuantSpec(4, symmetric=False, center=True),
        QuantSpec(4, **MINIMUM),
    ),
    "tensor": AttentionQuantization(*[QuantSpec(granularity="tensor")] * 3),
    "int8_minimum_blocks": AttentionQuantization(
        ROWS,
        QuantSpec(granularity="block", block_size=24, **MINIMUM),
        QuantSpec(granularity="block", block_size=10, **MINIMUM),
    ),
    "channel_keys_and_groups": AttentionQuantization(
        ROWS,
        QuantSpec(granularity="channel", **MINIMUM),
        QuantSpec(granularity="group", block_size=8, symmetric=False),
    ),
    "int4_channel_keys_and_long_groups": AttentionQuantization(
        QuantSpec(granularity="channel"),
        QuantSpec(4, granularity="channel", symmetric=False),
        QuantSpec(4, granularity="group", block_size=20, symmetric=False),
    ),
    "group_keys": AttentionQuantization(
        QuantSpec(granularity="group"),
        QuantSpec(granularity="group", block_size=10),
        QuantSpec(4, granularity="group", block_size=1000, **MINIMUM),
    ),
    "short_blocks_of_keys": AttentionQuantization(
        ROWS, QuantSpec(4, granularity="channel_block", block_size=9, **MINIMUM), ROWS
    ),
}
# Around a subtile (64 keys, of integers 16 or 32), a chunk (256 or 512), vectors of 8 and 16,
# blocks of 4 rows, and groups of all heads that fill several vectors; rows that are more than the
# second cache holds, and fewer.
SIZES = {
    "one_row": dict(T=1, S=1300, N=7, K=7, H=64, V=64),
    "grouped": dict(T=1, S=530, N=10, K=2, H=30, V=22),
    "rows": dict(T=3, S=700, N=4, K=1, H=128, V=96),
    "many_rows": dict(T=3, S=300, N=26, K=2, H=40, V=56),
    "short": dict(T=4, S=65, N=24, K=12, H=32, V=64),
    "one_key": dict(T=2, S=1, N=2, K=1, H=2, V=258),
}
RNG = np.random.default_rng(7)
RULES = {
    "causal": dict(is_causal=True),
    "lengths": dict(
        key_value_seq_lengths=jnp.asarray([350, 0]), query_seq_lengths=jnp.asarray([2, 3])
    ),
    "window": dict(local_window_size=(300, 200)),
    "soft_cap": dict(logits_soft_cap=3.0, scale=0.4),
    "mask": dict(mask=jnp.asarray(RNG.random((2, 1, 3, 700)) < 0.3)),
    "bias": dict(bias=jnp.asarray(RNG.standard_normal((1, 4, 3, 700)), jnp.float32)),
}
ISAS = [isa for isa in cpu_variants() if isa != "avx512_bf16" and "amx" not in isa]


def every_pair(storages):
    """Every storage meets every size on the best ISA, and two of them on each other.

    How a storage is read and where a row ends are one text for all ISAs, whose own code is the
    vector operations: each is met with each storage and with each size.
    """
    for isa in ISAS:
        for i, storage in enumerate(storages):
            for j, size in enumerate(SIZES):
                if isa == ISAS[0] or (i + j) % 3 == 0:
                    yield pytest.param(storage, size, isa, id=f"{storage}-{size}-{isa}")


def draw(B=2, *, T, S, N, K, H, V, dtype="float32"):
    rng = np.random.default_rng(3)
    # Keys and values off center: what they share must cancel, and not cost digits.
    q, k, v = (
        placed(rng.standard_normal(shape) + center, dtype)
        for shape, center in (((B, T, N, H), 0), ((B, S, K, H), 2), ((B, S, K, V), 0.5))
    )
    return q, k, v


def check(storage, size, oracle, relative_error, *, bar=None, **keywords):
    integers = isinstance(bar, float)
    dtype = storage if storage in ("bfloat16", "float16") else "float32"
    q, k, v = draw(**size, dtype=dtype)
    specs = preset((INTEGERS if integers else STORAGES)[storage]) or AttentionQuantization()
    if not integers:
        specs = dataclasses.replace(specs, query=None)
    length = keywords.get("key_value_seq_lengths")

    @jax.jit
    def codes_and_attention(*operands):
        codes = [
            x if spec is None
            else jax_gluon.quantize(x, spec, lengths=length if spec.center else None)
            for x, spec in zip(operands, (specs.query, specs.key, specs.value), strict=True)
        ]  # fmt: skip
        return codes, jax_gluon.attention_with_log_sum_exp(*codes, **keywords)

    codes, (out, log_sum_exp) = codes_and_attention(q, k, v)
    expected = oracle(*map(quantizer.values, codes), **keywords)
    assert relative_error(out, expected.out) <= (
        bar or {"bfloat16": 4e-3, "float16": 5e-4}.get(dtype, 3e-6)
    )
    seen = np.isfinite(expected.log_sum_exp)
    np.testing.assert_array_equal(np.isfinite(log_sum_exp), seen)
    np.testing.assert_allclose(
        np.asarray(log_sum_exp)[seen], expected.log_sum_exp[seen], rtol=1e-5,
        atol=5e-2 if integers else 2e-5,
    )  # fmt: skip


# Relative L2 against the operands that the codes stand for: 8-bit probabilities, and queries
# rounded again after the scales of keys were folded into them.
def integer_bar(storage):
    return (
        8e-3 if storage in ("int8", "tensor", "asymmetric_rows", "int8_minimum_blocks") else 1.3e-2
    )


@pytest.mark.parametrize(("storage", "size", "isa"), list(every_pair(INTEGERS)))
def test_integer_products(storage, size, isa, monkeypatch, oracle, relative_error):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", isa)
    check(storage, SIZES[size], oracle, relative_error, bar=integer_bar(storage))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("storage", ["int8", "int4", "int4_rows"])
def test_integer_products_with_every_rule(storage, rule, oracle, relative_error):
    check(storage, SIZES["rows"], oracle, relative_error, bar=integer_bar(storage), **RULES[rule])


@pytest.mark.parametrize(("storage", "size", "isa"), list(every_pair(STORAGES)))
def test_every_storage(storage, size, isa, monkeypatch, oracle, relative_error):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", isa)
    check(storage, SIZES[size], oracle, relative_error)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("storage", ["float32", "int8", "int4", "int8_rows_centered"])
def test_every_rule(storage, rule, oracle, relative_error):
    check(storage, SIZES["rows"], oracle, relative_error, **RULES[rule])


def test_chunks_are_merged_by_shape_alone():
    """The same bits with one head at a time as with all of them."""
    q, k, v = draw(T=1, S=2000, N=8, K=4, H=32, V=32)
    whole = jax_gluon.dot_product_attention(q, k, v)
    for head in range(4):
        one = jax_gluon.dot_product_attention(
            q[:, :, 2 * head : 2 * head + 2], k[:, :, head : head + 1], v[:, :, head : head + 1]
        )
        np.testing.assert_array_equal(one, whole[:, :, 2 * head : 2 * head + 2])


GROUPED_VALUES = AttentionQuantization(
    ROWS, ROWS, QuantSpec(4, granularity="group", block_size=24, **MINIMUM)
)


@pytest.mark.parametrize(
    "quantization", [None, "int8", GROUPED_VALUES], ids=["float32", "int8", "groups"]
)
def test_hidden_keys_that_are_not_finite_leak_nowhere(quantization):
    """Neither through a mask that only some rows have, nor past a row's causal range."""
    # Groups of 24 values: of all heads they end within a vector, beside those of the next key.
    q, k, v = draw(T=3, S=100, N=6, K=3, H=32, V=48)
    mask = np.ones((2, 1, 3, 100), bool)
    mask[:, :, 0, 40] = False
    visible = dict(mask=jnp.asarray(mask), quantization=quantization)
    clean = jax_gluon.dot_product_attention(q, k, v, **visible)
    for bad in (np.nan, np.inf):
        out = jax_gluon.dot_product_attention(
            q, k.at[:, 40].set(bad), v.at[:, 40].set(bad), **visible
        )
        np.testing.assert_allclose(out[:, 0], clean[:, 0], atol=2e-2)
        assert np.isnan(out[:, 1:]).all()
        causal = jax_gluon.dot_product_attention(
            q, k.at[:, 1:].set(bad), v.at[:, 1:].set(bad), is_causal=True
        )
        assert np.isfinite(causal[:, 0]).all()
        assert np.isnan(causal[:, 1:]).all()


def test_gradient_of_a_single_query(oracle, relative_error):
    q, k, v = draw(T=1, S=300, N=4, K=2, H=32, V=16)
    out, pullback = jax.vjp(lambda *x: jax_gluon.dot_product_attention(*x), q, k, v)
    d_out = jnp.asarray(RNG.standard_normal(out.shape), jnp.float32)
    expected = oracle(q, k, v, d_out=d_out)
    for gradient, exact in zip(pullback(d_out), expected[2:5], strict=True):
        assert relative_error(gradient, exact) <= 3e-6
