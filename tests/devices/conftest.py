"""Tests of batch and heads over a mesh of six devices.

`tests/package/test_several_devices.py` runs them in processes of their own: XLA's pool of threads
is as large as there are devices. By hand, with six devices:
`XLA_FLAGS=--xla_force_host_platform_device_count=6 python -m pytest tests/devices`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.devices import left_out

collect_ignore_glob = left_out(__file__)


@pytest.fixture
def arguments(random_operands):
    """Of attention, by name."""
    from tests.support.meshes import B, H, K, N, S, T

    q, k, v, d_out = random_operands(B, T, S, N, K, H)
    rng = np.random.default_rng(5)
    sorted_ids = lambda tokens: np.sort(rng.integers(0, 3, (B, tokens)), axis=1)  # noqa: E731
    return {
        "query": q, "key": k, "value": v, "d_out": d_out,
        "bias": jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32),
        "mask": jnp.asarray(rng.random((B, 1, T, S)) < 0.8),
        "sinks": jnp.asarray(rng.standard_normal(N), jnp.float32),
        "scale": jnp.asarray(rng.random(N), jnp.float32),
        "key_value_seq_lengths": jnp.asarray([21, 17, 5, 0], jnp.int32),
        "query_segment_ids": jnp.asarray(sorted_ids(T), jnp.int32),
        "key_value_segment_ids": jnp.asarray(sorted_ids(S), jnp.int32),
        "query_offset": jnp.asarray([12, 0, 3, 8], jnp.int32),
        "query_positions": jnp.asarray(rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)),
        "key_value_positions": jnp.asarray(rng.permuted(np.tile(np.arange(S), (B, 1)), axis=1)),
    }  # fmt: skip
