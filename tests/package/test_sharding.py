"""Batch and heads over the devices of a mesh: results of one device, and nothing is gathered."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import QuantizedKVCache, QuantSpec

if not hasattr(jax.lax, "pcast"):
    pytest.skip("this JAX has neither Explicit axes nor checks", allow_module_level=True)
if jax.device_count() < 6:
    pytest.skip("fewer than six devices", allow_module_level=True)

from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

B, T, S, N, K, H = 4, 9, 21, 4, 2, 8
BATCH, HEADS = "data", "model"
EACH = P(BATCH, None, HEADS)
# Of arguments of attention.
SPECS = {
    "query": EACH, "key": EACH, "value": EACH, "d_out": EACH, "bias": P(None, HEADS),
    "mask": P(BATCH), "sinks": P(HEADS), "scale": P(HEADS), "key_value_seq_lengths": P(BATCH),
    "query_segment_ids": P(BATCH), "key_value_segment_ids": P(BATCH), "query_offset": P(BATCH),
    "query_positions": P(BATCH), "key_value_positions": P(BATCH),
}  # fmt: skip
FLOATS = ("query", "key", "value", "bias", "sinks")


def mesh_of(axis_type=AxisType.Auto, shape=(2, 2)):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, (BATCH, HEADS), axis_types=(axis_type,) * 2, devices=devices)


def placed(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def collectives(compiled):
    """How many of each kind a program has."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = rf"\b({kinds})(?:-start)?\("
    return Counter(re.findall(pattern, compiled.as_text()))


def assert_close(actual, expected, tolerance=1e-5):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(np.asarray(x), y, rtol=tolerance, atol=tolerance)


@pytest.fixture
def arguments(random_operands):
    q, k, v, d_out = random_operands(B, T, S, N, K, H)
    rng = np.random.default_rng(5)
    sorted_ids = lambda tokens: np.sort(rng.integers(0, 3, (B, tokens)), axis=1)  # noqa: E731
    return {
        "query": q, "key": k, "value": v, "d_out": d_out,
        "bias": jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32),
        "mask": jnp.asarray(rng.random((B, 1, T, S)) < 0.8),
        "sinks": jnp.asarray(rng.standard_normal(N), jnp.float32),
        "scale": jnp.asarray(rng.random(N), jnp.float32),
        "key_value_seq_lengths": jnp.asarray([21, 17, 5, 0], jnp.int32),
        "query_segment_ids": jnp.asarray(sorted_ids(T), jnp.int32),
        "key_value_segment_ids": jnp.asarray(sorted_ids(S), jnp.int32),
        "query_offset": jnp.asarray([12, 0, 3, 8], jnp.int32),
        "query_positions": jnp.asarray(rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)),
        "key_value_positions": jnp.asarray(rng.permuted(np.tile(np.arange(S), (B, 1)), axis=1)),
    }  # fmt: skip


def attention(arguments, **keywords):
    """A loss, and the results."""
    given = dict(arguments)
    q, k, v, d_out = (given.pop(name) for name in ("query", "key", "value", "d_out"))
    out, log_sum_exp = jax_gluon.attention_with_log_sum_exp(q, k, v, **given, **keywords)
    seen = jnp.where(log_sum_exp > -1e30, log_sum_exp, 0.0)
    return jnp.sum(out * d_out) + jnp.sum(seen), (out, log_sum_exp)


def gradients(arguments, **keywords):
    """Results, and gradients of what is float."""
    floats = {name: x for name, x in arguments.items() if name in FLOATS}

    def loss(floats):
        return attention(arguments | floats, **keywords)

    (_, results), of_floats = jax.value_and_grad(loss, has_aux=True)(floats)
    return results, of_floats


def chosen(arguments, *names):
    return {name: arguments[name] for name in ("query", "key", "value", "d_out", *names)}


MANY = ("bias", "mask", "sinks", "scale", "key_value_seq_lengths", "query_offset")
CASES = {
    "float": ("cpu", None, AxisType.Auto, MANY),
    "int8": ("cpu", "int8", AxisType.Auto, MANY),
    "int4": ("cpu", "int4", AxisType.Explicit, ("sinks",)),
    "chosen": (None, "int8", AxisType.Explicit, ()),
    "segments": ("cpu", None, AxisType.Explicit, ("query_segment_ids", "key_value_segment_ids")),
    "positions": ("cpu", None, AxisType.Auto, ("query_positions", "key_value_positions")),
    "xla": ("xla", None, AxisType.Auto, MANY),
    "xla-int8": ("xla", "int8", AxisType.Explicit, ("sinks",)),
    "metal": ("metal", "int8", AxisType.Auto, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_gathered(case, arguments, require):
    """In forward and backward: what devices share has the sum of their gradients."""
    implementation, quantization, axis_type, names = CASES[case]
    require(implementation or "cpu")
    given = chosen(arguments, *names)
    run = jax.jit(
        functools.partial(
            gradients, implementation=implementation, quantization=quantization,
            is_causal="query_offset" in names or "query_positions" in names,
        )
    )  # fmt: skip
    mesh = mesh_of(axis_type)
    specs = {name: SPECS[name] for name in given}
    on_mesh = placed(mesh, given, specs)
    compiled = run.lower(on_mesh).compile()
    assert collectives(compiled)["all-gather"] == 0
    (out, log_sum_exp), of_floats = actual = compiled(on_mesh)
    for name, x in {"query": out, **of_floats}.items():
        expected = NamedSharding(mesh, SPECS[name])
        assert x.sharding.is_equivalent_to(expected, x.ndim), (name, x.sharding)
    assert log_sum_exp.sharding.is_equivalent_to(NamedSharding(mesh, EACH), 3)
    assert_close(actual, run(given), 2e-5)


def test_nothing_is_gathered_by_the_older_partitioner(arguments, configure, require):
    """GSPMD, which asks in other words."""
    require("cpu")
    if not getattr(jax.config, "jax_use_shardy_partitioner", False):
        pytest.skip("this JAX has but one")
    given = chosen(arguments, "bias", "sinks")
    run = jax.jit(functools.partial(gradients, implementation="cpu", quantization="int8"))
    on_mesh = placed(mesh_of(), given, {name: SPECS[name] for name in given})
    with configure(jax_use_shardy_partitioner=False):
        compiled = run.lower(on_mesh).compile()
    assert collectives(compiled)["all-gather"] == 0
    assert_close(compiled(on_mesh), run(given), 2e-5)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1), (12, 3), (16, 8)])
def test_devices_that_share_kv_heads(implementation, heads, kv_heads, random_operands, require):
    """Query heads over four devices, kv heads on all of them: each reads those of its own."""
    require(implementation)
    mesh = mesh_of(shape=(1, 4))
    q, k, v, d_out = random_operands(2, 7, 12, heads, kv_heads, 8)
    given = {"query": q, "key": k, "value": v, "d_out": d_out}
    specs = {name: P() if name in ("key", "value") else EACH for name in given}
    for quantization in (None, "int8"):
        run = functools.partial(
            gradients, implementation=implementation, quantization=quantization, is_causal=True,
            dropout_rate=0.3, dropout_rng=jax.random.key(3),
        )  # fmt: skip
        run = jax.jit(run)
        on_mesh = placed(mesh, given, specs)
        compiled = run.lower(on_mesh).compile()
        assert collectives(compiled)["all-gather"] == 0
        actual = compiled(on_mesh)
        assert actual[0][0].sharding.is_equivalent_to(NamedSharding(mesh, EACH), 4)
        assert_close(actual, run(given), 2e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", ["cpu", "metal", "xla"])
def test_dropout_does_not_know_of_shards(implementation, axis_type, random_operands, require):
    require(implementation)
    q, k, *_ = random_operands(B, T, S, N, K, S)
    ones = jnp.broadcast_to(jnp.eye(S, dtype=jnp.float32)[None, :, None], (B, S, K, S))
    rng = jax.random.key(7)

    def dropped(q, k, v):
        return jax_gluon.dot_product_attention(
            q, k, v, implementation=implementation, dropout_rate=0.4, dropout_rng=rng
        )

    on_mesh = placed(mesh_of(axis_type), (q, k, ones), (EACH,) * 3)
    weights = jnp.transpose(jax.jit(dropped)(*on_mesh), (0, 2, 1, 3))
    mask = jax_gluon.dropout_mask(rng, (B, N, T, S), 0.4)
    np.testing.assert_array_equal(np.asarray(weights) != 0, mask)


FORMATS = {
    "row": QuantSpec(center=True, rotate=True),
    "group": QuantSpec(4, granularity="group", block_size=4),
    "channel": QuantSpec(granularity="channel", symmetric=False),
    "channel_block": QuantSpec(
        4,
        symmetric=False,
        granularity="channel_block",
        center=True,
        float_minimum=True,
        token_powers=True,
    ),
    "tensor": QuantSpec(granularity="tensor"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_made_where_their_heads_are(name, random_operands, require):
    """Of one scale for all, devices exchange the extremes: 3 reductions of a number each."""
    require("cpu")
    x = random_operands(B, 40, 40, N, K, H)[0]
    lengths = jnp.asarray([40, 3, 0, 17], jnp.int32)
    for implementation in ("cpu", "xla"):
        run = jax.jit(
            functools.partial(jax_gluon.quantize, spec=FORMATS[name], implementation=implementation)
        )
        for axis_type in (AxisType.Auto, AxisType.Explicit):
            mesh = mesh_of(axis_type)
            on_mesh = placed(mesh, (x, lengths), (EACH, P(BATCH)))
            compiled = run.lower(on_mesh[0], lengths=on_mesh[1]).compile()
            assert collectives(compiled) == ({"all-reduce": 3} if name == "tensor" else {})
            codes = compiled(on_mesh[0], lengths=on_mesh[1])
            assert codes.data.sharding.is_equivalent_to(NamedSharding(mesh, EACH), 4)
            for actual, expected in zip(
                jax.tree.leaves(codes), jax.tree.leaves(run(x, lengths=lengths)), strict=True
            ):
                np.testing.assert_array_equal(actual, expected)
            values = jax.jit(lambda codes: codes.dequantize())
            assert collectives(values.lower(codes).compile()) == {}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("quantization", "window"), [("int8", 20), ("int4", None)])
def test_a_cache_stays_where_it_is(quantization, window, axis_type, random_operands, require):
    require("cpu")
    q, k, v, _ = random_operands(B, 37, 37, N, K, H)
    cache = QuantizedKVCache.create(B, 64, K, H, quantization=quantization, window=window)

    def run(cache, q, k, v):
        cache = cache.append(k, v).append(k[:, :3], v[:, :3], [3, 1, 0, 2])
        return cache, cache.attention(q[:, :5]), cache.attention(q[:, :1])

    mesh = mesh_of(axis_type)
    specs = jax.tree.map(lambda x: P(BATCH) if x.ndim == 1 else EACH, cache)
    on_mesh = (placed(mesh, cache, specs), *placed(mesh, (q, k, v), (EACH,) * 3))
    compiled = jax.jit(run).lower(*on_mesh).compile()
    assert collectives(compiled)["all-gather"] == 0
    actual = compiled(*on_mesh)
    for x, before in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(on_mesh[0]), strict=True):
        assert x.sharding.is_equivalent_to(before.sharding, x.ndim)
    assert_close(actual, jax.jit(run)(cache, q, k, v))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_vmap_of_a_sharded_call(implementation, arguments, require):
    """The axis that vmap adds may be sharded as well."""
    require(implementation)
    q, k, v, d_out = (arguments[name] for name in ("query", "key", "value", "d_out"))

    def loss(q, k, v, d_out):
        out = jax_gluon.dot_product_attention(q, k, v, implementation=implementation)
        return jnp.sum(out * d_out)

    each = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 1, None))
    given = (jnp.stack([q, 2 * q]), k, jnp.stack([v, -v], 1), d_out)
    batch, heads = P(None, BATCH, None, HEADS), P(BATCH, None, None, HEADS)
    for specs in (
        (batch, EACH, P(BATCH, None, None, HEADS), EACH),
        (heads, P(None, None, HEADS), P(None, BATCH, None, HEADS), P(None, None, HEADS)),
    ):
        on_mesh = placed(mesh_of(), given, specs)
        compiled = jax.jit(each).lower(*on_mesh).compile()
        assert collectives(compiled)["all-gather"] == 0
        assert_close(compiled(*on_mesh), jax.jit(each)(*given))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_derivatives_of_any_mode(implementation, arguments, require):
    require(implementation)
    given = chosen(arguments, "bias", "sinks")
    tangents = {name: jnp.cos(given[name]) for name in ("query", "value", "bias")}
    keywords = dict(implementation=implementation, differentiation="any")

    def derivatives(given, tangents):
        def loss(floats):
            return attention(given | floats, **keywords)[0]

        floats = {name: given[name] for name in tangents}
        return jax.jvp(loss, (floats,), (tangents,)), jax.grad(loss)(floats)

    specs = {name: SPECS[name] for name in given}
    mesh = mesh_of()
    on_mesh = placed(mesh, given, specs)
    moved = placed(mesh, tangents, {name: SPECS[name] for name in tangents})
    compiled = jax.jit(derivatives).lower(on_mesh, moved).compile()
    assert collectives(compiled)["all-gather"] == 0
    assert_close(compiled(on_mesh, moved), jax.jit(derivatives)(given, tangents), 2e-5)


@pytest.mark.parametrize("implementation", [None, "cpu", "xla"])
def test_tokens_and_rows_may_be_sharded(implementation, arguments, require):
    """They are gathered; so are heads and entries of other parts than the query's."""
    require("cpu")
    given = chosen(arguments)
    run = jax.jit(functools.partial(gradients, implementation=implementation))
    mesh = mesh_of(shape=(2, 2))
    specs = {
        "query": P(None, None, BATCH, HEADS), "key": P(HEADS, None, BATCH),
        "value": P(None, None, None, HEADS), "d_out": P((BATCH, HEADS)),
    }  # fmt: skip
    assert_close(run(placed(mesh, given, specs)), run(given), 2e-5)


PLACES = {
    "permuted": ((2, 2), [3, 1, 0, 2], EACH),
    "transposed": ((2, 2), [4, 5, 1, 3], P(HEADS, None, BATCH)),
    "three_by_two": ((3, 2), [5, 4, 3, 2, 1, 0], EACH),
    "two_by_three": ((2, 3), range(6), P(HEADS, None, BATCH)),
    "heads_alone": ((3, 2), range(6), P(None, None, (HEADS, BATCH))),
    "batch_alone": ((2, 3), range(6), P((BATCH, HEADS))),
}


@pytest.mark.parametrize("place", PLACES)
def test_any_order_of_devices_and_axes(place, random_operands, require):
    """A device finds its heads, for bias and dropout, wherever it is in the mesh."""
    require("cpu")
    shape, order, spec = PLACES[place]
    devices = np.array(jax.devices())[list(order)]
    mesh = jax.sharding.Mesh(devices.reshape(shape), (BATCH, HEADS))
    q, k, v, d_out = random_operands(6, T, S, 12, 6, H)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((12, T, S)), jnp.float32)
    given = {"query": q, "key": k, "value": v, "d_out": d_out, "bias": bias}
    specs = dict.fromkeys(given, spec) | {"bias": P(*spec[2:3])}
    keywords = dict(dropout_rate=0.3, dropout_rng=jax.random.key(3))
    run = jax.jit(functools.partial(gradients, implementation="cpu", **keywords))
    on_mesh = placed(mesh, given, specs)
    compiled = run.lower(on_mesh).compile()
    assert collectives(compiled)["all-gather"] == 0
    actual = compiled(on_mesh)
    assert actual[1]["key"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    assert_close(actual, run(given), 2e-5)


@pytest.mark.parametrize(("implementation", "quantization"), [("cpu", "int8"), ("xla", None)])
def test_pmap(implementation, quantization, arguments, require):
    if not hasattr(jax, "pmap"):
        pytest.skip("this JAX has no pmap")
    require(implementation)
    given = chosen(arguments, "sinks")
    sinks = given.pop("sinks")
    keywords = dict(implementation=implementation, quantization=quantization)
    run = lambda given: gradients(given | {"sinks": sinks}, **keywords)  # noqa: E731
    stacked = {name: x[:, None] for name, x in given.items()}
    actual = jax.pmap(run)(stacked)
    each = [run({name: x[i] for name, x in stacked.items()}) for i in range(B)]
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *each))


@pytest.mark.parametrize("implementation", [None, "cpu", "xla"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_shard_map(implementation, quantization, arguments, require):
    require(implementation or "cpu")
    given = chosen(arguments, "bias", "sinks", "mask")
    run = functools.partial(attention, implementation=implementation, quantization=quantization)

    def of_part(given):
        loss, results = run(given)
        return loss[None, None], results

    mapped = jax.shard_map(
        of_part, mesh=mesh_of(), in_specs=({name: SPECS[name] for name in given},),
        out_specs=(P(BATCH, HEADS), (EACH, EACH)),
    )  # fmt: skip

    def total(floats):
        loss, results = mapped(given | floats)
        return jnp.sum(loss), results

    floats = {name: given[name] for name in FLOATS}
    compiled = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(floats).compile()
    assert collectives(compiled)["all-gather"] == 0
    (_, results), of_floats = compiled(floats)
    expected = functools.partial(
        gradients, implementation=implementation, quantization=quantization
    )
    assert_close((results, of_floats), jax.jit(expected)(given), 2e-5)
