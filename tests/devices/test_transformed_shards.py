"""JAX's transformations of attention over the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_gluon
from tests.support.meshes import (
    BATCH,
    EACH,
    FLOATS,
    HEADS,
    SPECS,
    B,
    assert_close,
    attention,
    chosen,
    collectives,
    gradients,
    mesh_of,
    placed,
)


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


@pytest.mark.parametrize(
    ("implementation", "quantization"), [(None, "int8"), ("cpu", None), ("xla", None)]
)
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
