"""Attention over shards of tokens equals attention over all of them, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_gluon
from jax_gluon import _native
from tests.context_parallel.conftest import DEVICES
from tests.support import oracle

B, T, N, K, H, V = 2, 8 * 12, 4, 2, 8, 6
TOKENS = P(None, "ring")


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("ring",))


def draw(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def segments(rng, tokens=T):
    return np.sort(rng.integers(0, 3, (B, tokens)), axis=1).astype(np.int32)


CASES = {
    "plain": {},
    "causal": dict(is_causal=True),
    "causal_zigzag": dict(is_causal=True, token_layout="zigzag"),
    "causal_striped": dict(is_causal=True, token_layout="striped"),
    "window": dict(local_window_size=(17, 5), logits_soft_cap=2.0),
    "window_zigzag": dict(local_window_size=(17, 0), is_causal=True, token_layout="zigzag"),
    "lengths": dict(lengths=True, is_causal=True, sinks=True),
    "lengths_striped": dict(lengths=True, is_causal=True, token_layout="striped", sinks=True),
    "segments_zigzag": dict(segments=True, is_causal=True, token_layout="zigzag"),
    "bias_and_mask": dict(bias=True, mask=True, key_value_mask=True),
    "bias_of_rows": dict(bias=True, is_causal=True, token_layout="striped"),
    "given": dict(is_causal=True, token_layout="given"),
    "offset": dict(is_causal=True, query_offset=np.array([5, -9], np.int32)),
    "xla": dict(is_causal=True, implementation="xla", token_layout="zigzag", sinks=True),
    "xla_lengths": dict(
        lengths=True, implementation="xla", bias=True, sinks=True, token_layout="striped"
    ),
    "gathered_zigzag": dict(
        is_causal=True, strategy="all_gather", token_layout="zigzag", logits_soft_cap=2.0
    ),
    "gathered": dict(is_causal=True, strategy="all_gather", token_layout="striped", bias=True),
    "gathered_window": dict(local_window_size=9, strategy="all_gather", sinks=True),
    "heads": dict(
        is_causal=True, strategy="all_to_all", token_layout="zigzag", N=16, K=8, sinks=True
    ),
    "dropout": dict(dropout=True, is_causal=True, bias=True),
    "dropout_zigzag": dict(
        dropout=True, is_causal=True, token_layout="zigzag", strategy="all_gather"
    ),
    "dropout_heads": dict(dropout=True, strategy="all_to_all", N=8, K=8),
    "dropout_xla": dict(dropout=True, implementation="xla", token_layout="striped"),
    "heads_segments": dict(segments=True, strategy="all_to_all", N=8, K=8, lengths=True),
}


def build(case, seed=0):
    """Arguments of one device; those of all have their tokens in another order."""
    case = dict(case)
    rng = np.random.default_rng(seed)
    n, k = case.pop("N", N), case.pop("K", K)
    arrays = [draw(rng, B, T, n, H), draw(rng, B, T, k, H), draw(rng, B, T, k, V)]
    d_out = draw(rng, B, T, n, V)
    keywords = {}
    if case.pop("bias", False):
        keywords["bias"] = draw(rng, 1, n, T, T)
    if case.pop("mask", False):
        keywords["mask"] = rng.random((B, 1, T, T)) < 0.7
    if case.pop("sinks", False):
        keywords["sinks"] = draw(rng, n)
    if case.pop("lengths", False):
        keywords["query_seq_lengths"] = np.array([T - 7, 30], np.int32)
        keywords["key_value_seq_lengths"] = np.array([41, T], np.int32)
    if case.pop("segments", False):
        ids = segments(rng)
        keywords |= dict(query_segment_ids=ids, key_value_segment_ids=ids)
    if case.pop("key_value_mask", False):
        keywords["key_value_mask"] = rng.random((B, T)) < 0.8
    if case.pop("dropout", False):
        case |= dict(dropout_rate=0.25, dropout_rng=jax.random.key(5))
    layout, strategy = case.pop("token_layout", "contiguous"), case.pop("strategy", "ring")
    if layout == "given":
        at = rng.permuted(np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), axis=1)
        keywords |= dict(query_positions=at, key_value_positions=at)
    return arrays, d_out, keywords, case, layout, strategy


#: Axes of tokens, which are put into the order of the shards.
AXES = {
    "bias": (2, 3), "mask": (2, 3), "query_segment_ids": (1,), "key_value_segment_ids": (1,),
    "query_positions": (1,), "key_value_positions": (1,), "key_value_mask": (1,),
}  # fmt: skip
SPECS = {
    "bias": P(None, None, "ring"), "mask": P(None, None, "ring"), "sinks": P(),
    "query_seq_lengths": P(), "key_value_seq_lengths": P(),
}  # fmt: skip


def ordered(x, layout, axes, order=jax_gluon.reorder_tokens):
    for axis in axes if layout != "given" else ():
        x = order(x, DEVICES, layout, axis=axis)
    return x


def sharded(keywords, static, layout, strategy):
    """The function of q, k, v, d_out and arrays that computes output and gradients on the mesh."""
    names = tuple(keywords)
    specs = (TOKENS,) * 3 + (tuple(SPECS.get(name, TOKENS) for name in names),)

    def local(q, k, v, arrays):
        given = dict(zip(names, arrays, strict=True))
        return jax_gluon.ring_attention(
            q, k, v, axis_name="ring", token_layout=layout, strategy=strategy,
            return_residual=True, **given, **static,
        )  # fmt: skip

    return jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=(TOKENS, TOKENS))


def run(case):
    arrays, d_out, keywords, static, layout, strategy = build(case)
    function = sharded(keywords, static, layout, strategy)
    put = lambda x, axes=(1,): ordered(jnp.asarray(x), layout, axes)  # noqa: E731
    moved = tuple(put(x, AXES.get(name, ())) for name, x in keywords.items())
    differentiable = [i for i, name in enumerate(keywords) if name in ("bias", "sinks")]

    def loss(q, k, v, floats):
        given = list(moved)
        for i, x in zip(differentiable, floats, strict=True):
            given[i] = x
        out, lse = function(q, k, v, tuple(given))
        return jnp.sum(out * put(d_out)), (out, lse)

    floats = tuple(moved[i] for i in differentiable)
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, results), gradients = gradient(*map(put, arrays), floats)
    *gradients, of_floats = gradients
    back = functools.partial(ordered, layout=layout, axes=(1,), order=jax_gluon.restore_tokens)
    results = [back(x) for x in (*results, *gradients)]
    names = [list(keywords)[i] for i in differentiable]
    others = {
        f"d_{name}": ordered(x, layout, AXES.get(name, ()), jax_gluon.restore_tokens)
        for name, x in zip(names, of_floats, strict=True)
    }
    static = {name: x for name, x in static.items() if name != "implementation"}
    if "dropout_rng" in static:
        key = static.pop("dropout_rng")
        # Bits are of places in the order of the shards.
        kept = jax_gluon.dropout_mask(key, (B, arrays[0].shape[2], T, T), static["dropout_rate"])
        static["kept"] = np.asarray(ordered(kept, layout, (2, 3), jax_gluon.restore_tokens))
    wanted = oracle.attention(*arrays, d_out=d_out, **keywords, **static)
    return dict(zip(wanted._fields, results, strict=False)) | others, wanted


@pytest.mark.parametrize("name", CASES)
def test_shards_give_what_one_device_does(name):
    found, wanted = run(CASES[name])
    for field, x in found.items():
        y = getattr(wanted, field)
        assert x.shape == y.shape
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), finite)
        error = np.linalg.norm(np.where(finite, x - y, 0)) / np.linalg.norm(y[finite])
        assert error <= (2e-6 if field in ("out", "log_sum_exp") else 3e-6), (field, error)


def test_rows_and_keys_past_the_lengths_may_be_nan():
    """In no gradient, whoever computes it."""
    arrays, d_out, keywords, *_ = build(dict(lengths=True))
    bad = [x.copy() for x in arrays]
    for x, name in zip(bad, ("query", *["key_value"] * 2), strict=True):
        for entry, length in zip(x, keywords[f"{name}_seq_lengths"], strict=True):
            entry[length:] = np.nan
    wanted = oracle.attention(*arrays, d_out=d_out, **keywords)
    for implementation in (None, "xla"):
        function = sharded(keywords, dict(implementation=implementation), "zigzag", "ring")
        put = functools.partial(ordered, layout="zigzag", axes=(1,))

        @jax.jit
        def results(*x, function=function):
            (out, _), pull = jax.vjp(
                lambda *x: function(*x, tuple(map(jnp.asarray, keywords.values()))), *x[:3]
            )
            return out, *pull((x[3], jnp.zeros((B, T, N), x[3].dtype)))

        found = results(*(put(jnp.asarray(x)) for x in (*bad, d_out)))
        names = "out", "d_query", "d_key", "d_value"
        for name, x in zip(names, found, strict=True):
            x = ordered(x, "zigzag", (1,), jax_gluon.restore_tokens)
            np.testing.assert_allclose(x, getattr(wanted, name), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_parts_merge_where_another_platform_lacks_the_plugin(monkeypatch, strategy):
    """A host of GPUs without it runs XLA's implementation on its CPU, whose parts are in base e."""
    monkeypatch.setattr(_native, "has_plugin", lambda: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rng = np.random.default_rng(4)
    arrays = [draw(rng, 1, DEVICES * 5, 1, 4) for _ in range(3)]
    out, _ = jax.jit(sharded({}, {}, "contiguous", strategy))(*arrays, ())
    np.testing.assert_allclose(np.asarray(out), oracle.attention(*arrays).out, atol=2e-6)
