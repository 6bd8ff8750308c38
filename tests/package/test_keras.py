"""Keras's own layers and ours in their place, forward, backward and in a step of training."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_gluon
from jax_gluon._thread_contexts import TRACES_AGAIN

keras = pytest.importorskip("keras")
if keras.backend.backend() != "jax":
    pytest.skip("Keras runs on another backend", allow_module_level=True)

import jax_gluon.keras  # noqa: E402

B, T, S, FEATURES = 2, 11, 13, 24
RNG = np.random.default_rng(23)
draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)  # noqa: E731
X, MEMORY, COTANGENT = draw(B, T, FEATURES), draw(B, S, FEATURES), draw(B, T, FEATURES)
LAYERS = {
    "MultiHeadAttention": dict(num_heads=4, key_dim=8),
    "GroupQueryAttention": dict(head_dim=8, num_query_heads=4, num_key_value_heads=2),
}
padding = jnp.arange(S)[None] < jnp.array([[S], [5]])
CALLS = {
    "cross": {},
    "causal": dict(use_causal_mask=True),
    "mask": dict(attention_mask=jnp.asarray(RNG.random((B, T, S)) < 0.7).at[..., 0].set(True)),
    "padding": dict(value_mask=padding, key_mask=padding[:1], use_causal_mask=True),
    "mask of heads": dict(
        attention_mask=jnp.asarray(RNG.random((B, 4, T, S)) < 0.7).at[..., 0].set(True)
    ),
}


@functools.cache
def layer_of(name, **options):
    """Of Keras where there are no options."""
    module = jax_gluon.keras if options else keras.layers
    options.pop("ours", None)
    layer = getattr(module, name)(**LAYERS[name], **options)
    layer.build(X.shape, MEMORY.shape)
    weights = np.random.default_rng(3)
    for variable in layer.weights:
        variable.assign(0.3 * weights.standard_normal(variable.shape))
    return layer


def variables_of(layer):
    return [v.value for v in layer.trainable_variables], [
        v.value for v in layer.non_trainable_variables
    ]


def apply(layer, weights, *inputs, **keywords):
    _, state = variables_of(layer)
    return layer.stateless_call(weights, state, *inputs, **keywords)[0]


def results(layer, **keywords):
    weights, _ = variables_of(layer)

    def loss(weights, x, memory):
        out = apply(layer, weights, x, memory, **keywords)
        return jnp.sum(out * COTANGENT), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(weights, X, MEMORY)
    return out, gradients


@functools.cache
def results_of_keras(name, call):
    return results(layer_of(name), **CALLS[call])


def assert_close(actual, expected, relative_error, bar):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The gradient of a bias of the keys is zero but for rounding.
        if np.linalg.norm(y) > 1e-4:
            assert relative_error(x, y) <= bar


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients(require, relative_error, name, call):
    require("cpu")
    actual = results(layer_of(name, ours=True), **CALLS[call])
    assert_close(actual, results_of_keras(name, call), relative_error, 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_int8_is_within_the_quantization_error(require, relative_error, name):
    require("cpu")
    out, gradients = results(layer_of(name, quantization="int8"))
    expected = results_of_keras(name, "cross")
    assert 1e-4 < relative_error(out, expected[0]) < 2e-2
    assert_close(gradients, expected[1], relative_error, 5e-2)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_cannot_be_edited(require, relative_error, name, quantization):
    """Keras asks JAX for `implementation="xla"`."""
    require("cpu")
    if name == "MultiHeadAttention" and not TRACES_AGAIN:
        pytest.skip("the program of Keras's own results is kept")
    expected = results_of_keras(name, "causal")
    with jax_gluon.patch(quantization=quantization) as patched:
        actual = jax.block_until_ready(results(layer_of(name), **CALLS["causal"]))
        ran = {(run["pass"], run["device"]) for run in jax_gluon.debug.kernels()}
    assert ("backward", "cpu") in ran
    assert {call.reason for call in patched.calls} == {None}
    assert {call.where.split(":")[0] for call in patched.calls} == {"keras.src.backend.jax.nn"}
    assert_close(actual, expected, relative_error, 1e-5 if quantization is None else 5e-2)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_of_training(require, relative_error, name, quantization):
    require("cpu")
    optimizer = optax.adam(1e-2)

    def after(layer):
        weights, _ = variables_of(layer)

        @jax.jit
        def step(weights):
            def loss(weights):
                return jnp.mean(
                    (apply(layer, weights, X, X, use_causal_mask=True) - COTANGENT) ** 2
                )

            value, gradients = jax.value_and_grad(loss)(weights)
            updates, _ = optimizer.update(gradients, optimizer.init(weights))
            return loss(optax.apply_updates(weights, updates)), value

        return step(weights)

    (actual, before), (expected, _) = (
        after(layer_of(name, **(dict(quantization="int8") if quantization else dict(ours=True)))),
        after(layer_of(name)),
    )
    assert actual < before
    assert relative_error(actual, expected) <= (1e-4 if quantization is None else 2e-2)


def test_padded_rows_are_0_and_reach_no_other(relative_error):
    mask = np.arange(T)[None] < np.array([[T], [5]])
    ours, of_keras = (layer_of("MultiHeadAttention", **o) for o in (dict(ours=True), {}))

    def call(layer):
        x = jnp.array(X)  # a call takes its mask away
        x._keras_mask = jnp.asarray(mask)
        return layer(x, x)

    out = call(ours)
    assert_close(out[mask], call(of_keras)[mask], relative_error, 1e-5)
    assert relative_error(out[mask], ours(X, X)[mask]) > 0.01
    bias = np.asarray(ours.weights[-1])
    assert bias.shape == (FEATURES,)
    np.testing.assert_array_equal(out[~mask], np.broadcast_to(bias, out[~mask].shape))


def test_values_of_another_width(relative_error):
    """Which Keras itself does not take on JAX but where it returns the scores."""
    make = lambda module: module.MultiHeadAttention(4, 8, value_dim=6)  # noqa: E731
    ours, of_keras = make(jax_gluon.keras), make(keras.layers)
    expected, _ = of_keras(X, X, return_attention_scores=True)
    ours.build(X.shape, X.shape)
    ours.set_weights(of_keras.get_weights())
    assert relative_error(ours(X, X), expected) <= 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_a_sliding_window_is_that_of_keras(relative_error, name):
    make = lambda module: getattr(module, name)(**LAYERS[name], sliding_window=3)  # noqa: E731
    ours, of_keras = make(jax_gluon.keras), make(keras.layers)
    expected = of_keras(X, X, use_causal_mask=True)
    ours.build(X.shape, X.shape)
    ours.set_weights(of_keras.get_weights())
    assert relative_error(ours(X, X, use_causal_mask=True), expected) <= 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_dropout(require, relative_error, name):
    """Of the rate, by the layer's own generator, and only in training."""
    require("cpu")
    layer = getattr(jax_gluon.keras, name)(**LAYERS[name], dropout=0.5, seed=1)
    expected = layer_of(name)
    layer.build(X.shape, MEMORY.shape)
    layer.set_weights(expected.get_weights())
    expected = expected(X, MEMORY)
    assert relative_error(layer(X, MEMORY, training=False), expected) <= 1e-5
    drawn = [layer(X, MEMORY, training=True) for _ in range(48)]
    assert relative_error(drawn[0], drawn[1]) > 0.05
    # Its mean is what is computed without.
    assert relative_error(np.mean(drawn, 0), expected) < 0.25 * relative_error(drawn[0], expected)


@pytest.mark.parametrize("name", LAYERS)
def test_scores_and_other_axes_are_left_to_keras(relative_error, name):
    ours, of_keras = layer_of(name, ours=True), layer_of(name)
    keywords = dict(use_causal_mask=True, return_attention_scores=True)
    actual, expected = (layer(X, X, **keywords) for layer in (ours, of_keras))
    assert_close(actual, expected, relative_error, 1e-6)
    assert actual[1].shape == (B, 4, T, T)


def test_attention_over_two_axes_is_left_to_keras(relative_error):
    x = X[:, :10].reshape(B, 5, 2, FEATURES)
    make = lambda module: module.MultiHeadAttention(2, 4, attention_axes=(1, 2))  # noqa: E731
    ours, of_keras = make(jax_gluon.keras), make(keras.layers)
    expected = of_keras(x, x)
    ours.build(x.shape, x.shape)
    ours.set_weights(of_keras.get_weights())
    assert relative_error(ours(x, x), expected) <= 1e-6


SPECS = jax_gluon.AttentionQuantization(
    key=jax_gluon.QuantSpec(4, False, "channel_block", float_minimum=True)
)


@pytest.mark.parametrize("quantization", [None, "int8", SPECS])
def test_a_saved_model_is_the_same_again(tmp_path, quantization):
    inputs = keras.Input((T, FEATURES))
    layer = jax_gluon.keras.MultiHeadAttention(
        4, 8, quantization=quantization, logits_soft_cap=20.0, implementation="xla"
    )
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    json.dumps(layer.get_config())
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(X), again(X))
    assert again.layers[-1].get_config() == layer.get_config()
    assert isinstance(again.layers[-1], jax_gluon.keras.MultiHeadAttention)


def test_checkpoints_are_those_of_keras(tmp_path, relative_error):
    def model(module):
        inputs = keras.Input((T, FEATURES))
        layer = module.GroupQueryAttention(8, 4, 2, name="attention")
        return keras.Model(inputs, layer(inputs, inputs))

    of_keras, ours = model(keras.layers), model(jax_gluon.keras)
    of_keras.save_weights(tmp_path / "x.weights.h5")
    ours.load_weights(tmp_path / "x.weights.h5")
    assert relative_error(ours(X), of_keras(X)) <= 1e-5


def test_fit_trains(require):
    require("cpu")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((T, FEATURES))
    layer = jax_gluon.keras.GroupQueryAttention(8, 4, 2, quantization="int8", dropout=0.1)
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    losses = model.fit(
        np.asarray(X), np.asarray(COTANGENT), epochs=10, batch_size=B, verbose=0
    ).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quantization="int9"), 'keras.MultiHeadAttention: quantization is "int9"'),
        (dict(implementation="cuda"), 'keras.MultiHeadAttention: implementation is "cuda"'),
    ],
)
def test_options_that_no_call_takes_are_refused(options, message):
    with pytest.raises(ValueError, match=f"jax_gluon.{message}.*allowed"):
        jax_gluon.keras.MultiHeadAttention(4, 8, **options)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax_gluon.keras")
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ImportError, match='the backend of Keras is "torch"; allowed: "jax"'):
        __import__("jax_gluon.keras")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r"pip install 'jax-gluon\[keras\]'"):
        __import__("jax_gluon.keras")
