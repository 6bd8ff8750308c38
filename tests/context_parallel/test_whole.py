"""Whole arrays on meshes of several axes; plans; arguments that do not fit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from benchmarks import collectives
from jax_gluon._context_parallel.routes import Sight
from tests.context_parallel.conftest import DEVICES
from tests.context_parallel.test_ring_attention import draw
from tests.support import oracle

B, T, N, K, H = 4, 48, 4, 2, 8
CUBE = (2, 2, 2), ("batch", "ring", "heads")
ALONG = dict(axis="ring", batch_axis="batch", head_axis="heads")


def cube(axis_type=AxisType.Auto):
    shape, names = CUBE
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * 3)


def operands(tokens=T, batch=B):
    rng = np.random.default_rng(1)
    return [draw(rng, batch, tokens, n, H) for n in (N, K, K, N)]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("strategy", ["ring", None])
def test_batch_heads_and_tokens_are_sharded(axis_type, strategy):
    q, k, v, d_out = operands()
    rng = np.random.default_rng(2)
    sinks, bias = draw(rng, N), draw(rng, B, N, 1, T)
    ids = np.sort(rng.integers(0, 3, T)).astype(np.int32)
    lengths = np.array([T, 40, 7, 30], np.int32)
    options = dict(
        query_segment_ids=ids, key_value_segment_ids=ids, key_value_seq_lengths=lengths,
        is_causal=True, local_window_size=(30, 3),
    )  # fmt: skip
    mesh = cube(axis_type)
    rows = P("batch", "ring", "heads")

    def loss(q, k, v, bias, sinks, d_out):
        out, residual = jax_gluon.context_parallel_attention(
            q, k, v, bias, mesh=mesh, strategy=strategy, sinks=sinks, return_residual=True,
            **ALONG, **options,
        )  # fmt: skip
        return jnp.sum(out * d_out), (out, residual)

    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    arrays = [put(x, rows) for x in (q, k, v)]
    arrays += [put(bias, P("batch", "heads")), put(sinks, P("heads")), put(d_out, rows)]
    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))
    gradients, (out, residual) = gradient(*arrays)
    exact = oracle.attention(q, k, v, bias, d_out=d_out, sinks=sinks, **options)
    wanted = exact.out, exact.log_sum_exp, exact.d_query, exact.d_key, exact.d_value, exact.d_bias
    wanted = (*wanted, exact.d_sinks)
    for x, y in zip((out, residual, *gradients), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, rtol=2e-5, atol=2e-5)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, rows), 4)
    assert gradients[1].sharding.is_equivalent_to(NamedSharding(mesh, rows), 4)


def test_heads_before_tokens_scales_of_heads_and_more_batch_axes():
    q, k, v, _ = operands()
    scale = draw(np.random.default_rng(3), N)
    exact = [oracle.attention(q[:, :, [n]], k[:, :, [n // 2]], v[:, :, [n // 2]],
                              is_causal=True, scale=scale[n]).out for n in range(N)]  # fmt: skip
    major = [jnp.swapaxes(x, 1, 2).reshape(2, 2, x.shape[2], T, H) for x in (q, k, v)]
    out = jax.jit(
        lambda *x: jax_gluon.context_parallel_attention(
            *x, mesh=cube(), layout="BNTH", is_causal=True, scale=jnp.asarray(scale), **ALONG
        )
    )(*major)
    exact = np.swapaxes(np.concatenate(exact, 2), 1, 2).reshape(out.shape)
    np.testing.assert_allclose(np.asarray(out), exact, rtol=2e-5, atol=2e-5)


def test_dropout_is_that_of_one_device():
    q, k, v, _ = operands()
    dropout = dict(dropout_rate=0.3, dropout_rng=jax.random.key(3))
    for broadcast in (False, True):
        options = dropout | dict(broadcast_dropout=broadcast, is_causal=True)
        whole = functools.partial(jax_gluon.context_parallel_attention, mesh=cube(), **ALONG)
        out = jax.jit(functools.partial(whole, **options))(q, k, v)
        wanted = jax_gluon.dot_product_attention(q, k, v, **options)
        np.testing.assert_allclose(np.asarray(out), wanted, rtol=2e-5, atol=2e-5)


def test_no_keys_are_empty_rows():
    q, *_ = operands()
    none = np.zeros((B, 0, K, H), np.float32)
    out, residual = jax_gluon.context_parallel_attention(
        q, none, none, mesh=cube(), return_residual=True, **ALONG
    )
    assert not np.any(out)
    assert np.all(np.asarray(residual) == -np.inf)


def plan(query, key, shards=DEVICES, **keywords):
    mesh = AbstractMesh((shards,), ("ring",))
    return jax_gluon.explain_context_parallel(query, key, key, mesh=mesh, axis="ring", **keywords)


def shape(tokens, heads, width=64, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((1, tokens, heads, width), dtype)


def test_bytes_of_every_strategy_are_those_of_its_programs():
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("ring",))
    query, key = shape(DEVICES * 32, 16), shape(DEVICES * 32, 8)
    for quantization in (None, "int4"):
        keywords = dict(quantization=quantization, token_layout="striped", is_causal=True)
        planned = plan(query, key, **keywords)
        assert planned.strategy == min(planned.traffic, key=lambda x: planned.traffic[x].total)
        for strategy, traffic in planned.traffic.items():
            sharding = NamedSharding(mesh, P(None, "ring"))
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                      for x in (query, key, key)]  # fmt: skip

            def attention(*x, strategy=strategy, keywords=keywords):
                return jax_gluon.context_parallel_attention(
                    *x, mesh=mesh, axis="ring", strategy=strategy, **keywords
                )

            residuals = jax.jit(lambda *x, f=attention: jax.vjp(f, *x))
            program = residuals.lower(*shapes).compile()
            assert collectives.sent_by_all(program, DEVICES) == traffic.forward, strategy
            out, pull = jax.eval_shape(residuals, *shapes)
            program = jax.jit(lambda pull, d_out: pull(d_out)).lower(pull, out).compile()
            assert collectives.sent_by_all(program, DEVICES) == traffic.backward, strategy


def test_lengths_are_not_sent():
    """Not even as a mask of keys, where those past the lengths are not the last of a device."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("ring",))
    keywords = dict(token_layout="striped", strategy="ring", key_value_seq_lengths=jnp.array([9]))
    query = shape(DEVICES * 4, 8)
    sharding = NamedSharding(mesh, P(None, "ring"))
    x = jax.ShapeDtypeStruct(query.shape, query.dtype, sharding=sharding)
    attention = functools.partial(
        jax_gluon.context_parallel_attention, mesh=mesh, axis="ring", **keywords
    )
    program = jax.jit(attention).lower(x, x, x).compile()
    planned = plan(query, query, **keywords)
    assert collectives.sent_by_all(program, DEVICES) == planned.traffic["ring"].forward


def test_the_choice_and_its_reason():
    query = shape(DEVICES * 64, 16)
    few = plan(query, shape(DEVICES * 64, 2), is_causal=True)
    assert few.strategy == "ring"
    assert "multiples of 8" in few.refused["all_to_all"]
    assert plan(query, shape(DEVICES * 64, 16)).strategy == "all_to_all"
    window = plan(query, shape(DEVICES * 64, 16), local_window_size=20, is_causal=True)
    assert window.strategy == "ring"
    assert window.traffic["ring"].forward * 7 == window.traffic["all_gather"].forward
    asked = plan(query, query, strategy="all_gather")
    assert asked.strategy == "all_gather"
    assert "asked for" in asked.reason


def test_balanced_layouts_share_the_work():
    query = shape(DEVICES * 64, 8)
    for layout, most in (("zigzag", 0.0), ("striped", 0.02)):
        work = np.array(plan(query, query, is_causal=True, token_layout=layout).work)
        assert abs(work.sum() - 1) < 1e-6
        assert np.max(np.abs(work * DEVICES - 1)) <= most < 0.1
    work = plan(query, query, is_causal=True).work
    assert max(work) * DEVICES > 1.8
    assert plan(query, query).work == (1 / DEVICES,) * DEVICES


UNKNOWN = {
    "segments": dict(query_segment_ids=jnp.zeros(DEVICES * 64, jnp.int32)),
    "query_lengths": dict(query_seq_lengths=jnp.array([7])),
    "key_lengths": dict(key_value_seq_lengths=jnp.array([7]), is_causal=True),
    "offset": dict(query_offset=jnp.array([7]), is_causal=True),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_work_that_arrays_say_is_not_known(name):
    query = shape(DEVICES * 64, 8)
    assert plan(query, query, **UNKNOWN[name]).work is None


def test_a_strategy_is_chosen_without_counting_work(monkeypatch):
    def count(_):
        raise AssertionError("pairs are counted")

    monkeypatch.setattr(Sight, "pairs", count)
    q, k, v, _ = operands()
    attention = functools.partial(jax_gluon.context_parallel_attention, mesh=cube(), **ALONG)
    jax.eval_shape(functools.partial(attention, is_causal=True), q, k, v)


@pytest.mark.parametrize("lengths", [np.array([2**63 - 1, 5]), [2**63 - 1, 5]])
def test_lengths_past_32_bits_are_clamped(lengths):
    q, k, v, _ = operands(batch=2)
    out = jax_gluon.context_parallel_attention(
        q, k, v, mesh=cube(), axis="ring", key_value_seq_lengths=lengths
    )
    exact = oracle.attention(q, k, v, key_value_seq_lengths=np.array([T, 5])).out
    np.testing.assert_allclose(np.asarray(out), exact, atol=2e-5)


def test_a_number_of_numpys_is_no_array_scale():
    """Which is multiplied into a wider query, and is then of more bytes."""
    query = shape(DEVICES * 64, 8, dtype=jnp.bfloat16)
    assert plan(query, query, scale=np.float32(0.1)) == plan(query, query, scale=0.1)


WRONG = {
    "axis_not_in_mesh": (dict(axis="rings"), "axis is 'rings'; allowed: axes of the mesh"),
    "axis_list": (dict(axis=["ring"]), "axis is ['ring']; allowed: a name of the mesh's axes, or"),
    "axis_number": (dict(batch_axis=0), "batch_axis is 0; allowed: a name of the mesh's axes, or"),
    "axis_taken": (dict(batch_axis="ring"), "batch_axis is 'ring', which is taken"),
    "tokens": (dict(tokens=49), "query is of 49 tokens along 2 devices of 'ring'"),
    "zigzag": (dict(tokens=6, token_layout="zigzag"), "of 3 tokens on each of 2 devices"),
    "batch": (dict(batch=3), "query is of 3 batch entries along 2 devices"),
    "blocks": (dict(quantization="int4"), "key is of 24 tokens on each device, whose INT4 blocks"),
    "layout": (dict(token_layout="zig"), 'token_layout is "zig"; allowed: '),
    "no_layout": (dict(token_layout=None), "token_layout is None; allowed: "),
    "positions": (dict(token_layout="given", is_causal=True), "query_positions is None; allowed"),
    "strategy": (dict(strategy="tree"), 'strategy is "tree"; allowed: None, "ring"'),
    "heads": (
        dict(strategy="all_to_all", head_axis=None, bias=np.zeros(T, np.float32)),
        "bias has no rows of all devices",
    ),
    "differentiation": (dict(differentiation="any"), 'differentiation is "any"; allowed'),
    "metal": (dict(implementation="metal"), "implementation is "),
    "mask": (dict(mask=np.ones((T, 40), bool)), "mask is of shape"),
    "keyword": (dict(window=3), 'unexpected keyword argument "window"'),
    "wide_offset": (
        dict(query_offset=np.array([2**33] * B), is_causal=True),
        "query_offset is from 8589934592 to 8589934592; allowed: numbers of 32 bits",
    ),
    "wide_segments": (
        dict(query_segment_ids=np.full(T, 2**32)),
        "query_segment_ids is from 4294967296 to 4294967296; allowed: numbers of 32 bits",
    ),
    "list_scale": (dict(scale=[0.1] * N), "scale is a list; allowed: a real"),
    "lengths": (dict(query_seq_lengths=np.zeros(B, np.int32), token_layout="given"), "is set"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name):
    keywords, complaint = WRONG[name]
    keywords = ALONG | keywords
    q, k, v, _ = operands(keywords.pop("tokens", T), keywords.pop("batch", B))
    errors = ValueError, TypeError, RuntimeError
    with pytest.raises(errors, match=re.escape(complaint)) as error:
        jax_gluon.context_parallel_attention(q, k, v, mesh=cube(), **keywords)
    assert "jax_gluon.context_parallel_attention: " in str(error.value)


def test_tokens_sharded_along_another_axis_and_no_mesh():
    q, k, v, _ = operands()
    k = jax.device_put(k, NamedSharding(cube(), P(None, "heads")))
    with pytest.raises(ValueError, match="key is sharded along 'heads' by tokens"):
        jax_gluon.context_parallel_attention(q, k, v, mesh=cube(), axis="ring")
    with pytest.raises(TypeError, match="mesh is a str"):
        jax_gluon.context_parallel_attention(q, k, v, mesh="ring", axis="ring")
    codes = jax_gluon.quantize(q, jax_gluon.QuantSpec())
    with pytest.raises(TypeError, match="query is a QuantizedTensor"):
        jax_gluon.context_parallel_attention(codes, k, v, mesh=cube(), axis="ring")
    with pytest.raises(ValueError, match=r"axis_name is 'ring' .*allowed: an axis of the mesh"):
        jax_gluon.ring_attention(q, k, v, axis_name="ring")


def test_reordering():
    x = jnp.arange(2 * 24 * 3).reshape(2, 24, 3)
    for layout in ("contiguous", "zigzag", "striped"):
        moved = jax_gluon.reorder_tokens(x, 4, layout)
        np.testing.assert_array_equal(jax_gluon.restore_tokens(moved, 4, layout), x)
    with pytest.raises(ValueError, match="x is of 24 tokens along axis 1; allowed: a multiple of"):
        jax_gluon.reorder_tokens(x, 5, "striped")
    with pytest.raises(ValueError, match='token_layout is "given"; allowed'):
        jax_gluon.reorder_tokens(x, 2, "given")
    with pytest.raises(ValueError, match="axis is 3; allowed: an axis of an array of rank 3"):
        jax_gluon.restore_tokens(x, 2, "zigzag", axis=3)
