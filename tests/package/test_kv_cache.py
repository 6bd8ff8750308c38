"""`QuantizedKVCache`: however tokens come, codes are those of all at once; attention; limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import AttentionQuantization, QuantizedKVCache, QuantSpec
from jax_gluon._quantization.codes import to_bits
from jax_gluon._quantization.formats import PRESETS

MINIMUM = dict(symmetric=False, float_minimum=True)
# Queries stay in float, so that every error is the cache's.
FORMATS = {
    "int8": dataclasses.replace(PRESETS["int8"], query=None),
    "int4": dataclasses.replace(PRESETS["int4"], query=None),
    "mixed": AttentionQuantization(
        None,
        QuantSpec(granularity="block", block_size=4, symmetric=False),
        QuantSpec(4, granularity="channel_block", block_size=8, center=True, **MINIMUM),
    ),
}
# Rows, and blocks of both operands.
two_formats = pytest.mark.parametrize(
    "quantization", [FORMATS["int8"], FORMATS["mixed"]], ids=["int8", "mixed"]
)
ROTATED = AttentionQuantization(
    None, QuantSpec(center=True, rotate=True), QuantSpec(granularity="group", block_size=4)
)
every_format = pytest.mark.parametrize("quantization", FORMATS.values(), ids=FORMATS)
# Appends of 1, 7 and 40 tokens to 64: one compiled program each for every test of a format.
B, N, K, H, V, CAPACITY, WINDOW = 2, 4, 2, 16, 12, 64, 20


def create(quantization=FORMATS["int8"], **keywords):
    return QuantizedKVCache.create(
        B, CAPACITY, K, H, value_dim=V, quantization=quantization, **keywords
    )


@functools.cache
def tokens(count, seed=0):
    """Keys and values that are not centered, and queries."""
    rng = np.random.default_rng(seed)
    shapes = (B, count, K, H), (B, count, K, V), (B, count, N, H)
    key, value, query = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return key + np.float32(3), value - np.float32(2), query


def append_all(cache, key, value, pattern):
    assert sum(pattern) == key.shape[1]
    start = 0
    for count in pattern:
        cache = cache.append(key[:, start : start + count], value[:, start : start + count])
        start += count
    return cache


def at_once(cached, x):
    """The codes of all of `x`, less the center that `cached` keeps."""
    if cached.spec.token_powers:
        return jax_gluon.quantize(x, cached.spec)
    centered = x if cached.center is None else x - np.asarray(cached.center)[: len(x)]
    fresh = jax_gluon.quantize(centered, dataclasses.replace(cached.spec, center=False))
    center = None if cached.center is None else cached.center[: len(x)]
    return dataclasses.replace(fresh, spec=cached.spec, center=center)


def assert_same_codes(cached, x, positions=None):
    """Bit for bit, those at `positions` (default all) of `x`, in their slots."""
    whole, T = at_once(cached, x), x.shape[1]
    positions = np.arange(T) if positions is None else positions
    block = cached.spec.token_block
    for name in ("data", "scale", "zero_point", "minimum"):
        part, expected = getattr(cached, name), getattr(whole, name)
        assert (part is None) == (expected is None)
        if part is not None:
            expected = to_bits(expected)
            index = positions if name == "data" else np.unique(positions // block)
            np.testing.assert_array_equal(
                np.asarray(part)[:, index % part.shape[1]], np.asarray(expected)[:, index], name
            )


dequantized = jax.jit(lambda cached: cached.dequantize())


def stored(cache, count):
    """The first `count` keys and values that the codes stand for."""
    return [np.asarray(dequantized(x))[:, :count] for x in (cache.key, cache.value)]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


PATTERNS = [(40, 1, 1, 7, 7), (1, 7, 40, 1, 7)]


@every_format
@pytest.mark.parametrize("pattern", PATTERNS)
def test_codes_are_those_of_all_tokens_at_once(quantization, pattern):
    key, value, _ = tokens(56)
    cache, start = create(quantization), 0
    for count in pattern:
        stop = start + count
        cache = cache.append(key[:, start:stop], value[:, start:stop])
        start = stop
        if stop in (40, 56):
            # Those of an unfinished block as well.
            assert_same_codes(cache.key, key[:, :stop])
            assert_same_codes(cache.value, value[:, :stop])
    np.testing.assert_array_equal(cache.length, [56, 56])
    np.testing.assert_array_equal(cache.dropped, [0, 0])


# Up to, at and past the end of the first block, by two programs that other tests compile as well.
SPLITS = [(*[1] * 7, 7, 7, 1, 7, 1, 1, 1, 7, 7, 1), (40, 7)]


@pytest.mark.parametrize("splits", SPLITS)
def test_the_center_does_not_depend_on_how_tokens_came(splits):
    key, value, _ = tokens(47)
    key = key + 40.0 * (np.arange(H) < 4).astype(np.float32)
    cache = append_all(create(), key, value, splits)
    whole = jax_gluon.quantize(key, PRESETS["int8"].key)
    assert_equal(cache.key.center, whole.center)
    assert_equal(cache.key.data[:, :47], whole.data)
    assert_equal(cache.key.scale[:, :47], whole.scale)


@pytest.mark.parametrize("splits", SPLITS)
def test_powers_do_not_depend_on_how_tokens_came(splits, oracle, relative_error):
    """Large tokens among the first, of an unfinished block, and the last of all."""
    key, value, query = tokens(47)
    key = key * np.where(np.isin(np.arange(47), (0, 21, 36, 46)), 300, 1)[None, :, None, None]
    key[:, 40, 0] *= 1e4
    cache = append_all(create("int4"), key, value, splits)
    assert_equal(cache.key.center, jax_gluon.quantize(key, PRESETS["int4"].key).center)
    assert_same_codes(cache.key, key)
    for tokens_at in (slice(1, 21), slice(37, 40)):
        exact = np.asarray(stored(cache, 47)[0])[:, tokens_at]
        assert relative_error(exact, key[:, tokens_at]) < 0.05
    expected = oracle(query, *stored(cache, 47), is_causal=True).out[:, -1:]
    assert relative_error(cache.attention(query[:, -1:], quantization=None), expected) < 1e-5


def test_rotated_and_centered(relative_error):
    key, value, query = tokens(47)
    cache = create(ROTATED).append(key[:, :40], value[:, :40]).append(key[:, 40:], value[:, 40:])
    # A mean of unrotated rows would leave far more than rounding.
    assert cache.key.center.any()
    for exact, x in zip(stored(cache, 47), (key, value), strict=True):
        assert relative_error(exact, x) < 5e-3
    float_out = jax_gluon.dot_product_attention(query, key, value, is_causal=True)
    assert relative_error(cache.attention(query), float_out) < 2e-2


@every_format
def test_generation_in_a_scan(quantization, oracle, relative_error):
    """Donated, under jit: the loop step by step, each row causal attention over what is there."""
    key, value, query = tokens(56)
    first = create(quantization).append(key[:, :40], value[:, :40])

    def step(cache, now):
        q, k, v = (x[:, None] for x in now)
        cache = cache.append(k, v)
        return cache, cache.attention(q)[:, 0]

    rest = [jnp.swapaxes(x[:, 40:], 0, 1) for x in (query, key, value)]
    one_step, cache, rows = jax.jit(step), first, []
    for i in range(16):
        cache, row = one_step(cache, [x[i] for x in rest])
        rows.append(row[:, None])
        expected = oracle(query[:, 40 + i : 41 + i], *stored(cache, 41 + i)).out
        assert relative_error(rows[-1], expected) < 1e-5
    copy = jax.tree.map(jnp.copy, first)
    loop = jax.jit(lambda cache, rest: jax.lax.scan(step, cache, rest), donate_argnums=0)
    scanned, outputs = loop(copy, rest)
    assert copy.key.data.is_deleted()
    assert_equal(scanned, cache)
    np.testing.assert_allclose(jnp.swapaxes(outputs, 0, 1), np.concatenate(rows, 1), atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_quantize_float_queries(name):
    """As the function does with `quantization`, unless another is asked for or they are codes."""
    key, value, query = tokens(40)
    cache = create(name).append(key, value)
    codes = jax_gluon.quantize(query[:, -1:], PRESETS[name].query)
    last = dict(key_value_seq_lengths=cache.length)
    expected = jax_gluon.dot_product_attention(codes, cache.key, cache.value, **last)
    as_float = jax_gluon.dot_product_attention(query[:, -1:], cache.key, cache.value, **last)
    assert not np.array_equal(expected, as_float)
    np.testing.assert_array_equal(cache.attention(codes), expected)
    np.testing.assert_array_equal(cache.attention(query[:, -1:]), expected)
    np.testing.assert_array_equal(cache.attention(query[:, -1:], quantization=None), as_float)
    kept = create(FORMATS[name]).append(key, value)
    np.testing.assert_array_equal(kept.attention(query[:, -1:]), as_float)


@every_format
def test_many_queries_see_up_to_themselves(quantization, implementation, oracle, relative_error):
    key, value, query = tokens(47)
    cache = create(quantization)
    for part in (slice(0, 40), slice(40, 47)):
        cache = cache.append(key[:, part], value[:, part])
        exact = stored(cache, part.stop)
        expected = oracle(query[:, : part.stop], *exact, is_causal=True, scale=0.5).out[:, part]
        out = cache.attention(query[:, part], scale=0.5, implementation=implementation)
        assert relative_error(out, expected) < 1e-5
    if implementation == "xla":
        return
    capped = cache.attention(query[:, 40:], logits_soft_cap=2.0, quantization="int8")
    exact = stored(cache, 47)
    expected = oracle(query, *exact, is_causal=True, logits_soft_cap=2.0).out[:, 40:]
    assert relative_error(capped, expected) < 2e-2


@every_format
def test_ragged_lengths(quantization, oracle, relative_error):
    """Tokens past the lengths are ignored, NaN included."""
    key, value, query = (x.copy() for x in tokens(47))
    key[1, 33:40] = value[1, 33:40] = key[0, 43:] = value[0, 43:] = np.nan
    cache = create(quantization).append(key[:, :40], value[:, :40], [40, 33])
    cache = cache.append(key[:, 40:], value[:, 40:], np.asarray([3, 9], np.int32))
    cache = cache.append(key[:, :1], value[:, :1], [-1, 0])
    np.testing.assert_array_equal(cache.length, [43, 40])
    np.testing.assert_array_equal(cache.dropped, [0, 0])
    real = np.arange(43), np.r_[:33, 40:47]
    out = cache.attention(query[:, :1])
    last = cache.attention(query[:, :2])
    for b, index in enumerate(real):
        own = jax.tree.map(lambda x, b=b: x[b : b + 1], cache)
        k, v = key[b : b + 1, index], value[b : b + 1, index]
        assert_same_codes(own.key, k)
        assert_same_codes(own.value, v)
        exact = stored(own, len(index))
        expected = oracle(query[b : b + 1, :1], *exact).out
        assert relative_error(out[b : b + 1], expected) < 1e-5
        mask = np.arange(len(index)) <= len(index) - 2 + np.arange(2)[:, None]
        expected = oracle(query[b : b + 1, :2], *exact, mask=mask).out
        assert relative_error(last[b : b + 1], expected) < 1e-5


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("stale", [1e4, 1e30, np.nan])
def test_a_slot_that_is_reused_is_as_a_fresh_one(name, stale, implementation):
    """Of the former sequence, longer and far larger, nothing counts for 5 queries or for one."""
    key, value, query = tokens(9)
    former = np.where(np.arange(56) < 3, 1, stale).astype(np.float32)[None, :, None, None]
    old_key, old_value, _ = tokens(56, seed=1)
    used = create(name).append(old_key * former, old_value * former)
    used = dataclasses.replace(used, length=used.length.at[1].set(0))
    used = used.append(key, value, [0, 9])
    fresh = create(name).append(key, value)
    assert used.length.tolist() == [56, 9]
    for T in (5, 1):
        out, expected = (
            cache.attention(query[:, 9 - T :], implementation=implementation)[1]
            for cache in (used, fresh)
        )
        np.testing.assert_array_equal(out, expected)


def inner_jaxprs(equation):
    """Of a call, branches or a loop."""
    for parameter in jax.tree.leaves(
        equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
    ):
        inner = getattr(parameter, "jaxpr", parameter)
        if hasattr(inner, "eqns"):
            yield inner


def every_equation(jaxpr):
    """Those of a jaxpr, and of its calls, branches and loops."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from every_equation(inner)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_append_writes_only_what_is_new(quantization):
    """Its cost does not grow with the capacity; XLA widens all of a bfloat16 array to update it."""
    cache = jax.eval_shape(
        lambda: QuantizedKVCache.create(2, 8192, 2, 64, quantization=quantization)
    )
    x = jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.float32)
    least = min(part.size for part in jax.tree.leaves((cache.key.scale, cache.value.scale)))
    made = [
        (equation.primitive.name, result.aval.dtype.name)
        for equation in every_equation(jax.make_jaxpr(QuantizedKVCache.append)(cache, x, x).jaxpr)
        for result in equation.outvars
        if result.aval.size >= least and not any(inner_jaxprs(equation))
    ]
    assert {name for name, _ in made} - {"stop_gradient"} == {"scatter"}  # which computes nothing
    assert "bfloat16" not in {dtype for _, dtype in made}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("window", [None, 300])
def test_no_array_of_queries_by_capacity(name, window, require):
    """Many queries in a large capacity: what they see needs no mask."""
    require("cpu")
    T, capacity = 512, 8192
    cache = jax.eval_shape(
        lambda: QuantizedKVCache.create(1, capacity, 1, 8, quantization=name, window=window)
    )
    query = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    attend = lambda cache, query: cache.attention(query)  # noqa: E731
    equations = every_equation(jax.make_jaxpr(attend)(cache, query).jaxpr)
    shapes = [x.aval.shape for equation in equations for x in equation.outvars]
    assert (1, T, 1, 8) in shapes
    assert max(np.prod(shape, dtype=int) for shape in shapes) < T * capacity / 16
    memory = jax.jit(attend).lower(cache, query).compile().memory_analysis()
    assert memory.temp_size_in_bytes < T * capacity / 16


RINGS = {
    "steps": (40,) + (1,) * 30 + (7, 7),
    "sevens": (7,) * 12,
    "wraps": (7, 40, 40, 1),
    "longer_than_it": (100, 1, 7, 40, 1),
}


@pytest.mark.parametrize(
    ("quantization", "pattern"),
    [
        pytest.param(FORMATS[name], RINGS[ring], id=f"{name}-{ring}")
        for name in FORMATS
        for ring in (RINGS if name == "mixed" else ("steps", "wraps"))
    ],
)
def test_ring(quantization, pattern, oracle, relative_error):
    count = sum(pattern)
    key, value, query = tokens(count)
    cache = append_all(create(quantization, window=WINDOW), key, value, pattern)
    np.testing.assert_array_equal(cache.length, [count, count])
    np.testing.assert_array_equal(cache.dropped, [0, 0])
    kept = np.arange(count - WINDOW - 1, count)
    whole = []
    for cached, x in ((cache.key, key), (cache.value, value)):
        block = cached.spec.token_block
        assert_same_codes(cached, x, np.arange(-(-count // block) * block - CAPACITY, count))
        whole.append(np.asarray(dequantized(at_once(cached, x)))[:, kept])
    for T in (1, 2):
        expected = oracle(query[:, kept], *whole, local_window_size=(WINDOW - 1, 0)).out[:, -T:]
        assert relative_error(cache.attention(query[:, -T:]), expected) < 1e-5


def test_ring_that_is_not_full(oracle, relative_error):
    """Rows that come before the first token give 0."""
    quantization = FORMATS["mixed"]
    key, value, query = tokens(7)
    cache = create(quantization, window=3).append(key, value)
    out = cache.attention(np.concatenate([query[:, :2], query], axis=1))
    assert not out[:, :2].any()
    expected = oracle(query, *stored(cache, 7), local_window_size=(2, 0)).out
    assert relative_error(out[:, 2:], expected) < 1e-5


@every_format
def test_past_the_capacity(quantization, oracle, relative_error):
    key, value, query = tokens(80)
    before = create(quantization).append(key[:, :40], value[:, :40])
    full = before.append(key[:, 40:], value[:, 40:], [40, 20])
    np.testing.assert_array_equal(full.length, [64, 60])
    np.testing.assert_array_equal(full.dropped, [16, 0])
    first = jax.tree.map(lambda x: x[:1], full)
    assert_same_codes(first.key, key[:1, :64])
    assert_same_codes(first.value, value[:1, :64])
    # Queries for what was dropped see all that is stored, the others no more than themselves.
    mask = np.arange(64) <= 40 + np.arange(40)[:, None]
    expected = oracle(query[:1, 40:], *stored(first, 64), mask=mask).out
    assert relative_error(full.attention(query[:, 40:])[:1], expected) < 1e-5
    more = full.append(key[:, :7], value[:, :7])
    np.testing.assert_array_equal(more.length, [64, 64])
    np.testing.assert_array_equal(more.dropped, [23, 3])
    assert_equal((more.key[0], more.value[0]), (full.key[0], full.value[0]))
    again = more.append(key[:, :7], value[:, :7])
    assert_equal((again.key, again.value), (more.key, more.value))
    np.testing.assert_array_equal(again.dropped, [30, 10])


@two_formats
def test_vmap(quantization):
    caches = [create(quantization).append(*(x[:, :7] for x in tokens(40, s)[:2])) for s in (1, 2)]
    key, value, query = (np.stack(x) for x in zip(tokens(7, 3), tokens(7, 4), strict=True))
    lengths = np.asarray([[7, 3], [0, 5]], np.int32)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    assert stacked.capacity == CAPACITY

    def step(cache, key, value, lengths, query):
        cache = cache.append(key, value, lengths)
        return cache, cache.attention(query), cache.attention(query[:, -1:])

    mapped = jax.vmap(step)(stacked, key, value, lengths, query)
    for i, cache in enumerate(caches):
        own, *outs = step(cache, key[i], value[i], lengths[i], query[i])
        assert_equal(jax.tree.map(lambda x, i=i: x[i], mapped[0]), own)
        for out, expected in zip(mapped[1:], outs, strict=True):
            np.testing.assert_allclose(out[i], expected, atol=1e-5)


@two_formats
def test_pytree_and_properties(quantization):
    cache = create(quantization, window=WINDOW, dtype=jnp.bfloat16)
    leaves, structure = jax.tree.flatten(cache)
    back = jax.tree.unflatten(structure, leaves)
    assert_equal(back, cache)
    assert (back.window, back.dtype, back.capacity) == (WINDOW, jnp.bfloat16, CAPACITY)
    assert hash(structure) == hash(jax.tree.structure(back))
    assert cache.key.dequantize().dtype == cache.value.dequantize().dtype == jnp.bfloat16
    assert cache.nbytes == sum(leaf.nbytes for leaf in leaves)
    assert cache.key.shape == (B, CAPACITY, K, H)
    assert cache.value.shape == (B, CAPACITY, K, V)
    for tail, cached in ((cache.key_tail, cache.key), (cache.value_tail, cache.value)):
        block = cached.spec.token_block
        assert tail is None if block == 1 else tail.shape == (B, 2 * block, K, cached.head_dim)
        assert tail is None or tail.dtype == jnp.float32
    key, value, query = (jnp.asarray(x, jnp.bfloat16) for x in tokens(7))
    # Two arrays of the empty cache that are one could not be donated.
    after = jax.jit(QuantizedKVCache.append, donate_argnums=0)(cache, key, value)
    assert jax.tree.structure(after) == structure
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [
        (x.shape, x.dtype) for x in leaves
    ]
    assert after.attention(query).dtype == jnp.bfloat16
    empty = create(quantization).attention(np.ones((B, 1, N, H), np.float32))
    np.testing.assert_array_equal(empty, np.zeros((B, 1, N, V)))


@pytest.mark.parametrize(
    ("quantization", "window", "x64"),
    [("int8", None, True), ("int4", 32, False), (FORMATS["mixed"], 32, True)],
    ids=FORMATS,
)
def test_strict_modes(quantization, window, x64, strict_modes, configure):
    with configure(jax_enable_x64=x64):
        cache = create(quantization, window=window)
        key, value, query = (x.astype("float64" if x64 else "float32") for x in tokens(40))
        cache = cache.append(key, value, [40, 3]).append(key[:, :1], value[:, :1])
        assert cache.length.dtype == cache.dropped.dtype == jnp.int32
        for T in (1, 2):
            out = cache.attention(query[:, :T])
            assert out.dtype == query.dtype
            assert np.isfinite(out).all()
            assert np.any(out)


def test_no_gradient(relative_error):
    key, value, query = tokens(7)

    def loss(query, key):
        return create("int4").append(key, value).attention(query).sum()

    d_query, d_key = jax.grad(loss, argnums=(0, 1))(query, key)
    assert d_query.any()
    assert not d_key.any()


@every_format
def test_the_most_queries_that_a_ring_answers(quantization, oracle, relative_error):
    """One more would miss a key: at no length does a ring have fewer."""
    cache = create(quantization, window=WINDOW)
    block = max(x.spec.token_block for x in (cache.key, cache.value))
    T = CAPACITY - WINDOW - block + 2
    key, value, query = tokens(64 + 33)
    cache = append_all(cache, key, value, (40, 40, 7, 7, 1, 1, 1))
    # 97 = 3 * 32 + 1: the last block has one token, and hides as many as it can.
    whole = [dequantized(at_once(*x)) for x in ((cache.key, key), (cache.value, value))]
    expected = oracle(query, *whole, local_window_size=(WINDOW - 1, 0)).out[:, -T:]
    assert relative_error(cache.attention(query[:, -T:]), expected) < 1e-5
