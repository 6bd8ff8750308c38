"""Query offsets: rows that stand elsewhere than at their index, for causal and window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gluon import _attention as attention
from jax_gluon._arguments import check_arguments
from jax_gluon._errors import Checker

_FARTHEST = 2**31 - 1


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def attend(is_causal, window, implementation, kernel, offset, lengths, *arrays):
    arguments = check_arguments(
        Checker("attend"), *arrays, None, None, is_causal=is_causal, key_value_seq_lengths=lengths,
        implementation=implementation, kernel=kernel,
    )  # fmt: skip
    arguments = dataclasses.replace(
        arguments,
        problem=dataclasses.replace(arguments.problem, local_window=window),
        operands=arguments.operands._replace(query_offset=offset),
    )
    return attention.run(arguments, True)


def seen(T, S, offset, is_causal, window):
    position = np.arange(T)[None, :, None] + np.asarray(offset, np.int64)[:, None, None]
    key = np.arange(S)[None, None, :]
    visible = (key <= position) | (not is_causal)
    if window is not None:
        visible &= (position - window[0] <= key) & (key <= position + window[1])
    return visible[:, None]


@pytest.mark.parametrize(
    ("implementation", "kernel", "T", "is_causal", "window"),
    [
        ("cpu", "baseline", 1, True, None),
        ("cpu", "baseline", 3, True, (20, 0)),
        ("cpu", "baseline", 90, False, (7, 90)),
        ("cpu", "baseline", 90, True, None),
        ("cpu", "gluon", 90, True, None),
        ("cpu", "gluon", 90, True, (20, 0)),
        ("xla", None, 90, True, (20, 0)),
        ("xla", None, 1, False, (7, 90)),
    ],
)
def test_rows_stand_at_their_index_and_the_offset(
    implementation, kernel, T, is_causal, window, oracle
):
    S, N, K, H = 333, 4, 2, 24
    offset = np.array([-2, 0, 170, S + 5, -_FARTHEST - 1, _FARTHEST, -100], np.int32)
    lengths = np.array([S, S, 200, S, S, S, 40], np.int32)
    B = len(offset)
    rng = np.random.default_rng(T)
    q, k, v, d_out = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    )
    expected = oracle(
        q, k, v, mask=seen(T, S, offset, is_causal, window), key_value_seq_lengths=lengths,
        d_out=d_out,
    )  # fmt: skip

    @jax.jit
    def results(offset, lengths, d_out, *arrays):
        call = functools.partial(attend, is_causal, window, implementation, kernel, offset, lengths)
        (out, _), pullback = jax.vjp(call, *arrays)
        return out, pullback((d_out, jnp.zeros((B, T, N))))

    out, gradients = results(offset, lengths, d_out, q, k, v)
    np.testing.assert_allclose(out, expected.out, atol=3e-6)
    for name, gradient in zip(("d_query", "d_key", "d_value"), gradients, strict=True):
        np.testing.assert_allclose(gradient, getattr(expected, name), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_hidden_nan_of_rows_that_see_different_keys(implementation):
    # The first row stands before the first key, the last is past its sequence's length.
    q = np.ones((1, 3, 2, 8), np.float32)
    k, v = (np.ones((1, 40, 1, 8), np.float32) for _ in range(2))
    v[:, 1:] = np.nan
    out, _ = attend(True, None, implementation, None, jnp.array([-1]), None, q, k, v)
    np.testing.assert_allclose(out[:, :2], np.stack([0 * q[:, 0], q[:, 0]], 1), atol=1e-6)
    assert np.isnan(out[:, 2]).all()
