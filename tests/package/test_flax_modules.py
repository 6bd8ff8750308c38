"""`jax_gluon.linen` and `jax_gluon.nnx`: decoding into a quantized cache, arguments of one call."""

import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jax_gluon.flax
import jax_gluon.linen
import jax_gluon.nnx

B, T, FEATURES, HEADS, H = 2, 13, 24, 4, 8
RNG = np.random.default_rng(31)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)  # noqa: E731
X, COTANGENT, SINKS = draw(B, T, FEATURES), draw(B, T, FEATURES), draw(HEADS)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 3, (B, T))), jnp.int32)
options = jax_gluon.flax.attention_fn


class OfLinen:
    """A linen module, its variables and its cache, as one object that is called."""

    def __init__(self, *, flaxs_own=False, kv_heads=None, decode=False, **keywords):
        module = linen if flaxs_own else jax_gluon.linen
        self.module = module.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * H, decode=decode, **keywords
        )
        self.variables = dict(self.module.init(jax.random.key(0), X, deterministic=True))
        self.parameters = self.variables.pop("params")

    def __call__(self, x, rng=None, **keywords):
        rngs = {} if rng is None else {"rngs": {"dropout": rng}}
        variables = {"params": self.parameters, **self.variables}
        out, state = self.module.apply(variables, x, mutable="cache", **rngs, **keywords)
        self.variables = state
        return out

    @property
    def cache(self):
        return self.variables["cache"]["quantized_cache"]

    def functional(self):
        """A function of parameters, and parameters."""
        return lambda p, x, **keywords: self.module.apply({"params": p}, x, **keywords), (
            self.parameters
        )


class OfNnx:
    def __init__(self, *, flaxs_own=False, kv_heads=None, decode=False, **keywords):
        module = nnx if flaxs_own else jax_gluon.nnx
        grouped = {} if kv_heads is None else {"num_kv_heads": kv_heads}
        self.module = module.MultiHeadAttention(
            HEADS, FEATURES, HEADS * H, decode=decode, rngs=nnx.Rngs(0), **grouped, **keywords
        )
        if decode:
            self.module.init_cache(X.shape)

    def __call__(self, x, rng=None, **keywords):
        rngs = {} if rng is None else {"rngs": nnx.Rngs(dropout=rng)}
        return self.module(x, **rngs, **keywords)

    @property
    def cache(self):
        return jax_gluon.nnx._value(self.module.quantized_cache)

    @property
    def parameters(self):
        return nnx.state(self.module, nnx.Param)

    def functional(self):
        graph, parameters, rest = nnx.split(self.module, nnx.Param, ...)
        return lambda p, x, **keywords: nnx.merge(graph, p, rest)(x, **keywords), parameters


@pytest.fixture(params=[OfLinen, OfNnx])
def made(request, require):
    require("cpu")
    return request.param


def gradients(module, **keywords):
    apply, parameters = module.functional()

    def loss(parameters, x):
        out = apply(parameters, x, **keywords)
        return jnp.sum(out * COTANGENT), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(parameters, X)
    return out, grads


def assert_close(actual, expected, relative_error, bar):
    actual, expected = (jax.tree.leaves(x) for x in (actual, expected))
    for x, y in zip(actual, expected, strict=True):
        # The gradient of a bias of the keys is zero but for rounding.
        if np.linalg.norm(y) > 1e-4:
            assert relative_error(x, y) <= bar


def test_they_are_flaxs_modules_with_its_parameters(made, relative_error):
    ours, own = made(), made(flaxs_own=True)
    ours, own = (gradients(module) for module in (ours, own))
    assert jax.tree.structure(ours[1]) == jax.tree.structure(own[1])
    assert_close(ours, own, relative_error, 1e-5)


def test_arguments_of_one_call(made, relative_error):
    """Segments and a bias, and the mask that they are for Flax's own attention."""
    of_call = dict(query_segment_ids=SEGMENTS, key_value_segment_ids=SEGMENTS)
    mask = SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]
    expected = gradients(made(flaxs_own=True), mask=mask)
    assert_close(gradients(made(), **of_call), expected, relative_error, 1e-5)
    hidden = jnp.where(mask, 0.0, -jnp.inf)
    assert_close(gradients(made(), bias=hidden), expected, relative_error, 1e-5)
    both = gradients(made(), mask=mask, key_value_mask=jnp.arange(T) != 3)
    with_hole = gradients(made(flaxs_own=True), mask=mask & (jnp.arange(T) != 3))
    assert_close(both[0], with_hole[0], relative_error, 1e-5)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_step_of_training(made, relative_error, quantization):
    optimizer = optax.adam(1e-2)

    def after(module):
        apply, parameters = module.functional()

        @jax.jit
        def step(parameters):
            def loss(parameters):
                return jnp.mean((apply(parameters, X) - COTANGENT) ** 2)

            value, grads = jax.value_and_grad(loss)(parameters)
            updates, _ = optimizer.update(grads, optimizer.init(parameters))
            return loss(optax.apply_updates(parameters, updates)), value

        return step(parameters)

    actual, before = after(made(attention_fn=options(quantization=quantization)))
    expected, _ = after(made(flaxs_own=True))
    assert actual < before
    assert relative_error(actual, expected) <= (1e-5 if quantization is None else 2e-2)


def test_sinks_are_a_parameter(made, relative_error):
    module = made(sinks=True)
    apply, parameters = module.functional()
    leaves, tree = jax.tree.flatten(parameters)
    index = [x.shape for x in leaves].index((HEADS,))
    leaves[index] = SINKS
    out = apply(jax.tree.unflatten(tree, leaves), X)
    fn = options(sinks=SINKS)
    assert relative_error(out, made(attention_fn=fn)(X)) <= 1e-6
    assert relative_error(out, made()(X)) > 1e-2
    grads = jax.tree.leaves(gradients(module)[1][0])
    assert np.abs(grads[index]).min() > 0


def test_dropout_by_the_modules_own_generator(made, relative_error):
    module = made(dropout_rate=0.5, broadcast_dropout=False)
    expected = made()(X)
    assert relative_error(module(X, deterministic=True), expected) <= 1e-6
    run = jax.jit(lambda rng: module(X, rng=rng, deterministic=False))
    drawn = [run(jax.random.key(i)) for i in range(48)]
    np.testing.assert_array_equal(drawn[0], run(jax.random.key(0)))
    assert relative_error(drawn[0], drawn[1]) > 0.05
    assert relative_error(np.mean(drawn, 0), expected) < 0.25 * relative_error(drawn[0], expected)


def whole(made, **keywords):
    return made(attention_fn=options(is_causal=True, **keywords))(X)


def test_decoding_into_a_quantized_cache(made, relative_error):
    """A prompt, then token by token: the rows of causal attention, up to the codes."""
    module = made(decode=True, cache_quantization="int8")
    assert module.cache.length.tolist() == [0, 0]
    rows = [module(X[:, :5])] + [module(X[:, t : t + 1]) for t in range(5, T)]
    assert isinstance(module.cache, jax_gluon.QuantizedKVCache)
    assert module.cache.length.tolist() == [T, T]
    error = relative_error(jnp.concatenate(rows, 1), whole(made))
    assert 1e-4 < error < 2e-2


def test_prompts_of_unlike_lengths(made, relative_error):
    module = made(decode=True, cache_quantization="int8")
    module(X[:, :6], lengths=jnp.array([6, 2]))
    steps = jnp.stack([X[0, 6], X[1, 2]])[:, None]
    out = module(steps)
    assert module.cache.length.tolist() == [7, 3]
    expected = whole(made)
    assert relative_error(out[0, 0], expected[0, 6]) < 2e-2
    assert relative_error(out[1, 0], expected[1, 2]) < 2e-2


def test_a_window_makes_the_cache_a_ring(made, relative_error):
    fn = options(local_window_size=(3, 0), logits_soft_cap=5.0)
    module = made(decode=True, cache_quantization="int8", attention_fn=fn)
    assert module.cache.window == 4
    rows = [module(X[:, t : t + 1]) for t in range(T)]
    expected = whole(made, local_window_size=(3, 0), logits_soft_cap=5.0)
    assert relative_error(jnp.concatenate(rows, 1), expected) < 2e-2


def test_sinks_while_decoding(made, relative_error):
    fn = options(sinks=SINKS)
    module = made(decode=True, cache_quantization="int8", attention_fn=fn)
    rows = [module(X[:, t : t + 1]) for t in range(3)]
    expected = whole(made, sinks=SINKS)[:, :3]
    assert relative_error(jnp.concatenate(rows, 1), expected) < 2e-2


def test_the_cache_is_whole_blocks(made):
    module = made(decode=True, cache_quantization="int4")
    assert (T, module.cache.capacity) == (13, 32)


def test_decoding_under_jit(relative_error):
    """Linen's variables are carried by a scan, nnx's by its own `jit`."""
    module = OfLinen(decode=True, cache_quantization="int8")

    def step(cache, row):
        variables = {"params": module.parameters, "cache": cache}
        out, state = module.module.apply(variables, row[:, None], mutable="cache")
        return state["cache"], out[:, 0]

    cache, rows = jax.lax.scan(step, module.variables["cache"], jnp.moveaxis(X, 1, 0))
    assert cache["quantized_cache"].length.tolist() == [T, T]
    assert relative_error(jnp.moveaxis(rows, 0, 1), whole(OfLinen)) < 2e-2
    module = OfNnx(decode=True, cache_quantization="int8")
    call = nnx.jit(lambda module, x: module(x))
    rows = [call(module.module, X[:, t : t + 1]) for t in range(3)]
    assert module.cache.length.tolist() == [3, 3]
    assert relative_error(jnp.concatenate(rows, 1), whole(OfNnx)[:, :3]) < 2e-2


def test_grouped_queries_and_several_batch_axes_while_decoding(relative_error):
    x = X.reshape(2, 1, T, FEATURES)
    module = jax_gluon.nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * H, num_kv_heads=2, decode=True, cache_quantization="int8",
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    module.init_cache(x.shape)
    out = module(x[..., :7, :], lengths=jnp.full((2, 1), 7))
    cache = jax_gluon.nnx._value(module.quantized_cache)
    assert cache.key.shape == (2, T, 2, H)
    expected = module(x, decode=False, is_causal=True)[..., :7, :]
    assert relative_error(out, expected) < 2e-2


def test_a_dense_cache_is_flaxs(made, relative_error):
    module = made(decode=True)
    rows = [module(X[:, t : t + 1]) for t in range(3)]
    assert relative_error(jnp.concatenate(rows, 1), whole(made)[:, :3]) <= 1e-5
    with pytest.raises(ValueError, match=r"bias is set while decoding into Flax's cache"):
        module(X[:, :1], bias=jnp.zeros((1, T)))


def test_the_cache_of_linen_is_serialized(made):
    if made is OfNnx:
        pytest.skip("its state is a pytree as any other")
    module = made(decode=True, cache_quantization="int8")
    module(X[:, :5])
    target = made(decode=True, cache_quantization="int8").variables
    again = flax.serialization.from_bytes(target, flax.serialization.to_bytes(module.variables))
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(module.variables), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("keywords", "call", "message"),
    [
        ({}, dict(lengths=jnp.array([1, 1])), "lengths is given; allowed: None"),
        (
            dict(decode=True, cache_quantization="int8"), dict(mask=jnp.ones((1, 1, T, T))),
            "mask is given while decoding; allowed: None",
        ),
        (
            dict(decode=True, cache_quantization="int8"), dict(query_segment_ids=SEGMENTS),
            "query_segment_ids is given while decoding; allowed: None",
        ),
    ],
)  # fmt: skip
def test_what_a_call_has_no_use_for_is_refused(made, keywords, call, message):
    with pytest.raises(ValueError, match=message):
        made(**keywords)(X, **call)


def test_other_mistakes_are_refused(made):
    with pytest.raises(TypeError, match=r"attention_fn is a function; allowed: what jax_gluon"):
        made(attention_fn=linen.dot_product_attention)(X)
    with pytest.raises(ValueError, match='cache_quantization is "int9"; allowed: None, "int8"'):
        made(decode=True, cache_quantization="int9")


def test_nnx_without_a_cache_says_what_to_call():
    module = jax_gluon.nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * H, decode=True, cache_quantization="int8", rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="decode is True without a cache; allowed: a call of init"):
        module(X[:, :1])


def test_keys_for_the_cache_are_those_that_are_attended_to():
    longer = jnp.ones((B, 64, FEATURES))
    module = jax_gluon.linen.MultiHeadDotProductAttention(
        HEADS, qkv_features=HEADS * H, decode=True, cache_quantization="int8"
    )
    for given in ("inputs_k", "inputs_kv"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of inputs_kv
            variables = module.init(jax.random.key(0), X, **{given: longer})
        assert variables["cache"]["quantized_cache"].capacity == 64
    with pytest.raises(
        ValueError, match="inputs_k is 5 tokens beside 13 queries; allowed: as many"
    ):
        module.apply(variables, X, X[:, :5], mutable="cache")
