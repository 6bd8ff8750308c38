"""Meshes of CPU devices, what is placed on them, and the collectives of what is compiled."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon

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
