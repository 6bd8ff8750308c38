"""A preset's name leaves floats in float for a few queries; specs are taken at their word."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._arguments import MAX_QUERIES_IN_FLOAT
from jax_gluon._quantization.formats import PRESETS

B, S, N, K, H, V = 2, 70, 4, 2, 16, 12
presets = pytest.mark.parametrize("name", PRESETS)


@functools.cache
def operands(T):
    rng = np.random.default_rng(T)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def attend(q, k, v, quantization, **keywords):
    return jax_gluon.dot_product_attention(
        q, k, v, key_value_seq_lengths=np.array([S, 41]), quantization=quantization, **keywords
    )


@presets
def test_a_few_queries_are_those_of_floats(name, implementation):
    for T in (1, MAX_QUERIES_IN_FLOAT, MAX_QUERIES_IN_FLOAT + 1):
        q, k, v, _ = operands(T)
        out, as_float, as_codes = (
            attend(q, k, v, quantization, implementation=implementation)
            for quantization in (name, None, PRESETS[name])
        )
        is_few = T <= MAX_QUERIES_IN_FLOAT
        np.testing.assert_array_equal(out, as_float if is_few else as_codes)
        assert not np.array_equal(as_codes, as_float)


@presets
def test_no_codes_of_all_keys_are_made(name, require):
    require("cpu")

    def text(T, quantization):
        q, k, v, _ = operands(T)
        return (
            jax.jit(functools.partial(attend, quantization=quantization)).lower(q, k, v).as_text()
        )

    assert "jax_gluon.quantize" not in text(1, name)
    assert "jax_gluon.quantize" in text(1, PRESETS[name])
    assert "jax_gluon.quantize" in text(MAX_QUERIES_IN_FLOAT + 1, name)


@presets
def test_gradients_are_those_of_floats(name):
    q, k, v, d_out = operands(2)

    def loss(quantization, *x):
        return jnp.vdot(attend(*x, quantization), d_out)

    gradients, expected = (
        jax.grad(functools.partial(loss, quantization), argnums=(0, 1, 2))(q, k, v)
        for quantization in (name, None)
    )
    for gradient, exact in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(gradient, exact)


@presets
def test_queries_of_codes_are_quantized_as_before(name):
    """Where keys and values are codes, few queries cost little to quantize."""
    q, k, v, _ = operands(1)
    codes = [jax_gluon.quantize(x, getattr(PRESETS[name], of))
             for x, of in ((k, "key"), (v, "value"))]  # fmt: skip
    out, expected, as_float = (attend(q, *codes, each) for each in (name, PRESETS[name], None))
    np.testing.assert_array_equal(out, expected)
    assert not np.array_equal(out, as_float)
    # Beside one float operand all are floats: the products would be.
    mixed, as_float = (attend(q, codes[0], v, each) for each in (name, None))
    np.testing.assert_array_equal(mixed, as_float)


@presets
def test_explain_says_so(name):
    note = f'quantization="{name}" leaves keys and values in float for 3 of at most 4 queries'
    for T, implementation in ((3, None), (3, "xla"), (5, None)):
        q, k, v, _ = operands(T)
        plan = jax_gluon.explain(q, k, v, quantization=name, implementation=implementation)
        assert (note in plan.reasons[0]) == (T == 3)
    plan = jax_gluon.explain(*operands(3)[:3], quantization=PRESETS[name])
    assert "in float" not in plan.reasons[0]
