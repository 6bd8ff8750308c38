"""Flax's own attention modules on `jax_gluon.flax.attention_fn` against their default attention."""

import functools
import inspect
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jax_gluon._quantize
import jax_gluon.flax
from jax_gluon._arguments import KEYWORDS
from jax_gluon._frameworks import OF_A_CALL

B, T, S, FEATURES, HEADS = 2, 11, 13, 24, 4
RNG = np.random.default_rng(11)
X = jnp.asarray(RNG.standard_normal((B, T, FEATURES)), jnp.float32)
MEMORY = jnp.asarray(RNG.standard_normal((B, S, FEATURES)), jnp.float32)
COTANGENT = jnp.asarray(RNG.standard_normal((B, T, FEATURES)), jnp.float32)
MASKS = {
    "none": None,
    "causal": linen.make_causal_mask(jnp.ones((B, T))),  # float32, as Flax makes it
    "padding": linen.make_attention_mask(jnp.ones((B, T)), jnp.arange(T)[None].repeat(B, 0) < 7),
    "full": jnp.asarray(RNG.random((B, HEADS, T, T)) < 0.7).at[..., 0].set(True),
}


def attention_fn(implementation, **keywords):
    return jax_gluon.flax.attention_fn(implementation=implementation, **keywords)


def loss_and_gradients(apply, parameters, *inputs):
    def loss(parameters, *inputs):
        out = apply(parameters, *inputs)
        return jnp.sum(out * COTANGENT), out

    argnums = tuple(range(1 + len(inputs)))
    gradients, out = jax.jit(jax.grad(loss, argnums, has_aux=True))(parameters, *inputs)
    return out, gradients


def assert_close(actual, expected, relative_error, bar):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The gradient of a bias of the keys is zero but for rounding.
        if np.linalg.norm(y) > 1e-4:
            assert relative_error(x, y) <= bar


@functools.cache
def linen_results(mask, implementation=None):
    """Of Flax's own attention where no implementation of ours is given."""
    fn = {} if implementation is None else {"attention_fn": attention_fn(implementation)}
    module = linen.MultiHeadDotProductAttention(HEADS, **fn)
    parameters = linen.MultiHeadDotProductAttention(HEADS).init(jax.random.key(0), X)
    return loss_and_gradients(lambda p, x: module.apply(p, x, mask=MASKS[mask]), parameters, X)


@pytest.mark.parametrize("mask", MASKS)
def test_linen_forward_and_gradients(implementation, relative_error, mask):
    results = linen_results(mask, implementation), linen_results(mask)
    assert_close(*results, relative_error, 1e-5)


def test_linen_takes_a_block_mask(relative_error):
    mask = jax_gluon.block_mask(lambda b, h, i, j: j <= i, T, T)
    module = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn("cpu"))
    parameters = module.init(jax.random.key(0), X)
    found = module.apply(parameters, X, mask=mask)
    expected = module.apply(parameters, X, mask=MASKS["causal"])
    assert relative_error(found, expected) <= 1e-6


def test_linen_cross_attention(implementation, relative_error):
    make = lambda **keywords: linen.MultiHeadAttention(HEADS, **keywords)  # noqa: E731
    ours, default = make(attention_fn=attention_fn(implementation)), make()
    parameters = default.init(jax.random.key(0), X, MEMORY)
    results = [
        loss_and_gradients(lambda p, x, y, m=m: m.apply(p, x, y), parameters, X, MEMORY)
        for m in (ours, default)
    ]
    assert_close(*results, relative_error, 1e-5)


def test_linen_decode_gives_the_rows_of_causal_attention(implementation, relative_error):
    fn = attention_fn(implementation)
    module = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn)
    parameters = module.init(jax.random.key(0), X)
    whole = module.apply(parameters, X, mask=MASKS["causal"])
    decoder = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn, decode=True)
    cache = decoder.init(jax.random.key(0), X)["cache"]

    @jax.jit
    def step(cache, row):
        out, state = decoder.apply({**parameters, "cache": cache}, row, mutable=["cache"])
        return state["cache"], out

    rows = []
    for t in range(T):
        cache, row = step(cache, X[:, t : t + 1])
        rows.append(row)
    assert relative_error(jnp.concatenate(rows, 1), whole) <= 1e-5


def nnx_modules(implementation, **keywords):
    def make(**more):
        return nnx.MultiHeadAttention(
            HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **keywords, **more
        )

    return make(attention_fn=attention_fn(implementation)), make()


def nnx_results(module, inputs, **keywords):
    graph, state = nnx.split(module)
    return loss_and_gradients(
        lambda state, *x: nnx.merge(graph, state)(*x, **keywords), state, *inputs
    )


@functools.cache
def default_nnx_results(mask, is_causal):
    _, default = nnx_modules(None)
    return nnx_results(default, (X,), mask=MASKS[mask], is_causal=is_causal)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx_forward_and_gradients(implementation, relative_error, mask, is_causal):
    if implementation == "xla" and is_causal:
        pytest.skip("its rules are in tests/package/test_xla.py")
    ours, _ = nnx_modules(implementation)
    actual = nnx_results(ours, (X,), mask=MASKS[mask], is_causal=is_causal)
    assert_close(actual, default_nnx_results(mask, is_causal), relative_error, 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_nnx_grouped_query_attention(implementation, relative_error, kv_heads):
    ours, default = nnx_modules(implementation, num_kv_heads=kv_heads)
    results = [nnx_results(module, (X, MEMORY)) for module in (ours, default)]
    assert ours.key.kernel.shape[1] == kv_heads
    assert_close(*results, relative_error, 1e-5)


def test_nnx_decode_gives_the_rows_of_causal_attention(implementation, relative_error):
    module, _ = nnx_modules(implementation)
    whole = module(X, is_causal=True)
    module.set_attributes(decode=True)
    module.init_cache((B, T, FEATURES))
    rows = [module(X[:, t : t + 1]) for t in range(T)]
    assert relative_error(jnp.concatenate(rows, 1), whole) <= 1e-5


def test_int8_is_within_the_quantization_error(implementation, relative_error):
    default = linen.MultiHeadDotProductAttention(HEADS)
    ours = linen.MultiHeadDotProductAttention(
        HEADS, attention_fn=attention_fn(implementation, quantization="int8")
    )
    parameters = default.init(jax.random.key(0), X)
    actual, expected = (
        loss_and_gradients(lambda p, x, m=m: m.apply(p, x), parameters, X) for m in (ours, default)
    )
    error = relative_error(actual[0], expected[0])
    assert 1e-4 < error < 2e-2
    assert_close(actual[1], expected[1], relative_error, 5e-2)


def test_any_number_of_batch_axes(implementation, relative_error):
    draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)  # noqa: E731
    query, key, value = draw(2, 3, T, HEADS, 8), draw(2, 3, S, HEADS, 8), draw(2, 3, S, HEADS, 5)
    mask = jnp.asarray(RNG.random((2, 1, 1, T, S)) < 0.8)
    bias = draw(1, 1, HEADS, T, S)
    out = attention_fn(implementation)(query, key, value, bias=bias, mask=mask)
    assert out.shape == (2, 3, T, HEADS, 5)
    assert relative_error(out, linen.dot_product_attention(query, key, value, bias, mask)) <= 1e-5


def test_arguments_are_promoted_as_flax_does(implementation):
    query = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    other = jnp.ones((1, 2, 1, 4), jnp.float32)
    fn = attention_fn(implementation)
    assert fn(query, other, other).dtype == jnp.float32
    assert fn(query, other, other, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_integers_become_floats_as_in_flax(implementation, relative_error):
    x = jnp.asarray(RNG.integers(-2, 3, (1, 5, 2, 4)), jnp.int32)
    out = attention_fn(implementation)(x, x, x)
    assert out.dtype == jnp.float32
    assert relative_error(out, linen.dot_product_attention(x, x, x)) <= 1e-5


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((2, 3, 5, 1, 4), (3, 2, 5, 1, 4), r"key is of batch axes \[3, 2\]; allowed: .*\[2, 3\]"),
        ((2, 3, 5, 1, 4), (6, 5, 1, 4), "key is of rank 4; allowed: query's rank, 5"),
        ((5, 4), (5, 4), "query is of rank 2; allowed: rank 3 or more"),
        ((2, 5, 1, 4), (5, 4), "key is of rank 2; allowed"),
    ],
)
def test_batch_axes_that_differ_are_refused(query, key, message):
    with pytest.raises(ValueError, match=f"jax_gluon.dot_product_attention: {message}"):
        jax_gluon.flax.attention_fn()(jnp.ones(query), jnp.ones(key), jnp.ones(key))


@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize(("batch", "shape"), [((2,), (3, 2, 1, 5, 7)), ((2, 3), (4, 1, 5, 7))])
def test_a_bias_or_mask_that_does_not_broadcast_is_refused(name, batch, shape):
    query, key = jnp.ones((*batch, 5, 1, 4)), jnp.ones((*batch, 7, 1, 4))
    with pytest.raises(ValueError, match=rf"jax_gluon.dot_product_attention: {name} is of shape"):
        jax_gluon.flax.attention_fn()(query, key, key, **{name: jnp.ones(shape)})


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shape", [(S,), (T, S), (HEADS, 1, S), (HEADS, T, S)])
def test_masks_and_biases_of_any_rank_broadcast(implementation, relative_error, batch, shape):
    if implementation == "xla" and len(shape) != len(batch) + 1:
        pytest.skip("ranks are made alike before; each rank once")
    draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)  # noqa: E731
    query, key = draw(*batch, T, HEADS, 8), draw(*batch, S, HEADS, 8)
    mask = jnp.asarray(RNG.random(shape) < 0.7).at[..., 0].set(True)
    arguments = (query, key, key, draw(*shape), mask)
    expected = linen.dot_product_attention(*arguments)
    assert relative_error(attention_fn(implementation)(*arguments), expected) <= 1e-5


def test_the_construction_keywords_reach_every_call(implementation, relative_error):
    x = jnp.asarray(RNG.standard_normal((1, 9, 2, 8)), jnp.float32)
    fn = attention_fn(implementation, is_causal=True, local_window_size=2, scale=0.2)
    expected = jax.nn.dot_product_attention(x, x, x, is_causal=True, local_window_size=2, scale=0.2)
    assert relative_error(fn(x, x, x), expected) <= 1e-5


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"module": object()}, "sow_weights"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum is set"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum is set"),
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general is set"),
    ],
)
def test_what_a_fused_kernel_cannot_give_is_refused(keywords, message):
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(NotImplementedError, match=message):
        jax_gluon.flax.attention_fn()(x, x, x, **keywords)


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout_is_that_of_the_published_mask(implementation, broadcast):
    """With several batch axes; none where it is deterministic."""
    rng = jax.random.key(3)
    x = jnp.ones((2, 3, 10, 2, 4))
    keywords = dict(dropout_rate=0.5, dropout_rng=rng, broadcast_dropout=broadcast)
    out = attention_fn(implementation)(x, x, x, **keywords)
    mask = np.asarray(jax_gluon.dropout_mask(rng, (6, 2, 10, 10), 0.5, broadcast=broadcast))
    expected = (2 * mask.mean(-1)).transpose(0, 2, 1).reshape(2, 3, 10, 2, 1)
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-5)
    out = attention_fn(implementation)(x, x, x, **keywords, deterministic=True)
    np.testing.assert_allclose(out, x, rtol=1e-6)


def test_modules_train_with_dropout():
    """Linen and nnx pass key and rate; a gradient flows."""
    x = jnp.asarray(RNG.standard_normal((2, 9, 8)), jnp.float32)
    module = linen.MultiHeadDotProductAttention(
        num_heads=2, dropout_rate=0.3, attention_fn=attention_fn(None), deterministic=False
    )
    keys = dict(params=jax.random.key(0), dropout=jax.random.key(1))
    parameters = module.init(keys, x)

    def loss(parameters, key):
        return jnp.sum(module.apply(parameters, x, rngs={"dropout": key}) ** 2)

    first, second = (jax.grad(loss)(parameters, jax.random.key(i)) for i in (1, 2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.isfinite(a).all()
        assert not np.array_equal(a, b)


def test_sinks_of_a_linen_module_take_a_gradient(implementation, relative_error):
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            sinks = self.param("sinks", linen.initializers.ones, (HEADS,))
            fn = attention_fn(implementation, sinks=lambda: sinks)
            return linen.MultiHeadAttention(HEADS, attention_fn=fn)(x)

    parameters = Block().init(jax.random.key(0), X)
    out, (gradients, _) = loss_and_gradients(Block().apply, parameters, X)
    # As a constant, and with a difference of the loss.
    inner = {"params": parameters["params"]["MultiHeadAttention_0"]}

    def constant(sinks):
        fn = attention_fn(implementation, sinks=sinks)
        return linen.MultiHeadAttention(HEADS, attention_fn=fn).apply(inner, X)

    assert relative_error(out, constant(np.ones(HEADS, np.float32))) <= 1e-6
    for n in range(HEADS):
        step = 0.05 * np.eye(HEADS, dtype=np.float32)[n]
        change = jnp.sum((constant(1 + step) - constant(1 - step)) * COTANGENT) / 0.1
        assert abs(gradients["params"]["sinks"][n] - change) <= 2e-3


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (np.arange(HEADS), TypeError, r"sinks is of dtype int.*allowed: float32"),
        (0.5, ValueError, r"sinks is of shape \[\].*allowed: a logit for each query head"),
    ],
)
def test_sinks_that_are_no_logits_are_refused(sinks, error, message):
    with pytest.raises(error, match=message):
        attention_fn("xla", sinks=sinks)
    with pytest.raises(TypeError, match="sinks is traced; allowed: a function that returns it"):
        jax.jit(lambda x: attention_fn("xla", sinks=x)(X, X, X))(jnp.ones(HEADS))


def test_equal_options_make_equal_functions_that_trace_once():
    make = lambda: attention_fn(  # noqa: E731
        "xla", local_window_size=(2, 1), quantization="int8", sinks=jnp.ones(HEADS)
    )
    assert make() == make() == pickle.loads(pickle.dumps(make()))
    assert hash(make()) == hash(make())
    assert make() != attention_fn("xla", local_window_size=(2, 1))
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(module, parameters, x):
        traces.append(None)
        return module.apply(parameters, x)

    parameters = linen.MultiHeadAttention(HEADS).init(jax.random.key(0), X)
    for _ in range(2):
        apply(linen.MultiHeadAttention(HEADS, attention_fn=make()), parameters, X)
    assert len(traces) == 1
    graphs = [
        nnx.graphdef(
            nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0),
                                   attention_fn=make())
        )
        for _ in range(2)
    ]  # fmt: skip
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"is_causal": True}, "is_causal is True"), ({"local_window_size": 2}, "local_window_size")],
)
def test_decoding_with_positions_that_flax_does_not_pass_is_refused(
    require, implementation, keywords, message
):
    require(implementation)
    fn = attention_fn(implementation, **keywords)
    decoder = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn, decode=True)
    variables = decoder.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=f"{message}.*one query over {T} keys.*decode=True"):
        decoder.apply(variables, X[:, :1], mutable="cache")
    module = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0), attention_fn=fn)
    module.init_cache(X.shape)
    with pytest.raises(ValueError, match=message):
        module(X[:, :1])


def quantized_values():
    x = jnp.asarray(RNG.standard_normal((B, 40, 2, 16)), jnp.bfloat16)
    spec = jax_gluon.QuantSpec(4, False, "channel_block", float_minimum=True, rotate=True)
    cache = jax_gluon.QuantizedKVCache.create(B, 64, 2, 16, quantization="int4", window=20)
    return {
        "rows": jax_gluon.quantize(x, jax_gluon.QuantSpec(center=True)),
        "zero_points": jax_gluon.quantize(x, jax_gluon.QuantSpec(symmetric=False)),
        "blocks": jax_gluon.quantize(x, spec),
        "cache": cache.append(x[:, :37], x[:, :37], [37, 5]),
    }


@pytest.mark.parametrize("name", ["rows", "zero_points", "blocks", "cache"])
def test_serialization_keeps_every_bit(name):
    value = quantized_values()[name]
    target = jax.tree.map(jnp.zeros_like, value)
    as_bytes = flax.serialization.to_bytes({"x": value})
    as_state = flax.serialization.to_state_dict({"x": value})
    for restored in (
        flax.serialization.from_bytes({"x": target}, as_bytes),
        flax.serialization.from_state_dict({"x": target}, as_state),
    ):
        assert jax.tree.structure(restored["x"]) == jax.tree.structure(value)
        for x, y in zip(jax.tree.leaves(restored["x"]), jax.tree.leaves(value), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_a_state_of_another_format_is_refused():
    values = quantized_values()
    state = flax.serialization.to_state_dict(values["rows"])
    for other in ("zero_points", "blocks", "cache"):
        with pytest.raises(ValueError, match=r"jax_gluon\.flax: .* allowed: those of the target"):
            flax.serialization.from_state_dict(values[other], state)
    with pytest.raises(ValueError, match=r"jax_gluon\.flax: data .*\[2, 40, 2, 16\]; .*\[2, 8"):
        flax.serialization.from_state_dict(values["rows"][:, :8], state)


def test_a_module_has_forward_mode(relative_error):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 5, 16)), jnp.float32)

    def derivative(**keywords):
        module = linen.MultiHeadDotProductAttention(num_heads=2, **keywords)
        weights = module.init(jax.random.key(0), x)
        return jax.jvp(lambda x: module.apply(weights, x), (x,), (x,))

    given = jax_gluon.flax.attention_fn(differentiation="any", implementation="xla")
    actual, expected = derivative(attention_fn=given), derivative()
    assert relative_error(actual[1], expected[1]) < 1e-5
    by_default = jax_gluon.flax.attention_fn(implementation="xla")
    with jax_gluon.default_differentiation("any"):
        np.testing.assert_array_equal(derivative(attention_fn=by_default)[1], actual[1])


def test_every_argument_is_an_option_or_of_one_call():
    """What one batch has, Flax gives or has no way to give; its modules have one layout."""
    by_flax = {"dropout_rate", "dropout_rng", "broadcast_dropout", "layout"}
    of_one_call = {*OF_A_CALL, *by_flax} - {"bias"}
    options = set(inspect.signature(jax_gluon.flax.attention_fn).parameters)
    assert options | of_one_call == set(KEYWORDS)
    assert not options & of_one_call
