"""Backward over parts of the keys, whose sums are the gradients of all of them."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gluon import AttentionQuantization, QuantSpec, _lowering
from jax_gluon._errors import Checker
from jax_gluon._plan.choice import kernels_of
from jax_gluon._problem import AttentionOperands, AttentionProblem, Residuals
from tests.support import oracle

plugin = pytest.importorskip("jax_gluon._plugin")

pytestmark = pytest.mark.usefixtures("poison")

B, N, K, H, V = 2, 4, 2, 16, 24
CENTERED = AttentionQuantization(QuantSpec(), QuantSpec(center=True), QuantSpec(center=True))
# Rows, and keys of each part; the kernel of backward. Parts of more keys than a tile has, or few.
CASES = {
    "float32": ((37, (230, 300)), "float32", "baseline", 3e-6),
    "pipelined": ((37, (230, 300)), "float32", "gluon", 3e-6),
    "small": ((9, (13, 21)), "float32", "small", 3e-6),
    "one_key": ((9, (1, 1)), "float32", "small", 3e-6),
    "bfloat16": ((70, (64, 150)), "bfloat16", "baseline", 6e-3),
    "int8": ((70, (64, 150)), "int8", "baseline", 1e-2),
}  # fmt: skip


@pytest.mark.parametrize("variant", [*plugin.cpu_isas_supported(), "xla"])
@pytest.mark.parametrize("name", CASES)
def test_parts_add_up(name, variant, use):
    (T, parts), format_, kernel, bar = CASES[name]
    if variant.startswith("emulated") and name not in ("bfloat16", "int8"):
        pytest.skip("the variant has no kernels of its own for these")
    implementation = use(variant)
    rng = np.random.default_rng(3)
    dtype = jnp.bfloat16 if format_ == "bfloat16" else jnp.float32
    S = sum(parts)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V))
    )
    k, v = k + 3, v - 2  # whose centers matter
    sinks = jnp.asarray(rng.standard_normal((1, N)), jnp.float32)
    d_lse = jnp.asarray(rng.standard_normal((B, T, N)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32)
    problem = AttentionProblem(0.3, soft_cap=5.0, implementation=implementation)
    specs = CENTERED if format_ == "int8" else AttentionQuantization()
    starts = np.cumsum([0, *parts])

    def codes(x, spec):
        return x if spec is None else _lowering.quantize(spec, implementation, x, None)

    blocks = [
        (codes(k[:, a:b], specs.key), codes(v[:, a:b], specs.value), bias[..., a:b])
        for a, b in itertools.pairwise(starts)
    ]
    query = codes(q, specs.query)
    floats = [np.asarray(x, np.float64) for x in (query, *(
        np.concatenate([np.asarray(x[i], np.float64) for x in blocks], 1) for i in (0, 1)
    ))]  # fmt: skip
    exact = oracle.attention(
        *floats, np.asarray(bias), d_out=d_out, d_log_sum_exp=d_lse, scale=0.3,
        logits_soft_cap=5.0, sinks=sinks[0],
    )  # fmt: skip
    # The log-sum-exp in one number, in the base of the implementation.
    unit = 1.0 if implementation == "xla" else np.log(2.0)
    log_sum_exp = jnp.asarray(exact.log_sum_exp / unit, jnp.float32)
    out = jnp.asarray(exact.out, jnp.float32)
    mean = np.sum(exact.out * np.asarray(d_out, np.float64), -1)
    problem = replace(problem, is_partial=True)
    found = []
    for key, value, columns in blocks:
        operands = AttentionOperands(query, key, value, columns)
        if implementation == "cpu":
            wish = (None, kernel) if kernel != "small" else None
            kernels = kernels_of(Checker("test"), problem, operands, wish)
            if variant.startswith(("avx", "portable")):
                assert kernels.backward.cpu.name == kernel
            problem = replace(problem, kernels=kernels)
        residuals = Residuals(operands, out, jnp.zeros_like(log_sum_exp), log_sum_exp)
        given = residuals, d_out, d_lse - jnp.asarray(mean, jnp.float32)
        found.append(
            (*_lowering.backward(problem, *given), _lowering.backward_bias(problem, *given))
        )
    d_query, d_key, d_value, d_bias = zip(*found, strict=True)
    assert d_query[0].dtype == jnp.float32
    results = dict(
        d_query=sum(map(np.asarray, d_query)), d_key=np.concatenate(d_key, 1),
        d_value=np.concatenate(d_value, 1), d_bias=np.concatenate(d_bias, 3),
    )  # fmt: skip
    for field, x in results.items():
        y = getattr(exact, field)
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
        assert error <= bar, (field, error)


def test_metal_refuses_parts(require):
    require("metal")
    x = jnp.ones((1, 8, 2, 16))
    row = jnp.zeros((1, 8, 2))
    problem = AttentionProblem(0.3, implementation="metal", is_partial=True)
    residuals = Residuals(AttentionOperands(x, x, x), x, row, row)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no backward pass over a part"):
        jax.block_until_ready(_lowering.backward(problem, residuals, x, row))
