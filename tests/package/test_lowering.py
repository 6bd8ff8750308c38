"""Which program a call becomes: custom calls on the CPU platform, XLA's own code elsewhere."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jax_gluon

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


@pytest.fixture
def plugin():
    return pytest.importorskip("jax_gluon._plugin", reason="jax_gluon._plugin is not built")


def operands():
    return (
        jnp.ones((B, T, N, H)),
        jnp.ones((B, S, K, H)),
        jnp.ones((B, S, K, H)),
        jnp.ones((N, T, S)),
    )


def loss(q, k, v, bias=None, **keywords):
    return jnp.sum(jax_gluon.dot_product_attention(q, k, v, bias, **keywords) ** 2)


def compiled_calls(function, *arguments):
    """The package's custom calls in the optimized program, each with how often it is called."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    calls = re.findall(r'custom_call_target="(jax_gluon\.\w+)"', text)
    return {name: calls.count(name) for name in calls}


def lowered_calls(function, platform, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return set(re.findall(r"@(jax_gluon\.\w+)", lowered.as_text()))


@pytest.mark.parametrize("implementation", [None, "cpu"])
def test_forward_is_one_custom_call(implementation, plugin):
    q, k, v, bias = operands()
    calls = compiled_calls(functools.partial(loss, implementation=implementation), q, k, v, bias)
    assert calls == {"jax_gluon.attention_forward": 1}


def test_xla_implementation_has_no_custom_call():
    function = jax.grad(functools.partial(loss, implementation="xla"), (0, 1, 2, 3))
    assert compiled_calls(function, *operands()) == {}


@pytest.mark.parametrize("implementation", [None, "cpu"])
@pytest.mark.parametrize("differentiates_bias", [False, True])
def test_bias_gradient_is_dropped_when_nobody_asks(differentiates_bias, implementation, plugin):
    argnums = (0, 1, 2, 3) if differentiates_bias else (0, 1, 2)
    gradient = jax.grad(functools.partial(loss, implementation=implementation), argnums)
    expected = {"jax_gluon.attention_forward": 1, "jax_gluon.attention_backward": 1}
    if differentiates_bias:
        expected["jax_gluon.attention_backward_bias"] = 1
    assert compiled_calls(gradient, *operands()) == expected


def test_int8_quantizes_each_operand_once_for_forward_and_backward(plugin):
    gradient = jax.grad(functools.partial(loss, quantization="int8"), (0, 1, 2))
    q, k, v, _ = operands()
    assert compiled_calls(gradient, q, k + 1, v + 2) == {
        "jax_gluon.quantize": 3,
        "jax_gluon.attention_forward": 1,
        "jax_gluon.attention_backward": 1,
    }


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_other_platforms_get_the_xla_implementation(quantization, plugin):
    function = jax.grad(functools.partial(loss, quantization=quantization), (0, 1, 2, 3))
    assert "jax_gluon.attention_backward" in lowered_calls(function, "cpu", *operands())
    for platform in ("cuda", "tpu"):
        assert lowered_calls(function, platform, *operands()) == set()


def test_shapes_are_not_broadcast_for_vmap(plugin):
    """An operand that is not mapped reaches the custom call with a leading extent of 1."""
    q, k, v, _ = operands()
    function = jax.vmap(functools.partial(loss, implementation="cpu"), (0, None, None))
    text = jax.jit(function).lower(jnp.stack([q] * 3), k, v).as_text()
    [line] = [line for line in text.splitlines() if "@jax_gluon.attention_forward" in line]
    types = line.split(" : ")[-1]
    assert f"3x{B}x{T}x{N}x{H}xf32" in types
    assert types.count(f"<1x{B}x{S}x{K}x{H}xf32>") == 2
