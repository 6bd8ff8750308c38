"""Operands on a mesh of one device: what `shard_map` checks, and Explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import QuantizedKVCache, QuantSpec
from jax_gluon._sharding import placement

if not hasattr(jax.lax, "pcast"):
    pytest.skip("this JAX has neither Explicit axes nor checks", allow_module_level=True)

from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

B, T, S, N, K, H = 2, 9, 13, 4, 2, 8
# None traces both the plugin's call and XLA's.
implementations = pytest.mark.parametrize("implementation", [None, "xla"])
formats = pytest.mark.parametrize("quantization", [None, "int4"])
EXPLICIT = {
    "batch": P("x"), "tokens": P(None, "x"), "heads": P(None, None, "x"),
    "rows": P(None, None, None, "x"), "none": P(),
}  # fmt: skip


def mesh_of(axis_type):
    return jax.make_mesh((1,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:1])


def on_explicit_mesh(tree, spec=EXPLICIT["batch"]):
    sharding = NamedSharding(mesh_of(AxisType.Explicit), spec)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


def spec_of(x):
    return P(*jax.typeof(x).sharding.spec)


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, rtol=1e-5, atol=1e-5)


@pytest.fixture
def arguments(random_operands):
    q, k, v, d_out = random_operands(B, T, S, N, K, H)
    rng = np.random.default_rng(5)
    bias = jnp.asarray(rng.standard_normal((1, N, 1, S)), jnp.float32)
    return q, k, v, bias, jnp.asarray([13, 6], jnp.int32), d_out


def attention(q, k, v, bias, lengths, d_out, **keywords):
    out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(
        q, k, v, bias, key_value_seq_lengths=lengths, is_causal=True, **keywords
    )
    return jnp.sum(out * d_out) + jnp.sum(log_sum_exp), (out, log_sum_exp)


@implementations
@formats
def test_shard_map_checks_attention(implementation, quantization, arguments, require):
    """What all devices share gets the sum of their gradients; an output may be a scan's carry."""
    require(implementation or "cpu")
    run = functools.partial(attention, implementation=implementation, quantization=quantization)
    each = P("x")
    over_mesh = functools.partial(
        jax.shard_map, mesh=mesh_of(AxisType.Auto), in_specs=(each, P(), each, P(), each, each)
    )

    def loss_of_each(*arguments):
        loss, outs = run(*arguments)
        return loss[None], outs

    mapped = over_mesh(loss_of_each, out_specs=(each, (each, each)))

    def total(*arguments):
        loss, outs = mapped(*arguments)
        return jnp.sum(loss), outs

    actual, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1, 2, 3), has_aux=True))(*arguments)
        for function in (total, run)
    )
    assert_close(actual, expected)

    def loop(query, *arguments):
        step = lambda query, _: (run(query, *arguments)[1][0], None)  # noqa: E731
        return jax.lax.scan(step, query, length=2)[0]

    if implementation is None:
        actual = jax.jit(over_mesh(loop, out_specs=each))(*arguments)
        assert_close(actual, jax.jit(loop)(*arguments))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_shard_map_checks_a_cache_in_a_scan(quantization, random_operands, require):
    require("cpu")
    q, k, v, _ = random_operands(B, 40, 40, N, K, H)
    cache = QuantizedKVCache.create(B, 64, K, H, quantization=quantization)

    def generate(cache, *tokens):
        def step(cache, now):
            q, k, v = (x[:, None] for x in now)
            cache = cache.append(k, v)
            return cache, cache.attention(q)[:, 0]

        return jax.lax.scan(step, cache, [jnp.swapaxes(x, 0, 1) for x in tokens])

    specs = (P("x"), P("x"), P("x"), P())
    mapped = jax.shard_map(
        generate, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=(P("x"), P(None, "x"))
    )
    assert_close(jax.jit(mapped)(cache, q, k, v), jax.jit(generate)(cache, q, k, v))


@implementations
@formats
def test_attention_on_an_explicit_mesh(implementation, quantization, arguments, require):
    require(implementation or "cpu")
    run = functools.partial(attention, implementation=implementation, quantization=quantization)
    gradient = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
    expected = jax.jit(gradient)(*arguments)
    *operands, bias, lengths, d_out = arguments
    name, function = ("batch", jax.jit(gradient)) if implementation else ("heads", gradient)
    operands, d_out = (on_explicit_mesh(x, EXPLICIT[name]) for x in (operands, d_out))
    actual = function(*operands, bias, lengths, d_out)
    assert_close(actual, expected)
    (_, (out, _)), gradients = actual
    assert [spec_of(x) for x in (out, *gradients)] == [spec_of(operands[0])] * 4


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_codes_on_an_explicit_mesh(implementation, arguments, require):
    require(implementation)
    x = arguments[0]
    minimum = dict(symmetric=False, float_minimum=True, block_size=4)
    for spec, names in (
        (QuantSpec(4, granularity="channel_block", **minimum), ("batch", "tokens")),
        (QuantSpec(granularity="group", block_size=4, center=True, rotate=True), ("rows", "none")),
    ):
        quantize = functools.partial(jax_gluon.quantize, spec=spec, implementation=implementation)
        expected = quantize(x, lengths=[5, 9])
        for name in names:
            codes = quantize(on_explicit_mesh(x, EXPLICIT[name]), lengths=[5, 9])
            assert_close((codes, codes.dequantize()), (expected, expected.dequantize()))
    placed = on_explicit_mesh(x[0], EXPLICIT["tokens"])
    assert_close(quantize(placed).dequantize(), quantize(x[0]).dequantize())


@pytest.mark.parametrize(("quantization", "window"), [("int8", 20), ("int4", None)])
def test_a_cache_on_an_explicit_mesh(quantization, window, random_operands, require):
    require("cpu")
    q, k, v, _ = random_operands(B, 37, 37, N, K, H)
    cache = QuantizedKVCache.create(B, 64, K, H, quantization=quantization, window=window)

    @jax.jit
    def run(cache, q, k, v):
        cache = cache.append(k, v).append(k[:, :3], v[:, :3], [3, 1])
        return cache, cache.attention(q[:, :5]), cache.attention(q[:, :1])

    expected = run(cache, q, k, v)
    for placed in (cache, on_explicit_mesh(cache)):
        actual = run(placed, *on_explicit_mesh((q, k, v)))
        assert_close(actual, expected)
    caches = (actual[0], placed)
    specs, expected = ([spec_of(x) for x in jax.tree.leaves(cache)] for cache in caches)
    assert specs == expected


def test_orders_of_a_large_mesh():
    """4,096 devices have one order of their axes of two, and not 12!."""
    assert placement._orders((2,) * 12) == ((2,) * 12,)
    assert placement._orders((2, 2, 3)) == ((2, 2, 3), (2, 3, 2), (3, 2, 2))
