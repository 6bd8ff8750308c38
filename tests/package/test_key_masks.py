"""Masks of keys: padding of dense caches and of batches of texts, at the left, right or between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from tests.support.against_oracle import check

_RNG = np.random.default_rng(11)
_FAR = 2**31 - 1
B, T, S = 3, 70, 91
HOLES = _RNG.random((B, S)) < 0.7
HOLES[1, :50] = False
HOLES[2] = False  # of this entry no key can be seen

CASES = {
    "left": dict(
        key_value_mask=np.arange(S) >= np.array([[0], [30], [S]]), is_causal=True,
        query_offset=S - T,
    ),
    "holes_of_all": dict(key_value_mask=HOLES[0], local_window_size=(20, 9)),
    "everything": dict(
        key_value_mask=HOLES, is_causal=True, logits_soft_cap=3.0, sinks=np.array([0.5, -1, 2, 0]),
        key_value_seq_lengths=np.array([80, 91, 91]), query_seq_lengths=np.array([70, 60, 70]),
        mask=_RNG.random((B, 1, T, S)) < 0.7, bias=_RNG.standard_normal((1, 4, T, S), np.float32),
    ),
    # No number near the ids that the mask may take for itself is free.
    "segments_of_any_value": dict(
        key_value_mask=HOLES, is_causal=True, local_window_size=(40, 7),
        query_segment_ids=_RNG.choice([-_FAR - 1, -1, 0, 1, 2, _FAR], (B, T)),
        key_value_segment_ids=_RNG.choice([-_FAR - 1, -1, 0, 1, 2, 3, _FAR], (B, S)),
        query_positions=_RNG.permutation(T), key_value_positions=_RNG.permutation(S),
    ),
    "as_many_segments_as_rows": dict(
        key_value_mask=HOLES, query_segment_ids=np.stack([_RNG.permutation(T)] * B),
        key_value_segment_ids=_RNG.integers(0, T + 2, (B, S)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_implementation_and_the_reference_are_the_oracle(
    case, implementation, oracle, relative_error, random_operands
):
    operands = random_operands(B, T, S, 4, 2, 22, 26)
    check(CASES[case], implementation, operands, oracle, relative_error)


def test_vmap_over_the_mask_alone_and_batch_axes(implementation, random_operands, relative_error):
    """The mask may have axes that nothing else has, and lack those that all else has."""
    q, k, v, _ = random_operands(4, 9, 40, 2, 1, 16, 16)
    masks = jnp.asarray(_RNG.random((5, 2, 40)) < 0.6)

    def attention(q, k, v, mask):
        return jax_gluon.dot_product_attention(
            q, k, v, key_value_mask=mask, implementation=implementation
        )

    each = jnp.stack([attention(q[:2], k[:2], v[:2], mask) for mask in masks])
    mapped = jax.vmap(attention, (None, None, None, 0))(q[:2], k[:2], v[:2], masks)
    assert relative_error(mapped, each) <= 1e-6
    two = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    for mask in (masks[0], masks[0, 0]):
        whole = attention(q, k, v, jnp.broadcast_to(mask, (2, 2, 40)).reshape(4, 40))
        assert relative_error(attention(*two, mask).reshape(whole.shape), whole) <= 1e-6


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_left_padded_prompts_in_a_dense_cache(
    quantization, implementation, random_operands, relative_error
):
    """The prompt and three more tokens, each sequence as it is alone."""
    lengths, P, capacity = np.array([5, 40, 17]), 40, 48
    q, k, v, _ = random_operands(B, P + 3, P + 3, 4, 2, 32, 32)
    is_real = np.arange(capacity) >= P - lengths[:, None]
    cache_k, cache_v = (
        jnp.full((B, capacity, 2, 32), jnp.nan).at[:, :P].set(x[:, :P]) for x in (k, v)
    )

    def attention(q, k, v, **keywords):
        return jax_gluon.dot_product_attention(
            q, k, v, is_causal=True, quantization=quantization, implementation=implementation,
            **keywords,
        )  # fmt: skip

    @jax.jit
    def step(q, k, v, at):
        is_filled = jnp.arange(capacity) < at + q.shape[1]
        return attention(q, k, v, query_offset=at, key_value_mask=is_filled & is_real)

    found = [step(q[:, :P], cache_k, cache_v, 0)]
    for at in range(P, P + 3):
        cache_k, cache_v = (x.at[:, at].set(y[:, at]) for x, y in ((cache_k, k), (cache_v, v)))
        found.append(step(q[:, at : at + 1], cache_k, cache_v, at))
    found = jnp.concatenate(found, axis=1)
    for b, length in enumerate(lengths):
        alone = attention(*(x[b : b + 1, P - length :] for x in (q, k, v)))
        bound = 2e-6 if quantization is None else 8e-3
        assert relative_error(found[b : b + 1, P - length :], alone) <= bound
        assert not np.asarray(found[b, : P - length]).any()


def test_a_cache_takes_a_mask_of_its_slots(random_operands, relative_error):
    """The tokens that it hides are as if they were not there."""
    q, k, v, _ = random_operands(2, 1, 40, 4, 2, 32, 32)
    is_real = np.arange(64) >= np.array([[0], [13]])
    cache = jax_gluon.QuantizedKVCache.create(2, 64, 2, 32, quantization="int8").append(k, v)
    found = cache.attention(q, key_value_mask=is_real, quantization=None)
    dense = [x.dequantize(jnp.float32) for x in (cache.key, cache.value)]
    expected = jax_gluon.dot_product_attention(
        q, *dense, key_value_mask=is_real & (np.arange(64) < 40)
    )
    assert relative_error(found, expected) <= 2e-6


def test_forward_mode_and_second_order(implementation, random_operands, relative_error):
    """As the reference's; beside segments, which the mask is told as."""
    q, k, v, d = random_operands(B, T, S, 4, 2, 16, 16)
    ids = jnp.asarray(_RNG.integers(0, 3, (B, T))), jnp.asarray(_RNG.integers(0, 3, (B, S)))

    def loss(attention, **keywords):
        def function(q, k, v):
            out = attention(
                q, k, v, key_value_mask=HOLES, query_segment_ids=ids[0],
                key_value_segment_ids=ids[1], is_causal=True, **keywords,
            )  # fmt: skip
            return jnp.sum(jnp.sin(out) * d)

        def of(q, k, v):
            _, tangent = jax.jvp(function, (q, k, v), (q, k, v))
            return jax.jvp(jax.grad(function), (q, k, v), (q, k, v))[1], tangent

        return jax.jit(of)(q, k, v)

    found = loss(
        jax_gluon.dot_product_attention, implementation=implementation, differentiation="any"
    )
    expected = loss(jax_gluon.reference.dot_product_attention)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) <= 1e-5
