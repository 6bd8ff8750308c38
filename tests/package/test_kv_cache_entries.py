"""Entries of both caches: padding, reset, rewind and select leave what would be there without."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gluon import PagedKVCache, QuantizedKVCache
from tests.support.caches import (
    FORMATS,
    KINDS,
    B,
    append,
    assert_alike,
    attend,
    create,
    tokens,
)

both = pytest.mark.parametrize("kind", KINDS)
# Of one kind, what the other has in common with it.
every_format = pytest.mark.parametrize(
    ("kind", "name"),
    [("dense", "int8"), ("dense", "blocks"), ("paged", "int4")],
)
few_formats = pytest.mark.parametrize("name", ["int8", "int4"])


def filled(kind, name, lengths, seed=0):
    key, value, _ = tokens(60, seed)
    return append(create(kind, name), key, value, np.asarray(lengths, np.int32))


@pytest.mark.parametrize(("kind", "name"), [("dense", "int4"), ("paged", "int8")])
def test_padding_at_the_left_takes_no_place(kind, name):
    """NaN included; each entry starts elsewhere, one has nothing but padding."""
    key, value, query = tokens(60)
    starts, ends = np.array([0, 17, 60]), np.array([60, 50, 60])
    padded = [np.full_like(x, np.nan) for x in (key, value)]
    for x, whole in zip((key, value), padded, strict=True):
        for b in range(B):
            whole[b, starts[b] : ends[b]] = x[b, : ends[b] - starts[b]]
    cache = create(kind, name).append(*padded, ends, starts)
    expected = append(create(kind, name), key, value, ends - starts)
    np.testing.assert_array_equal(cache.length, [60, 33, 0])
    assert_alike(cache, expected, query)
    # As many rows as there are with padding: they stand at the right, and padding gives 0.
    out = attend(cache, np.concatenate([query, query], 1)[:, :61])
    assert not np.asarray(out[0, :1]).any()
    assert not np.asarray(out[1, : 61 - 33]).any()
    assert np.asarray(out[1, 61 - 33 :]).any(axis=(1, 2)).all()


@both
@few_formats
@pytest.mark.parametrize("rows", [1, [0, 2], np.array([False, True, True])], ids=str)
def test_reset_entries_are_as_new(kind, name, rows):
    lengths = np.array([60, 33, 40])
    used = filled(kind, name, lengths, seed=1).reset(rows)
    is_reset = np.zeros(B, bool)
    is_reset[rows] = True
    np.testing.assert_array_equal(used.length, np.where(is_reset, 0, lengths))
    key, value, query = tokens(60)
    counts = np.array([9, 0, 35])
    cache = append(used, key, value, counts)
    expected = append(filled(kind, name, np.where(is_reset, 0, lengths), 1), key, value, counts)
    assert_alike(cache, expected, query)


@every_format
@pytest.mark.parametrize("left", [5, 31, 37, 48])
def test_rewound_tokens_have_never_been(kind, name, left):
    """Also before the center is final, and where the block that is left was full."""
    key, value, query = tokens(60)
    before = filled(kind, name, [left, 60, left])
    count = min(12, before.rewindable)
    more = np.array([count, 0, max(0, count - 3)])
    longer = append(before, key[:, ::-1], value[:, ::-1], more)
    assert longer.length.tolist() == [left + more[0], 60, left + more[2]]
    back = jax.jit(lambda cache, n: cache.rewind(n))(longer, more)
    assert_alike(back, before, query)
    counts = np.array([7, 1, 20])
    both = (append(each, key, value, counts) for each in (back, before))
    assert_alike(*both, query)


@both
def test_rewinding_as_far_as_it_goes(kind):
    for name in FORMATS:
        cache = filled(kind, name, [60, 20, 0])
        limit = cache.rewindable
        assert limit == {"int4": 32, "blocks": 4}.get(name, cache.capacity)
        tokens_left = np.maximum(np.array([60, 20, 0]) - min(limit, 60), 0)
        np.testing.assert_array_equal(cache.rewind(min(limit, 60)).length, tokens_left)
        # What is traced is clamped.
        far = jax.jit(lambda cache, n: cache.rewind(n))(cache, 10**6)
        np.testing.assert_array_equal(far.length, np.maximum(np.array([60, 20, 0]) - limit, 0))


@pytest.mark.parametrize("kind", ["dense", "paged", "ring"])
def test_rewinds_in_a_row(kind):
    """As far as the first could have gone, as a cache of the same tokens; then no more."""
    key, value, query = tokens(60)
    is_ring = kind == "ring"
    kind, name, given = ("dense", "int8", dict(window=40)) if is_ring else (kind, "int4", {})

    def of(last):
        cache = create(kind, name, **given)
        for _ in range(3 if is_ring else 1):  # of a ring more than its slots
            cache = append(cache, key, value)
        return append(cache, key[:, :last], value[:, :last])

    cache = of(60)
    back = append(cache.rewind(5).rewind(7), key[:, 48:50], value[:, 48:50]).rewind(3)
    np.testing.assert_array_equal(back.length, of(47).length)
    assert_alike(back, of(47), query)
    # 64 of 120 tokens, and 152 of 240.
    least = 152 if is_ring else 64
    with pytest.raises(
        ValueError, match=rf"tokens is .* of entry 0; allowed: at least {least} left"
    ):
        back.rewind(20).rewind(cache.rewindable)
    far = jax.jit(lambda cache: cache.rewind(10**6))
    np.testing.assert_array_equal(far(far(back)).length, [least] * B)


def test_rewinding_what_found_no_room_first():
    key, value, query = tokens(60)
    full = filled("dense", "int8", [60] * B)
    for _ in range(2):
        full = append(full, key, value)
    assert (full.length.tolist(), full.dropped.tolist()) == ([128] * B, [52] * B)
    back = full.rewind(np.array([50, 52, 60]))
    assert (back.length.tolist(), back.dropped.tolist()) == ([128, 128, 120], [2, 0, 0])
    assert np.isfinite(attend(back, query[:, :1])).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rewinding_a_ring(name):
    key, value, query = tokens(60)
    ring = create("dense", name, window=40)
    for _ in range(4):
        ring = append(ring, key, value)  # 240 tokens through 128 slots
    longer = append(ring, key[:, :9], value[:, :9])
    assert longer.rewindable == (32 if name == "int4" else 128 - 40 - 1 + 1)
    assert_alike(longer.rewind(9), ring, query)


@both
@pytest.mark.parametrize("name", ["int4"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1, 0, 2]], ids=str)
def test_select_takes_entries_with_all_they_have(kind, name, rows):
    key, value, query = tokens(60)
    lengths = np.array([60, 33, 5])
    selected = filled(kind, name, lengths).select(rows)
    make = functools.partial(create, kind, name, batch=len(rows))
    expected = append(make(), key[rows], value[rows], lengths[rows])
    assert_alike(selected, expected, query[rows])
    # They part from here on, also in the block and the center that they had in common.
    n = len(rows)
    more_key, more_value, _ = tokens(60, 7, n)
    counts = np.arange(30, 30 + n)
    grown = (append(x, more_key, more_value, counts) for x in (selected, expected))
    assert_alike(*grown, query[rows])


@both
@pytest.mark.parametrize("name", ["int4"])
def test_states_are_restored_without_a_target(kind, name, tmp_path):
    """By msgpack and by Orbax, which know of arrays alone."""
    serialization = pytest.importorskip("flax.serialization")
    cache = filled(kind, name, [60, 33, 5])
    kept = cache.state_dict()
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(kept))
    query = tokens(60)[2]
    packed = serialization.msgpack_serialize(jax.tree.map(np.asarray, kept))
    states = [serialization.msgpack_restore(packed)]
    if name == "int4":
        orbax = pytest.importorskip("orbax.checkpoint")
        with orbax.PyTreeCheckpointer() as checkpointer:
            # Of arrays of NumPy it keeps no shardings, of which it would warn.
            checkpointer.save(tmp_path / "cache", jax.tree.map(np.asarray, kept))
            states.append(checkpointer.restore(tmp_path / "cache"))
    for each in states:
        restored = KINDS[kind].from_state_dict(each)
        assert jax.tree.structure(restored) == jax.tree.structure(cache)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(cache), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert_alike(restored, cache, query)


@both
def test_flax_restores_into_a_target(kind):
    serialization = pytest.importorskip("flax.serialization")
    pytest.importorskip("jax_gluon.flax")
    cache = filled(kind, "int4", [60, 33, 5])
    restored = serialization.from_bytes(create(kind, "int4"), serialization.to_bytes(cache))
    assert_alike(restored, cache, tokens(60)[2])


STATES = {
    "no_dict": (lambda s: 5, "state_dict is a int; allowed: what state_dict() returned"),
    "other": (
        lambda s: {"key": 1},
        "state_dict is of ['key']; allowed: what state_dict() ret",
    ),
    "no_key": (lambda s: {k: x for k, x in s.items() if k != "key"}, "state_dict is without key"),
    "no_length": (
        lambda s: {k: x for k, x in s.items() if k != "length"},
        "state_dict is without length",
    ),
    "layout": (lambda s: s | {"layout": np.zeros(3, np.uint8)}, "with a layout that can't be read"),
    "batch": (
        lambda s: s | {"dropped": jnp.zeros(7, jnp.int32)},
        "with dropped of shape [7]; allowed: a",
    ),
    "part": (
        lambda s: s | {"value": s["value"] | {"scale": jnp.zeros((1, 2, 3, 4))}},
        "state_dict is with value whose scale is float32[1, 2, 3, 4], expected ",
    ),
}


@pytest.mark.parametrize(("spoil", "complaint"), STATES.values(), ids=STATES)
def test_states_that_are_none(spoil, complaint):
    state = create("dense", "int4").state_dict()
    with pytest.raises(ValueError, match=re.escape(complaint)):
        QuantizedKVCache.from_state_dict(spoil(state))


def test_states_of_the_other_class():
    with pytest.raises(ValueError, match="that of a QuantizedKVCache; allowed: that of a Paged"):
        PagedKVCache.from_state_dict(create("dense", "int8").state_dict())


BAD = {
    "reset_far": ("reset", (3,), ValueError, "rows is 3; allowed: 0 to 2, entries of the batch"),
    "reset_mask": (
        "reset",
        (np.ones(2, bool),),
        ValueError,
        "shape [2]; allowed: bool [3], or",
    ),
    "reset_floats": ("reset", ([0.5],), TypeError, "rows is of dtype float64; allowed: an integer"),
    "rewind_far": ("rewind", (33,), ValueError, "tokens is 33; allowed: 0 to 32, for which this"),
    "rewind_less": ("rewind", ([0, -1, 2],), ValueError, "from -1 to 2; allowed: 0 to 32"),
    "rewind_shape": (
        "rewind",
        ([1, 2],),
        ValueError,
        "of shape [2]; allowed: an int, or sh",
    ),
    "rewind_float": ("rewind", (1.0,), TypeError, "of dtype float64; allowed: an integer dtype"),
    "select_far": ("select", ([0, 3],), ValueError, "from 0 to 3; allowed: 0 to 2, entries of the"),
    "select_none": ("select", ([],), ValueError, "of shape [0]; allowed: of rank 1 with at least"),
    "select_one": ("select", (1,), ValueError, "of shape []; allowed: of rank 1 with at least one"),
}


@both
@pytest.mark.parametrize(("method", "given", "kind_of", "complaint"), BAD.values(), ids=BAD)
def test_bad_arguments(kind, method, given, kind_of, complaint):
    cache = create(kind, "int4")
    with pytest.raises(kind_of) as error:
        getattr(cache, method)(*given)
    assert str(error.value).startswith(f"jax_gluon.{type(cache).__name__}.{method}: ")
    assert complaint in str(error.value)


@both
def test_bad_starts(kind):
    key, value, _ = tokens(6)
    with pytest.raises(ValueError, match=r"append: starts is of shape \[2\]; allowed: shape \[B\]"):
        create(kind, "int8").append(key, value, starts=[0, 1])


def test_traced_numbers_of_no_entry_change_nothing():
    """-1 too, which JAX would count from the end."""
    cache = filled("paged", "int8", [5, 3, 1])
    reset = jax.jit(lambda cache, row: cache.reset(row).length)
    fork = jax.jit(lambda cache, target: cache.fork(0, target).length)
    for number in (-1, 7):
        for method in (reset, fork):
            np.testing.assert_array_equal(method(cache, jnp.int32(number)), [5, 3, 1])
    np.testing.assert_array_equal(fork(cache, jnp.int32(2)), [5, 3, 5])
    with pytest.raises(TypeError, match=r"PagedKVCache.reset: rows is .*; allowed"):
        cache.reset(2**70)
    with pytest.raises(TypeError, match=r"PagedKVCache.attention: query is .*; allowed"):
        cache.attention(None)
