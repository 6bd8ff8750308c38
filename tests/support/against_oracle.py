"""Output and all gradients of a call, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from tests.support.arrays import placed


def check(keywords, implementation, operands, oracle, relative_error):
    """`operands` are query, key, value and the cotangent of the output; arrays are traced.

    Keys and values that `key_value_mask` hides hold NaN.
    """
    q, k, v, d_out = operands
    bias = keywords.get("bias")
    seen = np.broadcast_to(keywords.get("key_value_mask", True), k.shape[:2])[..., None, None]
    expected = oracle(q, np.where(seen, k, 0), np.where(seen, v, 0), **keywords, d_out=d_out)
    k, v = (placed(np.where(seen, x, np.nan), x.dtype) for x in (k, v))
    arrays = {n: placed(x) for n, x in keywords.items() if isinstance(x, np.ndarray)}
    static = {n: x for n, x in keywords.items() if n not in arrays}
    arrays = arrays | {n: x.astype(jnp.int32) for n, x in arrays.items() if x.dtype == jnp.int64}
    arrays.pop("bias", None)

    @jax.jit
    def results(arrays, d_out, *operands):
        def attention(q, k, v, bias):
            return jax_gluon.dot_product_attention(
                q, k, v, bias, implementation=implementation, **static, **arrays
            )

        out, pullback = jax.vjp(attention, *operands)
        return out, *pullback(d_out)

    out, *gradients = results(arrays, d_out, q, k, v, bias)
    assert relative_error(out, expected.out) <= 2e-6
    for gradient, exact in zip(gradients, expected[2:6], strict=True):
        if exact is not None:
            assert relative_error(gradient, exact) <= 3e-6
    if implementation == "cpu":
        reference = jax_gluon.reference.dot_product_attention(q, k, v, bias, **static, **arrays)
        assert relative_error(reference, expected.out) <= 2e-6
