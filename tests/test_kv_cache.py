"""`QuantizedKVCache`: the codes of all tokens at once, however they came; rings; full caches."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import AttentionQuantization, QuantizedKVCache, QuantSpec

MINIMUM = dict(symmetric=False, float_minimum=True)
FORMATS = {
    "int8": "int8",
    "int4": "int4",
    "mixed": AttentionQuantization(
        None,
        QuantSpec(granularity="block", block_size=4, symmetric=False),
        QuantSpec(4, granularity="channel_block", block_size=8, **MINIMUM),
    ),
}
every_format = pytest.mark.parametrize("quantization", FORMATS.values(), ids=FORMATS)
B, N, K, H, V = 2, 4, 2, 16, 12


def create(capacity, quantization="int8", **keywords):
    return QuantizedKVCache.create(
        B, capacity, K, H, value_dim=V, quantization=quantization, **keywords
    )


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((B, count, K, x)), jnp.float32) for x in (H, V))


def append_all(cache, key, value, pattern):
    start = 0
    for count in pattern:
        cache = cache.append(key[:, start : start + count], value[:, start : start + count])
        start += count
    return cache


@every_format
@pytest.mark.parametrize("pattern", [(70,), (40, 1, 1, 7, 21), (1,) * 9 + (31, 30), (33, 32, 5)])
def test_codes_are_those_of_all_tokens_at_once(quantization, pattern):
    key, value = tokens(70)
    cache = append_all(create(96, quantization), key, value, pattern)
    np.testing.assert_array_equal(cache.length, [70, 70])
    assert not cache.dropped.any()
    for cached, new in ((cache.key, key), (cache.value, value)):
        spec = dataclasses.replace(cached.spec, center=False)
        centred = new if cached.mean is None else new - cached.mean
        whole = jax.jit(lambda x, spec=spec: jax_gluon.quantize(x, spec))(centred)
        np.testing.assert_array_equal(cached.data[:, :70], whole.data)
        blocks = whole.scale.shape[1]
        for name in ("scale", "zero_point", "minimum"):
            if getattr(whole, name) is not None:
                np.testing.assert_array_equal(
                    getattr(cached, name)[:, :blocks], getattr(whole, name)
                )
    if cache.key.mean is not None and pattern[0] >= 32:
        np.testing.assert_allclose(
            cache.key.mean[:, 0], key[:, : pattern[0]].mean(1), rtol=1e-5, atol=1e-6
        )


@every_format
def test_generation_loop(quantization, oracle, relative_error):
    """A scan under jit with the cache donated: each row is attention over the tokens so far."""
    key, value = tokens(48)
    query = jnp.asarray(np.random.default_rng(1).standard_normal((B, 48, N, H)), jnp.float32)
    cache = create(64, quantization).append(key[:, :40], value[:, :40])
    prefill = cache.attention(query[:, :40])

    def step(cache, now):
        q, k, v = (x[:, None] for x in now)
        cache = cache.append(k, v)
        return cache, cache.attention(q)[:, 0]

    rest = [jnp.swapaxes(x[:, 40:], 0, 1) for x in (query, key, value)]
    loop = jax.jit(lambda cache, rest: jax.lax.scan(step, cache, rest), donate_argnums=0)
    cache, rows = loop(cache, tuple(rest))
    out = jnp.concatenate([prefill, jnp.swapaxes(rows, 0, 1)], axis=1)
    np.testing.assert_array_equal(cache.length, [48, 48])
    for i in (0, 17, 39, 40, 45, 47):
        # Codes of an unfinished block change as it fills: those of the moment are the reference.
        then = create(64, quantization).append(key[:, : max(i + 1, 40)], value[:, : max(i + 1, 40)])
        count = max(i + 1, 40)
        exact = [x.dequantize()[:, :count] for x in (then.key, then.value)]
        visible = jnp.arange(count) <= i
        expected = oracle(query[:, i : i + 1], *exact, mask=visible[None, None, None])
        assert relative_error(out[:, i : i + 1], expected.out) <= 1.3e-2, i


@every_format
def test_ragged_lengths(quantization):
    key, value = tokens(50)
    cache = create(64, quantization).append(key[:, :40], value[:, :40], jnp.asarray([40, 33]))
    cache = cache.append(key[:, 40:], value[:, 40:], jnp.asarray([3, 10]))
    np.testing.assert_array_equal(cache.length, [43, 43])
    order = (np.arange(43), np.r_[np.arange(33), np.arange(40, 50)])
    for b in range(B):
        own = QuantizedKVCache.create(1, 64, K, H, value_dim=V, quantization=quantization)
        split = (40, 33)[b]
        for part in (order[b][:split], order[b][split:]):
            own = own.append(key[b : b + 1, part], value[b : b + 1, part])
        for name in ("key", "value"):
            np.testing.assert_allclose(
                getattr(cache, name).dequantize()[b, :43],
                getattr(own, name).dequantize()[0, :43],
                atol=2e-2,
            )


@every_format
@pytest.mark.parametrize("pattern", [(64,) + (1,) * 20, (30, 30, 24), (7,) * 12])
def test_ring(quantization, pattern, oracle, relative_error):
    """Only the last `window` keys are seen, and they are there."""
    window, count = 20, sum(pattern)
    key, value = tokens(count)
    # No mean, so that the reference can be one-shot codes.
    if quantization == "int8":
        quantization = AttentionQuantization(None, QuantSpec(), QuantSpec())
    cache = append_all(create(64, quantization, window=window), key, value, pattern)
    query = jnp.asarray(np.random.default_rng(1).standard_normal((B, 3, N, H)), jnp.float32)
    whole = create(96, quantization).append(key, value)
    exact = [x.dequantize()[:, :count] for x in (whole.key, whole.value)]
    own = count - 3 + np.arange(3)[:, None]
    visible = (np.arange(count) <= own) & (np.arange(count) > own - window)
    expected = oracle(query, *exact, mask=visible[None, None])
    assert relative_error(cache.attention(query), expected.out) <= 1.3e-2
    one = oracle(query[:, 2:], *exact, mask=visible[None, None, 2:])
    assert relative_error(cache.attention(query[:, 2:]), one.out) <= 1.3e-2


@every_format
def test_past_the_capacity(quantization):
    key, value = tokens(45)
    full = create(32, quantization).append(key[:, :30], value[:, :30])
    cache = full.append(key[:, 30:], value[:, 30:], jnp.asarray([15, 1]))
    np.testing.assert_array_equal(cache.length, [32, 31])
    np.testing.assert_array_equal(cache.dropped, [13, 0])
    fits = full.append(key[:, 30:32], value[:, 30:32])
    for a, b in ((cache.key, fits.key), (cache.value, fits.value)):
        np.testing.assert_array_equal(a.data[0], b.data[0])
        np.testing.assert_array_equal(a.scale[0], b.scale[0])
    again = cache.append(key[:, :1], value[:, :1])
    np.testing.assert_array_equal(again.length, [32, 32])
    np.testing.assert_array_equal(again.dropped, [14, 0])
    np.testing.assert_array_equal(again.key.data[0], cache.key.data[0])


@every_format
def test_vmap_and_pytree(quantization):
    key, value = (jnp.stack([x, 2 * x]) for x in tokens(40))
    cache = create(64, quantization)
    mapped = jax.vmap(cache.append)(key, value)
    one = cache.append(key[1], value[1])
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(
            np.asarray(a[1], np.float32), np.asarray(b, np.float32), rtol=1e-6, atol=1e-6
        )
    leaves, structure = jax.tree.flatten(one)
    assert jax.tree.structure(jax.tree.unflatten(structure, leaves)) == structure
    assert one.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert one.capacity == 64


def test_strict_modes_and_x64(strict_modes, configure):
    with configure(jax_enable_x64=True):
        for quantization in FORMATS.values():
            cache = create(64, quantization, window=32)
            key, value = tokens(35)
            cache = cache.append(key, value, jnp.asarray([35, 3], jnp.int32))
            query = jnp.ones((B, 2, N, H), jnp.float32)
            assert np.isfinite(cache.attention(query)).all()


@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        (dict(capacity=0), ValueError, "capacity is 0; allowed: a positive int"),
        (dict(capacity=6.5), TypeError, "capacity is 6.5; allowed: an int"),
        (dict(batch=-1), ValueError, "batch is -1; allowed: a positive int"),
        (dict(kv_heads=0), ValueError, "kv_heads is 0; allowed: a positive int"),
        (dict(head_dim=True), TypeError, "head_dim is True; allowed: an int"),
        (dict(window=0), ValueError, "window is 0; allowed: a positive int"),
        (dict(window=33), ValueError, "capacity is 32; allowed: at least 33"),
        (dict(window=8, quantization="int4"), ValueError, "capacity is 32; allowed: at least 40"),
        (dict(capacity=33, quantization="int4"), ValueError, "capacity is 33; allowed: whole bl"),
        (dict(head_dim=7, quantization="int4"), ValueError, "key dim is 7; allowed: an even one"),
        (dict(quantization="int2"), ValueError, 'quantization is "int2"; allowed: "int8", "int4"'),
        (dict(quantization=None), TypeError, "quantization is a NoneType; allowed"),
        (
            dict(quantization=AttentionQuantization(key=QuantSpec())),
            ValueError, "quantization is without value; allowed",
        ),
        (
            dict(quantization=AttentionQuantization(
                key=QuantSpec(granularity="head"), value=QuantSpec()
            )),
            ValueError, 'quantization is "head" for key; allowed: row, group, block',
        ),
    ],
)  # fmt: skip
def test_bad_argument_of_create(changed, error, complaint):
    arguments = dict(batch=2, capacity=32, kv_heads=2, head_dim=16) | changed
    with pytest.raises(error, match=rf"QuantizedKVCache\.create: {re.escape(complaint)}"):
        QuantizedKVCache.create(**arguments)


@pytest.mark.parametrize(
    ("key", "value", "lengths", "complaint"),
    [
        ((B, 3, K, H + 1), (B, 3, K, V), None, "key is of shape [2, 3, 2, 17]; allowed: [2, T"),
        ((B, 3, K, H), (B, 3, K + 1, V), None, "value is of shape [2, 3, 3, 12]; allowed: [2"),
        ((B, 3, K, H), (B, 4, K, V), None, "value is of 4 tokens; allowed: key's, 3"),
        ((B, 0, K, H), (B, 0, K, V), None, "key is of shape [2, 0, 2, 16]; allowed"),
        ((3, K, H), (3, K, V), None, "key is of shape [3, 2, 16]; allowed"),
        ((B, 3, K, H), (B, 3, K, V), [1, 2, 3], "lengths is of shape (3,); allowed: shape [2]"),
    ],
)
def test_bad_argument_of_append(key, value, lengths, complaint):
    with pytest.raises(ValueError, match=rf"QuantizedKVCache\.append: {re.escape(complaint)}"):
        create(32).append(jnp.ones(key), jnp.ones(value), lengths)
