"""`PagedKVCache`: bit for bit a `QuantizedKVCache` of the same tokens, in few pages."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import AttentionQuantization, PagedKVCache, QuantizedKVCache, QuantSpec
from tests.support.caches import (
    CAPACITY,
    KINDS,
    B,
    H,
    K,
    N,
    V,
    append,
    assert_alike,
    attend,
    create,
    tokens,
)

few_formats = pytest.mark.parametrize("name", ["int8", "int4"])
# Pages as short as can be, where the tokens of a center are on two.
SIZES = {"int8": 16, "int4": 32, "blocks": 16, "rotated": 64}


@functools.partial(jax.jit, donate_argnums=0)
def generate(cache, steps):
    def step(cache, now):
        key, value, query, counts = now
        cache = cache.append(key, value, counts)
        return cache, cache.attention(query)

    return jax.lax.scan(step, cache, steps)


@pytest.mark.parametrize("name", ["int8", "blocks"])
def test_generation_is_that_of_the_dense_cache(name):
    """In a scan, donated, entries of unlike lengths, some of which pause; pages grow meanwhile."""
    key, value, query = tokens(60)
    rng = np.random.default_rng(5)
    steps = [np.swapaxes(x[:, :40], 0, 1)[:, :, None] for x in (key, value, query)]
    steps.append(rng.integers(0, 2, (40, B)).astype(np.int32))
    outs = []
    for kind in KINDS:
        cache = append(create(kind, name, page_size=SIZES[name]), key, value, [60, 33, 0])
        cache, out = generate(cache, steps)
        outs.append((cache, np.asarray(out)))
    (dense, expected), (paged, out) = outs
    np.testing.assert_array_equal(out, expected)
    assert_alike(paged, dense, query)
    needed = np.sum(-(-np.asarray(dense.length) // paged.page_size))
    assert int(paged.free_pages) == 24 - needed


@pytest.mark.parametrize("name", ["int4"])
def test_as_xla_and_differentiated(name, oracle, relative_error):
    """Both gather the pages."""
    key, value, query = tokens(60)
    lengths = np.array([60, 33, 7])
    dense, paged = (append(create(kind, name), key, value, lengths) for kind in KINDS)
    for T in (1, 6):
        out, expected = (x.attention(query[:, :T], implementation="xla") for x in (paged, dense))
        np.testing.assert_array_equal(out, expected)

    def loss(query, cache, mode):
        return jnp.sum(cache.attention(query, quantization=None, differentiation=mode) ** 2)

    for mode in ("reverse", "any"):
        gradient, expected = (jax.grad(loss)(query[:, :6], x, mode) for x in (paged, dense))
        assert np.any(expected)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_window(oracle, relative_error):
    key, value, query = tokens(60)
    cache = append(create("paged", "int8", window=9), key, value, [60, 33, 7])
    dense = append(create("dense", "int8"), key, value, [60, 33, 7])
    exact = dense.key.dequantize(), dense.value.dequantize()
    for T in (1, 6):
        out = cache.attention(query[:, :T], quantization=None)
        for b, length in enumerate((60, 33, 7)):
            rows = np.zeros((1, length, N, H), np.float32)
            rows[:, length - T :] = query[b, :T]
            k, v = (np.asarray(x)[b : b + 1, :length] for x in exact)
            expected = oracle(rows, k, v, is_causal=True, local_window_size=(8, 0)).out
            assert relative_error(out[b : b + 1], expected[:, length - T :]) < 1e-5


@few_formats
def test_forks_share_a_prefix_until_they_write(name):
    """At every place in a block, a page and a center; whoever goes, the others stay."""
    prefix_key, prefix_value, query = tokens(60)
    key, value, _ = tokens(60, 3)
    for length in (64 // 2, 50, 20):
        counts = np.array([length, 0, 0], np.int32)
        cache = append(create("paged", name), prefix_key, prefix_value, counts)
        pages = int(cache.free_pages)
        forked = jax.jit(lambda cache, i: cache.fork(0, i))
        cache = forked(forked(cache, 1), 2)
        assert int(cache.free_pages) == pages
        whole = create("dense", name)
        same = [np.repeat(x[:1], B, 0) for x in (prefix_key, prefix_value)]
        whole = append(whole, *same, np.full(B, length, np.int32))
        assert_alike(cache, whole, query)
        own = np.array([0, 1, 40], np.int32)
        cache, whole = (append(x, key, value, own) for x in (cache, whole))
        assert_alike(cache, whole, query)
        # The entry that they were made of, then takes another sequence.
        cache, whole = (x.reset(0) for x in (cache, whole))
        cache, whole = (append(x, value[..., :1] + key, value, [60, 0, 1]) for x in (cache, whole))
        assert_alike(cache, whole, query)


def test_pages_that_are_shared_are_counted_once():
    key, value, _ = tokens(60)
    cache = create("paged", "int8", pages=9, page_size=16)
    cache = append(cache, key, value, [50, 0, 0])  # four pages
    assert int(cache.free_pages) == 5
    cache = cache.select([0, 0, 0])
    assert int(cache.free_pages) == 5
    cache = append(cache, key, value, [0, 1, 0])  # copies the last
    assert int(cache.free_pages) == 4
    cache = append(cache, key, value, [0, 13, 0])  # its own, and no other
    assert int(cache.free_pages) == 4
    cache = append(cache, key, value, [0, 1, 0])  # one more
    assert int(cache.free_pages) == 3
    assert int(cache.reset(1).free_pages) == 5
    assert int(cache.reset([0, 2]).free_pages) == 4
    assert int(cache.reset([0, 1, 2]).free_pages) == 9


@pytest.mark.parametrize("name", ["int8"])
def test_where_no_page_is_left(name):
    """Tokens without one are counted, and those of others are what they were."""
    key, value, query = tokens(60)
    cache = create("paged", name, pages=3)
    cache = append(cache, key, value, [60, 5, 60])
    np.testing.assert_array_equal(cache.length, [60, 5, 0])
    np.testing.assert_array_equal(cache.dropped, [0, 0, 60])
    assert int(cache.free_pages) == 0
    cache = append(cache, key[:, ::-1], value[:, ::-1], [10, 10, 0])
    np.testing.assert_array_equal(cache.length, [64, 15, 0])
    np.testing.assert_array_equal(cache.dropped, [6, 0, 60])
    dense = append(create("dense", name), key, value, [60, 5, 0])
    dense = append(dense, key[:, ::-1], value[:, ::-1], [4, 10, 0])
    out, expected = (attend(x, query[:, :1]) for x in (cache, dense))
    np.testing.assert_array_equal(out[1:], expected[1:])
    # A shared page can't be copied: what is on it stays.
    shared = cache.fork(1, 2)
    np.testing.assert_array_equal(shared.dropped, [6, 0, 0])
    full = append(shared, key, value, [0, 3, 3])
    np.testing.assert_array_equal(full.dropped, [6, 3, 3])
    for T in (1, 6):
        out = full.reset(0).attention(query[:, :T])  # as those for what was dropped
        assert np.isfinite(out).all()
    back = full.rewind([0, 3, 3])
    np.testing.assert_array_equal(attend(back, query)[1:], attend(shared, query)[1:])
    # With a page given back there is room again.
    freed = append(shared.reset(0), key, value, [0, 3, 3])
    np.testing.assert_array_equal(freed.length, [0, 18, 18])


@pytest.mark.parametrize("stale", [1e30, np.nan])
@pytest.mark.parametrize("name", ["int4"])
def test_pages_that_others_had_are_as_new(name, stale, implementation):
    key, value, query = tokens(60)
    former = np.where(np.arange(60) < 3, 1, stale).astype(np.float32)[None, :, None, None]
    used = create("paged", name, pages=6)
    used = append(used, key * former, value * former).reset([0, 1, 2])
    used = append(used, key, value, [9, 0, 40])
    fresh = append(create("dense", name), key, value, [9, 0, 40])
    if implementation == "metal":
        with pytest.raises(ValueError, match="Metal has no kernels for keys and values in pages"):
            used.attention(query[:, :1], implementation=implementation)
        return
    for T in (5, 1):
        outs = (x.attention(query[:, :T], implementation=implementation) for x in (used, fresh))
        np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("name", ["int4"])
def test_a_long_life(name):
    """Whatever is done to both caches, in whichever order; few enough pages to run out of."""
    rng = np.random.default_rng(8)
    paged = create("paged", name, page_size=SIZES[name], pages=3 * CAPACITY // SIZES[name])
    dense = create("dense", name)
    key, value, query = tokens(60)
    reset, fork, select, rewind = (
        jax.jit(each)
        for each in (
            lambda x, rows: x.reset(rows),
            lambda x, rows: x.select(rows),
            lambda x, rows: x.select(rows),
            lambda x, n: x.rewind(n),
        )
    )
    ran = collections.Counter()
    for step in range(60):
        kind = rng.choice(["append", "append", "append", "reset", "fork", "select", "rewind"])
        ran[kind] += 1
        if kind == "append":
            order = rng.permutation(60)
            counts = rng.choice([0, 1, 2, 17, 31], B).astype(np.int32)
            counts = np.minimum(counts, CAPACITY - np.asarray(dense.length)).astype(np.int32)
            paged, dense = (append(x, key[:, order], value[:, order], counts)
                            for x in (paged, dense))  # fmt: skip
        elif kind == "reset":
            rows = rng.random(B) < 0.4
            paged, dense = (reset(x, rows) for x in (paged, dense))
        elif kind in ("fork", "select"):
            rows = np.arange(B) if kind == "fork" else rng.integers(0, B, B)
            rows[rng.integers(B)] = rng.integers(B)
            apply = fork if kind == "fork" else select
            paged, dense = (apply(x, rows.astype(np.int32)) for x in (paged, dense))
        else:
            n = rng.integers(0, min(20, dense.rewindable) + 1, B).astype(np.int32)
            paged, dense = (rewind(x, n) for x in (paged, dense))
        assert_alike(paged, dense, query)
        lengths = np.asarray(paged.length)
        numbers = {
            int(page)
            for row, length in zip(np.asarray(paged.table), lengths, strict=True)
            for page in row[: -(-length // paged.page_size)]
        }
        assert int(paged.free_pages) == paged.key.shape[0] - len(numbers), step
    assert min(ran.values()) >= 3


@pytest.mark.parametrize("kind", KINDS)
@few_formats
def test_a_step_copies_no_cache(name, kind, require):
    """Donated, alone and in a scan: what is of a cache's size is written in place."""
    require("cpu")
    make = {
        "dense": lambda: QuantizedKVCache.create(1, 4096, 4, 64, quantization=name),
        "paged": lambda: PagedKVCache.create(1, 64, 4, 64, quantization=name),
    }[kind]
    caches = jax.eval_shape(lambda: [make(), make()])
    sizes = {
        x.size * x.dtype.itemsize
        for cache in caches
        for part in (cache.key, cache.value)
        for x in jax.tree.leaves((part.data, part.scale, part.minimum))
    }

    def step(caches, now):
        query, key, value = now
        caches = [cache.append(key, value) for cache in caches]
        return caches, [cache.attention(query) for cache in caches]

    for lead in ((), (16,)):
        run = step if not lead else lambda caches, x: jax.lax.scan(step, caches, x)
        new = [jax.ShapeDtypeStruct((*lead, 1, 1, n, 64), jnp.float32) for n in (8, 4, 4)]
        program = jax.jit(run, donate_argnums=0).lower(caches, new).compile()
        least = min(sizes)
        found = [line for line in program.as_text().splitlines() if copied(line) >= least]
        assert not found, found[:3]
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * sum(sizes)
        assert memory.temp_size_in_bytes < max(sizes)


def copied(line):
    """Bytes of what a line of a program copies or converts."""
    found = re.search(
        r"= (\w+)\[([\d,]+)\]\S* (copy|convert|copy-start|transpose|concatenate)\(", line
    )
    if not found:
        return 0
    width = int(re.sub(r"\D", "", found[1]) or 8) // 8
    return np.prod([int(n) for n in found[2].split(",")]) * width


def test_vmap():
    name = "int4"
    caches = [append(create("paged", name), *tokens(60, s)[:2], [40, 7, 0]) for s in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    key, value, query = (np.stack(x) for x in zip(tokens(60, 3), tokens(60, 4), strict=True))

    def step(cache, key, value, query):
        cache = cache.append(key[:, :9], value[:, :9])
        return cache, cache.attention(query[:, :1]), cache.fork(0, 2).attention(query[:, :1])

    mapped = jax.jit(jax.vmap(step))(stacked, key, value, query)
    for i, cache in enumerate(caches):
        own, *outs = step(cache, key[i], value[i], query[i])
        for x, y in zip(jax.tree.leaves(mapped[0]), jax.tree.leaves(own), strict=True):
            np.testing.assert_array_equal(x[i], y)
        for out, expected in zip(mapped[1:], outs, strict=True):
            np.testing.assert_allclose(out[i], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["int4"])
def test_strict_modes(name, strict_modes):
    key, value, query = tokens(60)
    cache = create("paged", name).append(key, value, [40, 3, 0]).append(key[:, :1], value[:, :1])
    out = cache.fork(0, 2).attention(query[:, :2])
    assert np.isfinite(out).all()


def test_no_gradient():
    key, value, query = tokens(60)

    def loss(query, key):
        return create("paged", "int4").append(key, value).attention(query).sum()

    d_query, d_key = jax.grad(loss, argnums=(0, 1))(query[:, :4], key)
    assert d_query.any()
    assert not d_key.any()


BLOCKS = AttentionQuantization(
    None, QuantSpec(granularity="block", block_size=24), QuantSpec(granularity="row")
)
BAD = {
    "pages": (dict(pages=0), ValueError, "pages is 0; allowed: an int of at least 1"),
    "page_size": (dict(page_size=48), ValueError, "page_size is 48; allowed: 16, 32, 64, 128, 256"),
    "short": (dict(page_size=8), ValueError, "page_size is 8; allowed: 16, 32, 64, 128, 256"),
    "type": (dict(page_size=16.0), TypeError, "page_size is 16.0; allowed: an int of at least 1"),
    "block": (
        dict(page_size=16, quantization="int4"), ValueError,
        "page_size is 16; allowed: 32, 64, 128, 256",
    ),
    "odd_block": (
        dict(quantization=BLOCKS), ValueError,
        "quantization is in blocks of 24 tokens of keys and 1 of values; allowed: blocks that div",
    ),
    "capacity": (dict(capacity=100), ValueError, "capacity is 100; allowed: a multiple of page_si"),
    "window": (dict(window=0), ValueError, "window is 0; allowed: an int of at least 1"),
    "name": (dict(quantization="int2"), ValueError, 'quantization is "int2"; allowed: "int8", "i'),
}  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "complaint"), BAD.values(), ids=BAD)
def test_bad_sizes(given, kind, complaint):
    given = dict(batch=B, pages=8, kv_heads=K, head_dim=H) | given
    with pytest.raises(kind) as error:
        PagedKVCache.create(**given)
    assert str(error.value).startswith(f"jax_gluon.PagedKVCache.create: {complaint}")


def test_bad_forks_and_devices(monkeypatch):
    cache = create("paged", "int8")
    for given, complaint in (
        ((3, 0), "source is 3; allowed: 0 to 2, entries of the batch"),
        ((0, -1), "target is -1; allowed: 0 to 2, entries of the batch"),
        (([0, 1], 2), r"source is of shape \[2\]; allowed: one entry of the batch"),
    ):
        with pytest.raises(ValueError, match=f"PagedKVCache.fork: {complaint}"):
            cache.fork(*given)
    with pytest.raises(TypeError, match=r"fork: source is of dtype float64; allowed: an integer"):
        cache.fork(0.0, 1)
    # Whether or not there is a device.
    monkeypatch.setattr(jax_gluon._arguments, "check_metal", lambda check: None)
    query = np.zeros((B, 1, N, H), np.float32)
    with pytest.raises(ValueError, match="Metal has no kernels for keys and values in pages"):
        cache.attention(query, implementation="metal")
    assert cache.value.shape[-1] == V
