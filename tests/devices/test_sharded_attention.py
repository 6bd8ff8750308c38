"""Batch and heads over the devices of a mesh: results of one device, and nothing is gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from tests.package.test_documentation import ROOT, examples
from tests.support.meshes import (
    BATCH,
    EACH,
    HEADS,
    SPECS,
    B,
    H,
    K,
    N,
    S,
    T,
    assert_close,
    chosen,
    collectives,
    gradients,
    mesh_of,
    placed,
)

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


@pytest.mark.parametrize(
    ("implementation", "heads", "kv_heads"),
    [("cpu", 8, 2), ("cpu", 8, 1), ("cpu", 12, 3), ("cpu", 16, 8), ("xla", 12, 3)],
)
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


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
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


def test_the_examples_of_the_page_run():
    namespace = {}
    for example in examples(ROOT / "docs/more-than-one-device.md"):
        exec(example, namespace)
    assert namespace["mesh"].size == 6
