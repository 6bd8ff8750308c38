"""Caches of both kinds for tests: small, of two formats and of several, fed from one sequence."""

import dataclasses
import functools

import jax
import numpy as np

from jax_gluon import AttentionQuantization, PagedKVCache, QuantizedKVCache, QuantSpec
from jax_gluon._quantization.formats import PRESETS

B, N, K, H, V, CAPACITY = 3, 4, 2, 16, 12, 128
MINIMUM = dict(symmetric=False, float_minimum=True)
FORMATS = {
    **PRESETS,
    # Blocks of both operands, one of them centered, of unlike lengths.
    "blocks": AttentionQuantization(
        None,
        QuantSpec(granularity="block", block_size=4, symmetric=False),
        QuantSpec(4, granularity="channel_block", block_size=16, center=True, **MINIMUM),
    ),
    "rotated": AttentionQuantization(
        None, QuantSpec(center=True, rotate=True), QuantSpec(granularity="group", block_size=4)
    ),
}
KINDS = {"dense": QuantizedKVCache, "paged": PagedKVCache}


def create(kind, name, *, batch=B, pages=24, page_size=32, **keywords):
    """An empty cache of a format."""
    given = dict(value_dim=V, quantization=FORMATS[name], **keywords)
    if kind == "dense":
        return QuantizedKVCache.create(batch, CAPACITY, K, H, **given)
    given |= dict(page_size=page_size, capacity=CAPACITY)
    return PagedKVCache.create(batch, pages, K, H, **given)


@functools.cache
def tokens(count, seed=0, batch=B):
    """Keys and values that are not centered, some of them large, and queries."""
    rng = np.random.default_rng([count, seed, batch])
    shapes = (batch, count, K, H), (batch, count, K, V), (batch, count, N, H)
    key, value, query = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    large = np.where(rng.random((batch, count, 1, 1)) < 0.1, 20, 1).astype(np.float32)
    return key * large + np.float32(3), value - np.float32(2), query


@jax.jit
def append(cache, key, value, lengths=None):
    return cache.append(key, value, lengths)


@jax.jit
def attend(cache, query):
    return cache.attention(query)


def assert_alike(cache, expected, query):
    """The same tokens, bit for bit: what attention gives, and what more of them become."""
    for name in ("length", "dropped"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(expected, name), name)
    has_tokens = np.asarray(cache.length) > 0
    for of in ("key", "value"):
        center, other = (getattr(x, of).center for x in (cache, expected))
        if center is not None:
            np.testing.assert_array_equal(center[has_tokens], other[has_tokens])
    for T in (1, 6):
        np.testing.assert_array_equal(attend(cache, query[:, :T]), attend(expected, query[:, :T]))


def with_length(cache, length):
    """What a slot is that others had before."""
    return dataclasses.replace(cache, length=np.asarray(length, np.int32))
