"""layout="BNTH": heads before tokens, in every kernel, without a copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

_RNG = np.random.default_rng(4)
B, N, K = 2, 4, 2
# Kernels of their own: many rows, few rows, one key, heads of few tokens.
SHAPES = {"many": (70, 270), "few": (3, 130), "one_key": (4, 1), "small": (49, 50), "query": (1, 1)}
RULES = {
    "plain": {},
    "everything": dict(
        is_causal=True, logits_soft_cap=4.0, sinks=_RNG.standard_normal(N).astype(np.float32),
        scale=jnp.asarray(_RNG.random(N), jnp.float32),
        query_seq_lengths=np.array([900, 2]), key_value_seq_lengths=np.array([90, 5]),
    ),
}  # fmt: skip


def _swap(x):
    return jnp.swapaxes(x, 1, 2)


def _parameters():
    for shape in SHAPES:
        for quantization in (None, "int8"):
            for kernel in ("baseline", "gluon", None):
                yield "cpu", kernel, shape, quantization
    yield "cpu", None, "many", "int4"
    for implementation in ("metal", "xla"):
        yield implementation, None, "few", None
        yield implementation, None, "few", "int8"
    yield "metal", "gluon", "many", None


@pytest.mark.parametrize(("implementation", "kernel", "shape", "quantization"), list(_parameters()))
def test_the_same_bits_as_tokens_first(
    implementation, kernel, shape, quantization, require, random_operands
):
    """Output, log-sum-exp and all gradients; with a cotangent of the log-sum-exp too."""
    require(implementation)
    T, S = SHAPES[shape]
    q, k, v, d_out = random_operands(B, T, S, N, K, 32, 24)
    bias = jnp.asarray(_RNG.standard_normal((B, N, T, S), np.float32))
    mask = _RNG.random((B, 1, T, S)) < 0.8
    rules = RULES["everything" if kernel is None else "plain"]

    def results(layout, *arrays):
        def attention(q, k, v, bias):
            given = dict(mask=mask) if kernel is None else {}
            return jax_gluon.attention_with_log_sum_exp(
                q, k, v, bias, quantization=quantization, implementation=implementation,
                kernel=kernel, layout=layout, **given, **rules,
            )  # fmt: skip

        (out, log_sum_exp), pullback = jax.vjp(attention, *arrays[:3], bias)
        d_log_sum_exp = jnp.cos(jnp.where(log_sum_exp == -jnp.inf, 0.0, log_sum_exp))
        return out, log_sum_exp, *pullback((arrays[3], d_log_sum_exp))

    @jax.jit
    def both(*arrays):
        return results("BTNH", *arrays), results("BNTH", *map(_swap, arrays))

    expected, found = both(q, k, v, d_out)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(_swap(a), b, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(found[-1], expected[-1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("implementation", ["cpu", "metal"])
def test_nothing_is_transposed(implementation, quantization, require, random_operands):
    """Operands, results and residuals of a training step keep the caller's layout."""
    require(implementation)
    arrays = tuple(map(_swap, random_operands(B, 70, 90, N, K, 32, 24)))

    def step(q, k, v, d_out):
        out, pullback = jax.vjp(
            lambda *x: jax_gluon.dot_product_attention(
                *x, layout="BNTH", quantization=quantization,
                implementation=implementation,
            ),
            q, k, v,
        )  # fmt: skip
        return out, *pullback(d_out)

    text = jax.jit(step).lower(*arrays).compile().as_text()
    assert "jax_gluon.attention_backward" in text
    assert not re.findall(r" (?:transpose|copy)\(", text)


def test_vmap_batch_axes_and_float64(implementation, random_operands, relative_error, configure):
    """Mapped at any axis, with two batch axes or none; nothing to see; the reference."""
    q, k, v, _ = random_operands(6, 9, 11, N, K, 8, 8)
    head_major = tuple(map(_swap, (q, k, v)))

    def attention(*arrays, layout="BNTH", differentiation=None):
        return jax_gluon.dot_product_attention(
            *arrays, is_causal=True, layout=layout, implementation=implementation,
            differentiation=differentiation,
        )  # fmt: skip

    expected = _swap(attention(q, k, v, layout="BTNH"))
    assert relative_error(attention(*head_major), expected) <= 1e-6
    two = (x.reshape(2, 3, *x.shape[1:]) for x in head_major)
    assert relative_error(attention(*two).reshape(expected.shape), expected) <= 1e-6
    mapped = jax.vmap(attention, (0, None, 3), 2)(
        head_major[0][:, None], head_major[1][:1], jnp.moveaxis(head_major[2][:, None], 0, 3)
    )
    each = [
        attention(head_major[0][i : i + 1], head_major[1][:1], head_major[2][i : i + 1])
        for i in range(6)
    ]
    assert relative_error(mapped, jnp.stack(each, 2)) <= 1e-6
    assert relative_error(attention(*(x[0] for x in head_major)), expected[0]) <= 1e-6
    assert attention(head_major[0], *(x[:, :, :0] for x in head_major[1:])).shape == expected.shape
    any_order = attention(*head_major, differentiation="any")
    assert relative_error(any_order, expected) <= 1e-6
    reference = jax_gluon.reference.dot_product_attention(
        *head_major, is_causal=True, layout="BNTH"
    )
    assert relative_error(reference, expected) <= 1e-6
    if implementation == "xla":
        with configure(jax_enable_x64=True):
            wide = attention(*(jnp.asarray(x, jnp.float64) for x in head_major))
        assert wide.dtype == np.float64
        assert relative_error(wide, expected) <= 1e-6
