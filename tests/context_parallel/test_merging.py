"""Parts of the keys, put together."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_gluon._context_parallel.merging import merged
from jax_gluon._context_parallel.problem import Partial
from jax_gluon._problem import EMPTY_ROW_LOG_SUM_EXP

B, T, N, V = 2, 3, 2, 5


@pytest.mark.parametrize("unit", [1.0, np.log(2.0)])
@pytest.mark.parametrize("maximum", [-1e9, -3e4, 0.0, 3e4, 1e9])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_part_without_keys_changes_nothing(is_first, maximum, unit):
    """However far the other's logits are from 0, which is the maximum of an empty row."""
    rng = np.random.default_rng(5)
    rows = (B, T, N)
    part = Partial(
        jnp.asarray(rng.standard_normal((*rows, V)), jnp.float32),
        jnp.full(rows, maximum, jnp.float32),
        jnp.asarray(rng.uniform(0, 4, rows), jnp.float32),
    )
    nothing = Partial(
        jnp.zeros_like(part.out),
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, EMPTY_ROW_LOG_SUM_EXP, jnp.float32),
    )
    both = (nothing, part) if is_first else (part, nothing)
    found = merged(*both, jnp.float32(unit))
    np.testing.assert_array_equal(found.maximum, part.maximum)
    np.testing.assert_allclose(found.log_sum, part.log_sum, rtol=1e-5)
    np.testing.assert_allclose(found.out, part.out, rtol=1e-6)
