"""float32's rounding beside that of `jax.nn.dot_product_attention`."""

import jax
import numpy as np
import pytest

import jax_gluon

plugin = pytest.importorskip("jax_gluon._plugin")


# Of each shape, the results that are sums over its 4096 tokens.
@pytest.mark.parametrize(("T", "S", "long"), [(48, 4096, "out"), (4096, 48, "dk dv")])
@pytest.mark.parametrize("pipeline", ["baseline", "gluon"])
@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
def test_long_sums_round_no_more_than_those_of_jax_nn(
    use, oracle, relative_error, variant, pipeline, T, S, long
):
    implementation = use(variant)
    rng = np.random.default_rng(0)
    shapes = [(1, tokens, 1, 64) for tokens in (T, S, S, T)]
    *arrays, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    def ours(*x):
        return jax_gluon.dot_product_attention(*x, implementation=implementation, kernel=pipeline)

    def results(attention):
        out, pullback = jax.vjp(jax.jit(attention), *arrays)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pullback(d_out)), strict=True))

    out, _, dq, dk, dv, _ = oracle(*arrays, d_out=d_out)
    exact = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    found, theirs = results(ours), results(jax.nn.dot_product_attention)
    for name in long.split():
        bound = 1.3 * relative_error(theirs[name], exact[name])
        assert relative_error(found[name], exact[name]) <= bound, name
        bound = 1.3 * np.abs(theirs[name] - exact[name]).max()
        assert np.abs(found[name] - exact[name]).max() <= bound, name


@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
@pytest.mark.parametrize(("T", "S"), [(49, 49), (100, 100), (60, 197)])
def test_small_heads_round_no_more_than_those_of_jax_nn(use, oracle, relative_error, variant, T, S):
    implementation = use(variant)
    rng = np.random.default_rng(0)
    shapes = [(2, tokens, 2, 64) for tokens in (T, S, S, T)]
    *arrays, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    def ours(*x):
        return jax_gluon.dot_product_attention(*x, implementation=implementation)

    def results(attention):
        out, pullback = jax.vjp(jax.jit(attention), *arrays)
        return out, *pullback(d_out)

    out, _, *gradients, _ = oracle(*arrays, d_out=d_out)
    # Backward of more than 128 keys is a pipeline's.
    exact = (out, *gradients) if S <= 128 else (out,)
    # Without fused multiplications and additions every product is rounded as well.
    bound = 1.5 if variant == "portable" else 1.3
    for x, y, z in zip(results(ours), results(jax.nn.dot_product_attention), exact, strict=False):
        assert relative_error(x, z) <= bound * relative_error(y, z)
