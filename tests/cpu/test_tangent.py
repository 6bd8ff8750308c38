"""Forward mode in the plugin: every variant, Metal's too, along random tangents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import _ffi
from jax_gluon._arguments import check_arguments
from jax_gluon._errors import Checker
from jax_gluon._operands import quantize_operands
from jax_gluon._problem import AttentionOperands
from jax_gluon._quantization.formats import AttentionQuantization, QuantizedTensor, QuantSpec
from tests.support import cases, quantizer
from tests.support.arrays import placed
from tests.support.oracle import tangent as oracle

plugin = pytest.importorskip("jax_gluon._plugin")

pytestmark = pytest.mark.usefixtures("poison")

RNG = np.random.default_rng(11)
# Forward mode has no kernels for AMX.
VARIANTS = [*(isa for isa in plugin.cpu_isas_supported() if "amx" not in isa), "metal"]
OPERANDS = ("query", "key", "value", "bias", "sinks")
# Of the output and of its tangent, relative L2.
BARS = {"float32": (2e-6, 5e-6), "bfloat16": (7e-3, 1e-2), "float16": (8e-4, 1.2e-3)}
# Blocks of 96 rows and of 128 keys, and the tails of both.
CASES = {
    "everything": dict(
        T=150, S=370, is_causal=True, local_window_size=(120, 9), logits_soft_cap=4.0, scale=-0.4,
        bias=cases._bias(2, 1, 150, 370), mask=cases._mask(2, 4, 150, 370),
        key_value_seq_lengths=np.array([360, 100], np.int32),
        sinks=RNG.standard_normal(4).astype(np.float32),
    ),
    "sinks": dict(
        T=110, S=290, query_seq_lengths=np.array([0, 105], np.int32), V=33,
        sinks=np.array([1.5, -9.0, 6.0, -np.inf], np.float32),
    ),
    # More than is packed at a time, where threads are few.
    "packed_in_parts": dict(B=1, T=4, S=2500, N=6, K=6, H=40, V=60),
} | {
    name: cases.CASES[name]
    for name in ("blocks", "odd", "causal", "scattered", "packed", "head_dim_1", "one", "no_keys",
                 "bias_rows", "multi_query")
}  # fmt: skip


def draw_tangents(problem_operands, dtype):
    """Of each operand that has one, by name: random, of its shape."""
    rng, tangents = np.random.default_rng(7), {}
    for name in OPERANDS:
        x = getattr(problem_operands, name)
        if x is not None:
            kind = dtype if name in OPERANDS[:3] else x.dtype
            tangents[name] = placed(rng.standard_normal(x.shape), kind)
    return tangents


@functools.lru_cache(maxsize=8)
def _program(problem, dtype):
    """Compiled once for the variants that run it one after another."""
    return jax.jit(functools.partial(_ffi.tangent, problem, np.dtype(dtype)))


def differentiate(problem, dtype, operands, tangents):
    """The call's results, and those that the oracle has."""
    given = AttentionOperands(
        **{name: tangents.get(name) for name in OPERANDS[:3]},
        bias=tangents.get("bias"),
        sinks=tangents.get("sinks"),
    )
    results = _program(problem, dtype)(operands, given)
    log_sum_exp, residuals, tangent_out, tangent_log_sum_exp = results
    return residuals.out, log_sum_exp, tangent_out, tangent_log_sum_exp


def assert_close(found, exact, bars, relative_error, log_sum_exp_error=2e-5):
    assert relative_error(found[0], exact.out) <= bars[0]
    finite = np.isfinite(exact.log_sum_exp)
    np.testing.assert_allclose(
        np.asarray(found[1])[finite], exact.log_sum_exp[finite], atol=log_sum_exp_error, rtol=2e-6
    )
    for x, y in zip(found[2:], exact[2:], strict=True):
        size = max(np.linalg.norm(y), 1e-3 * np.sqrt(y.size))
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= bars[1] * size


def of_oracle(tangents):
    """Tangents as the oracle takes them: sinks are [N]."""
    return {name: x[0] if name == "sinks" else x for name, x in tangents.items()}


@functools.lru_cache(maxsize=2)
def _operands_and_exact(dtype, name):
    """Of the variants that follow one another."""
    arrays, keywords, *_ = cases.operands(CASES[name], dtype)
    checked = _checked(arrays, keywords, "xla")
    tangents = draw_tangents(checked.operands, dtype)
    exact = oracle(*arrays, **keywords, tangents=of_oracle(tangents))
    return arrays, keywords, tangents, exact


def _checked(arrays, keywords, implementation):
    mask = keywords.get("mask")
    others = {x: y for x, y in keywords.items() if x != "mask"}
    bias = arrays[3] if len(arrays) > 3 else None
    return check_arguments(
        Checker("test"), *arrays[:3], bias, mask, **others, implementation=implementation
    )


# On Metal each type of operands is a pipeline.
@pytest.mark.parametrize(
    ("variant", "dtype", "name"),
    [
        *(
            (variant, "float32", name)
            for name in CASES
            for variant in VARIANTS
            if variant != "metal" or name != "packed_in_parts"
        ),
        *((variant, "bfloat16", "everything") for variant in VARIANTS),
        *((variant, "float16", "odd") for variant in VARIANTS if variant != "metal"),
    ],
)
def test_tangents_match_float64(use, relative_error, variant, dtype, name):
    implementation = use(variant)
    arrays, keywords, tangents, exact = _operands_and_exact(dtype, name)
    checked = _checked(arrays, keywords, implementation)
    jax_gluon.debug.kernels()
    found = differentiate(checked.problem, dtype, checked.operands, tangents)
    found = jax.block_until_ready(found)
    assert variant == "metal" or jax_gluon.debug.kernels()[-1]["variant"] == variant
    assert_close(found, exact, BARS[dtype], relative_error)


ROTATED = AttentionQuantization(*3 * [QuantSpec(rotate=True)])
CAUSAL = dict(T=100, S=150, N=2, K=1, H=16, V=20, is_causal=True, query_offset=40)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("moved", [*((name,) for name in OPERANDS), ("query", "value")])
def test_absent_tangents_are_zero(use, relative_error, variant, moved):
    implementation = use(variant)
    sinks, bias = np.array([0.5, 2.0], np.float32), cases._bias(2, 2, 100, 150)
    arrays, keywords, *_ = cases.operands(CAUSAL | dict(sinks=sinks, bias=bias))
    checked = check_arguments(
        Checker("test"), *arrays, None, **keywords, implementation=implementation
    )
    tangents = draw_tangents(checked.operands, "float32")
    tangents = {name: tangents[name] for name in moved}
    found = differentiate(checked.problem, "float32", checked.operands, tangents)
    exact = oracle(*arrays, **keywords, tangents=of_oracle(tangents))
    assert_close(found, exact, BARS["float32"], relative_error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tangents_of_dropout(use, relative_error, variant):
    implementation = use(variant)
    arrays, keywords, *_ = cases.operands(CAUSAL)
    key, rate = jax.random.key(5), 0.3
    checked = check_arguments(
        Checker("test"), *arrays, None, None, **keywords, dropout_rng=key, dropout_rate=rate,
        implementation=implementation,
    )  # fmt: skip
    kept = jax_gluon.dropout_mask(key, (2, 2, 100, 150), rate)
    tangents = draw_tangents(checked.operands, "float32")
    found = differentiate(checked.problem, "float32", checked.operands, tangents)
    exact = oracle(*arrays, **keywords, kept=kept, dropout_rate=rate, tangents=tangents)
    assert_close(found, exact, BARS["float32"], relative_error)


@pytest.mark.parametrize(
    ("variant", "quantization"),
    [
        *((variant, "int4") for variant in VARIANTS),
        *((v, x) for v in VARIANTS if v != "metal" for x in ("int8", ROTATED)),
    ],
)
def test_tangents_at_what_codes_stand_for(use, relative_error, variant, quantization):
    implementation = use(variant)
    arrays, keywords, *_ = cases.operands(CAUSAL | dict(logits_soft_cap=3.0))
    checked = check_arguments(
        Checker("test"), *arrays, None, None, **keywords, quantization=quantization,
        implementation=implementation,
    )  # fmt: skip
    make = functools.partial(_ffi.quantize, implementation)
    operands = quantize_operands(checked.problem, checked.operands, make)
    point = [quantizer.values(x) if isinstance(x, QuantizedTensor) else x for x in operands[:3]]
    tangents = draw_tangents(checked.operands, "float32")
    found = differentiate(checked.problem, "float32", operands, tangents)
    exact = oracle(*point, **keywords, tangents=tangents)
    assert_close(found, exact, (1e-5, 1e-5), relative_error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_leaks_from_hidden_keys_and_values_reach_who_sees_them(use, variant):
    """NaN in hidden keys and tangents changes no bit; in a visible value, its column alone."""
    implementation = use(variant)
    arrays, keywords, *_ = cases.operands(CAUSAL | dict(query_offset=0))
    mask = np.ones((1, 1, 100, 150), bool)
    mask[..., 17] = False
    checked = check_arguments(
        Checker("test"), *arrays, None, mask, **keywords, implementation=implementation
    )
    tangents = draw_tangents(checked.operands, "float32")

    def run(spoil_operands, spoil_tangents):
        operands = checked.operands._replace(
            key=spoil_operands(checked.operands.key), value=spoil_operands(checked.operands.value)
        )
        spoilt = tangents | {name: spoil_tangents(tangents[name]) for name in ("key", "value")}
        return differentiate(checked.problem, "float32", operands, spoilt)

    def hidden(bad):
        return lambda x: x.at[:, 17].set(bad).at[:, 100:].set(bad)

    for bad in (np.nan, np.inf, np.finfo(np.float32).max):
        for x, y in zip(run(hidden(bad), hidden(bad)), run(hidden(0.0), hidden(0.0)), strict=True):
            np.testing.assert_array_equal(x, y)
    # Key 50, which the rows from 50 on see.
    operands = checked.operands._replace(value=checked.operands.value.at[:, 50, :, 3].set(np.inf))
    found = differentiate(checked.problem, "float32", operands, tangents)
    plain = differentiate(checked.problem, "float32", checked.operands, tangents)
    for x, y in ((found[0], plain[0]), (found[2], plain[2])):
        assert not np.isfinite(np.asarray(x)[:, 50:, :, 3]).any()
        x, y = np.array(x), np.array(y)
        x[:, 50:, :, 3] = y[:, 50:, :, 3] = 0.0
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_mapped_axes_and_what_ran(use, relative_error):
    """`vmap` over what has tangents alone, and over operands."""
    implementation = use(VARIANTS[0])
    arrays, keywords, *_ = cases.operands(CAUSAL)
    checked = check_arguments(
        Checker("test"), *arrays, None, None, **keywords, implementation=implementation
    )
    queries = RNG.standard_normal((3, *arrays[0].shape)).astype(np.float32)
    moved = RNG.standard_normal((3, *arrays[1].shape)).astype(np.float32)

    def call(query, key_tangent):
        operands = checked.operands._replace(query=query)
        return differentiate(checked.problem, "float32", operands, {"key": key_tangent})

    jax_gluon.debug.kernels()
    found = jax.block_until_ready(jax.vmap(call)(queries, moved))
    runs = jax_gluon.debug.kernels()
    assert [(x["pass"], x["kernel"], x["arithmetic"]) for x in runs] == [
        ("tangent", "baseline", "float32")
    ]
    for m in range(3):
        exact = oracle(queries[m], *arrays[1:], **keywords, tangents={"key": moved[m]})
        assert_close([x[m] for x in found], exact, BARS["float32"], relative_error)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_axes(B, T, S):
    x, y = jnp.ones((B, T, 2, 8)), jnp.ones((B, S, 2, 8))
    checked = check_arguments(
        Checker("test"), x, y, y, None, None, implementation="cpu", sinks=np.ones(2, np.float32)
    )
    moved = {"query": x, "key": y, "value": y, "sinks": jnp.full((1, 2), 3.0)}
    out, _, tangent_out, tangent_log_sum_exp = differentiate(
        checked.problem, "float32", checked.operands, moved
    )
    assert out.shape == tangent_out.shape == (B, T, 2, 8)
    assert not out.any()
    assert not tangent_out.any()
    assert (tangent_log_sum_exp == 3.0).all()
