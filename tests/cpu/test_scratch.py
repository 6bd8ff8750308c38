"""Scratch memory that calls leave for those after them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon

plugin = pytest.importorskip("jax_gluon._plugin")
MAX_KEPT = 256 * 2**20


def gradients(T, H, seed=0):
    rng = np.random.default_rng(seed)
    shape = (1, T, 2, H)
    x = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]

    @jax.jit
    def function(*x):
        def loss(*x):
            return jnp.sum(jax_gluon.dot_product_attention(*x, implementation="cpu") ** 2)

        return jax.grad(loss, (0, 1, 2))(*x)

    return jax.block_until_ready(function(*x)), lambda: jax.block_until_ready(function(*x))


def test_a_call_finds_what_the_one_before_left():
    expected, again = gradients(600, 64)
    kept, made = plugin.cpu_scratch_state()
    assert 0 < kept <= MAX_KEPT
    for _ in range(5):
        for x, y in zip(again(), expected, strict=True):
            np.testing.assert_array_equal(x, y)
    # Two threads may need what one did before.
    assert plugin.cpu_scratch_state()[1] - made <= 64
    after = plugin.cpu_scratch_state()[1]
    for _ in range(5):
        again()
    assert plugin.cpu_scratch_state()[1] - after <= 8


def test_what_is_kept_is_bounded():
    """Calls of ever other sizes: what the first ones left goes."""
    query = jnp.ones((1, 8, 1, 256), jnp.float32)
    for S in range(30000, 60000, 6000):
        x = jnp.ones((1, S, 1, 256), jnp.float32)
        # Packs all keys and all values: 2 S blocks of 1 KiB.
        out = jax_gluon.dot_product_attention(
            query, x, x, implementation="cpu", kernel="baseline", scale=0.0
        )
        np.testing.assert_allclose(out, 1.0, rtol=1e-5)
        kept, _ = plugin.cpu_scratch_state()
        assert 2 * S * 1024 <= kept <= MAX_KEPT
