"""Models that are not edited: KerasHub's, with few layers and random weights, under `patch`.

`make test-frameworks` installs what they need.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_gluon
from jax_gluon._thread_contexts import TRACES_AGAIN

keras_hub = pytest.importorskip("keras_hub", reason="make test-frameworks installs KerasHub")
if not TRACES_AGAIN:
    pytest.skip("this JAX keeps the programs that are compared with", allow_module_level=True)

B, T = 2, 21
RNG = np.random.default_rng(37)
TOKENS = RNG.integers(0, 100, (B, T))
PADDING = np.arange(T)[None] < np.array([[T], [13]])
COTANGENT = jnp.asarray(RNG.standard_normal((B, T, 64)) * PADDING[..., None], jnp.float32)
COMMON = dict(vocabulary_size=100, num_layers=2, hidden_dim=64, intermediate_dim=96)
GROUPED = dict(num_query_heads=4, num_key_value_heads=2)
MODELS = {
    "Qwen3Backbone": dict(head_dim=16, **GROUPED),
    "LlamaBackbone": GROUPED,
    "MistralBackbone": dict(sliding_window=7, **GROUPED),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return getattr(keras_hub.models, request.param)(**COMMON, **MODELS[request.param])


def run(model):
    """Output, gradients, and the loss before and after a step of training."""
    state = [v.value for v in model.non_trainable_variables]
    inputs = {"token_ids": TOKENS, "padding_mask": PADDING.astype(np.int32)}
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(weights):
        def loss(weights):
            out = model.stateless_call(weights, state, inputs)[0]
            return jnp.sum(out * COTANGENT), out

        (before, out), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
        updates, _ = optimizer.update(gradients, optimizer.init(weights))
        return out, gradients, (before, loss(optax.apply_updates(weights, updates))[0])

    return jax.block_until_ready(step([v.value for v in model.trainable_variables]))


@pytest.mark.parametrize(("quantization", "bar"), [(None, 2e-5), ("int8", 5e-2)])
def test_forward_gradients_and_a_step_of_training(
    require, relative_error, model, quantization, bar
):
    require("cpu")
    out, gradients, losses = run(model)
    with jax_gluon.patch(quantization=quantization) as patched:
        actual, actual_gradients, actual_losses = run(model)
        ran = {(each["pass"], each["device"]) for each in jax_gluon.debug.kernels()}
    assert ("backward", "cpu") in ran
    assert {call.where.split(":")[0] for call in patched.calls} == {"keras.src.backend.jax.nn"}
    assert patched.left_alone == ()
    error = relative_error(actual[PADDING], out[PADDING])
    assert (0 if quantization is None else 1e-5) < error <= bar
    for x, y in zip(actual_gradients, gradients, strict=True):
        assert relative_error(x, y) <= 3 * bar
    assert actual_losses[1] < actual_losses[0]
    assert relative_error(actual_losses, losses) <= bar
