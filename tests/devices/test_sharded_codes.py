"""Codes and caches of them over the devices of a mesh: those of one device, made where they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from jax_gluon import QuantizedKVCache, QuantSpec
from tests.support.meshes import (
    BATCH,
    EACH,
    B,
    H,
    K,
    N,
    assert_close,
    collectives,
    mesh_of,
    placed,
)

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


@pytest.mark.parametrize(
    ("axis_type", "quantization", "window"),
    [(AxisType.Auto, "int4", None), (AxisType.Explicit, "int8", 20)],
)
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
