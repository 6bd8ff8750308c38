"""The gluon pipeline of the CPU kernels against baseline: the same numbers, whatever else runs."""

import concurrent.futures
import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import CpuKernel
from jax_gluon._quantization.formats import PRESETS, AttentionQuantization, QuantSpec
from tests.support import cases

plugin = pytest.importorskip("jax_gluon._plugin")

pytestmark = pytest.mark.usefixtures("poison")
# Relative L2 between the pipelines. Where probabilities have 16 bits, or results are stored with
# 16, the pipelines may round the same number to neighbours.
BARS = {"float32": 1e-6, "bfloat16": 2e-3, "float16": 3e-4}
# Of codes where the softmax of one of them, or of backward, is the transposed one: its exponentials
# are good to 7.5e-5, and a probability near the middle of two codes may become either.
BARS_OF_TRANSPOSED_CODES = {"out": 1.2e-3, "lse": 1e-4, **dict.fromkeys(("dq", "dk", "dv"), 7e-4)}
EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10}

# Keys of the largest subtile of floats, of variants without the transposed kernels; the others have
# 256.
SUBTILES = {
    "portable": 128, "avx2": 128, "neon": 64, "neon_dotprod": 64, "neon_i8mm_bf16": 64,
}  # fmt: skip

CASES = cases.RULES | cases.WALKS
ROW = QuantSpec(granularity="row")
FORMATS = {
    **PRESETS,
    # Integer zero points and float minima, of queries, keys and values.
    "int8_zero_points": AttentionQuantization(
        *(QuantSpec(symmetric=False, granularity="row") for _ in range(3))
    ),
    "int8_minima": AttentionQuantization(
        ROW, *(QuantSpec(symmetric=False, float_minimum=True, granularity="head"),) * 2
    ),
    "int8_blocks": AttentionQuantization(
        QuantSpec(granularity="tensor"), QuantSpec(granularity="block", block_size=50), ROW
    ),
    # Scales that vary along a row: float32 products.
    "int8_groups": AttentionQuantization(*(QuantSpec(granularity="group", block_size=16),) * 3),
    "int8_channels": AttentionQuantization(
        ROW, QuantSpec(granularity="channel"), QuantSpec(granularity="channel_block")
    ),
    "int4_rows": AttentionQuantization(*(QuantSpec(bits=4, granularity="row"),) * 3),
    "values_only": AttentionQuantization(value=ROW),
}


PIPELINES = ("baseline", "gluon")


def _program(keywords):
    """Output, log-sum-exp and gradients by each pipeline, in one program."""

    def run(kernel, inputs, cotangents):
        def attention(*x):
            return jax_gluon.attention_with_log_sum_exp(
                *x, **keywords, implementation="cpu", kernel=kernel
            )

        results, pullback = jax.vjp(attention, *inputs)
        d_out, d_log_sum_exp = cotangents
        # The -inf of an empty row takes no cotangent.
        finite = jnp.where(jnp.isfinite(results[1]), d_log_sum_exp, 0)
        return *results, *pullback((d_out, finite))

    return jax.jit(lambda *x: [run(kernel, *x) for kernel in PIPELINES])


def _both(operands, **more):
    arrays, keywords, *cotangents = operands
    return _program(keywords | more)(arrays, cotangents)


@functools.lru_cache(maxsize=4)
def _shared_program(name, quantization, plans):
    """That of a case: compiled once for the variants that choose these kernels."""
    del plans
    arrays, keywords, *cotangents = cases.operands(CASES[name])
    program = _program(keywords | dict(quantization=quantization))
    return lambda: program(arrays, cotangents)


def _plans(operands, **more):
    arrays, keywords, *_ = operands
    for kernel in PIPELINES:
        plan = jax_gluon.explain(*arrays, **keywords, **more, implementation="cpu", kernel=kernel)
        yield plan.forward, plan.backward, plan.backward_bias


LABELS = ("out", "lse", "dq", "dk", "dv", "dbias")


def _has_transposed_codes(quantization, variant=None):
    return quantization is not None and "avx512" in (variant or plugin.cpu_isa())


def _assert_alike(baseline, gluon, dtype="float32", *, has_transposed_codes=False):
    for label, x, y in zip(LABELS, gluon, baseline, strict=False):
        # Exponentials of bfloat16 are good to 7.5e-5, relative to maxima of the pipeline's own.
        bar = BARS[dtype] if label != "lse" else 1e-4 if dtype == "bfloat16" else 2e-6
        if has_transposed_codes:
            bar = BARS_OF_TRANSPOSED_CODES.get(label, bar)
        if label == "lse":
            np.testing.assert_allclose(x, y, atol=bar, rtol=1e-6)
            continue
        actual, expected = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # Where one key is all there is, dS is zero and only rounding is left of it.
        size = max(np.linalg.norm(expected), 1e-6 * np.linalg.norm(np.asarray(baseline[0])))
        assert np.isfinite(actual).all()
        assert np.linalg.norm(actual - expected) <= bar * size, label
        if dtype in EPSILON and label != "dbias":
            row = np.abs(expected).max(-1, keepdims=True)
            assert (np.abs(actual - expected) <= EPSILON[dtype] * row).all(), label


def _variants():
    best, *others = plugin.cpu_isas_supported()
    for name in CASES:
        for variant in (best, *others):
            # The emulated variant is slow and shares every line but the intrinsics.
            if not variant.startswith("emulated") or name in ("odd", "causal", "everything"):
                yield pytest.param(variant, name, id=f"{variant}-{name}")


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(("variant", "name"), list(_variants()))
def test_pipelines_agree(monkeypatch, variant, name, quantization):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    plans = tuple(_plans(cases.operands(CASES[name]), quantization=quantization))
    jax_gluon.debug.kernels()
    baseline, gluon = jax.block_until_ready(_shared_program(name, quantization, plans)())
    assert {x["variant"] for x in jax_gluon.debug.kernels()} == {variant}
    transposed = _has_transposed_codes(quantization, variant)
    _assert_alike(baseline, gluon, has_transposed_codes=transposed)


# Sizes of forward's and backward's blocks, where M is the largest subtile of the instruction set:
# the smallest, odd multiples, more stages than blocks, and blocks beyond the keys.
SIZES = {
    "baseline_small": lambda M: (CpuKernel("baseline", 64), CpuKernel("baseline", 96)),
    "baseline_odd": lambda M: (CpuKernel("baseline", 192), CpuKernel("baseline", 96)),
    "gluon_small": lambda M: (CpuKernel("gluon", M, M // 2, 2), CpuKernel("gluon", 192, 96, 2)),
    "gluon_odd": lambda M: (
        CpuKernel("gluon", 5 * M // 2, M // 2, 3), CpuKernel("gluon", 288, 96, 3)
    ),
    "gluon_large": lambda M: (CpuKernel("gluon", 2 * M, M, 8), CpuKernel("gluon", 384, 192, 8)),
    "gluon_beyond": lambda M: (CpuKernel("gluon", 4096, M, 2), CpuKernel("gluon", 3840, 192, 2)),
}  # fmt: skip


def _sizes(name, variant, is_integer):
    """The pair of kernels. Codes have one subtile forward; transposed ones have blocks alone."""
    M = SUBTILES.get(variant, 256)
    forward, backward = SIZES[name](128 if is_integer else M)
    if not is_integer:
        return forward, backward
    forward = dataclasses.replace(forward, subtile=None)
    has_tiles = "amx" in variant
    if has_tiles or (variant not in SUBTILES and forward.name == "gluon"):
        block_k = -(-forward.block_k // 128) * 128
        forward = dataclasses.replace(forward, block_k=block_k, stages=None)
    if has_tiles or variant in ("avx512_bf16", "emulated_avx512"):
        block_k = min(256, backward.block_k // 32 * 32)
        backward = dataclasses.replace(backward, block_k=block_k, subtile=None, stages=None)
    return forward, backward


def _sized_cases():
    for variant in plugin.cpu_isas_supported():
        for name in SIZES:
            if not variant.startswith("emulated") or name == "gluon_small":
                yield pytest.param(variant, name, id=f"{variant}-{name}")


def _run_sized(kernel, is_causal, quantization):
    """The log-sum-exp has no cotangent.

    With one and centered keys (INT8), the softmax of gluon's backward would not take register
    tiles.
    """
    case = dict(B=1, T=205, S=1100, N=2, K=1, H=40, V=24, is_causal=is_causal)
    operands, keywords, d_out, _ = cases.operands(case)

    def attention(*x):
        return jax_gluon.dot_product_attention(
            *x, **keywords, quantization=quantization, implementation="cpu", kernel=kernel,
            return_residual=True,
        )  # fmt: skip

    @jax.jit
    def results(*x):
        out, pullback, log_sum_exp = jax.vjp(attention, *x, has_aux=True)
        return out, log_sum_exp, *pullback(d_out)

    return jax.block_until_ready(results(*operands))


@functools.lru_cache(maxsize=4)
def _baseline(variant, is_causal, quantization):
    """With the sizes that it prefers: of the variant that the environment names."""
    assert plugin.cpu_isa() == variant
    return _run_sized("baseline", is_causal, quantization)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("variant", "name"), list(_sized_cases()))
def test_sizes_agree(monkeypatch, variant, name, is_causal, quantization):
    """Blocks of any size give the same numbers."""
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    kernels = _sizes(name, variant, quantization is not None)
    sized = _run_sized(kernels, is_causal, quantization)
    baseline = _baseline(variant, is_causal, quantization)
    transposed = _has_transposed_codes(quantization, variant)
    _assert_alike(baseline, sized, has_transposed_codes=transposed)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_register_tiles_match_float64(relative_error, oracle, fake_quantize, quantization):
    case = dict(B=1, T=205, S=300, N=2, K=1, H=16, V=16)
    operands, keywords, d_out, _ = cases.operands(case)

    def attention(*x):
        return jax_gluon.dot_product_attention(
            *x, **keywords, quantization=quantization, implementation="cpu", kernel="gluon"
        )

    gradients = jax.vjp(attention, *operands)[1](d_out)
    point = operands
    if quantization:
        point = [
            fake_quantize(x, center=center)
            for x, center in zip(operands, (False, True, False), strict=True)
        ]
    exact = oracle(*point, **keywords, d_out=d_out)
    for x, y in zip(gradients, exact[2:5], strict=True):
        assert relative_error(x, y) <= (1e-2 if quantization else 3e-6)


@pytest.mark.parametrize("name", ["blocks", "odd", "everything", "causal"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_pipelines_agree_in_every_format(format_name, name):
    quantization = FORMATS[format_name]
    baseline, gluon = _both(cases.operands(CASES[name]), quantization=quantization)
    transposed = _has_transposed_codes(quantization)
    _assert_alike(baseline, gluon, has_transposed_codes=transposed)


def _variants_in_16_bits():
    for variant in plugin.cpu_isas_supported():
        # The emulated variant multiplies bfloat16 as such, most others float32.
        short = variant.startswith("emulated")
        for name in ("odd", "causal") if short else ("blocks", "odd", "everything", "causal"):
            yield pytest.param(variant, name, id=f"{variant}-{name}")


@pytest.mark.parametrize(("variant", "name"), list(_variants_in_16_bits()))
@pytest.mark.parametrize("dtype", EPSILON)
def test_pipelines_agree_in_16_bits(monkeypatch, dtype, variant, name):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    baseline, gluon = _both(cases.operands(CASES[name], dtype))
    _assert_alike(baseline, gluon, dtype)


@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_gluon_matches_float64(
    monkeypatch, relative_error, oracle, fake_quantize, variant, quantization
):
    """The bars of the design, which baseline's own tests have too."""
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    case = dict(B=1, T=110, S=300, N=2, K=1, H=16, V=16, is_causal=True)
    operands = cases.operands(case)
    point, keywords, d_out, d_log_sum_exp = operands
    _, gluon = _both(operands, quantization=quantization)
    if quantization:
        point = [
            fake_quantize(x, center=center)
            for x, center in zip(point, (False, True, False), strict=True)
        ]
    exact = oracle(*point, **keywords, d_out=d_out, d_log_sum_exp=d_log_sum_exp)
    forward, backward = (8e-3, 1e-2) if quantization else (2e-6, 3e-6)
    np.testing.assert_allclose(gluon[1], exact.log_sum_exp, atol=2e-4 if quantization else 2e-5)
    assert relative_error(gluon[0], exact.out) <= forward
    for x, y in zip(gluon[2:], exact[2:5], strict=True):
        assert relative_error(x, y) <= backward


@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("least", [-1e9, -1e30])
def test_rows_whose_logits_are_all_large_and_negative(monkeypatch, variant, least, quantization):
    """A mask of finite numbers: such rows are uniform over what they see."""
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    bias = np.zeros((1, 1, 70, 200), np.float32)
    bias[:, :, 20:50] = least
    bias[:, :, :, :90] = least
    case = dict(T=70, S=200, N=2, K=1, H=16, V=16, bias=bias)
    baseline, gluon = _both(cases.operands(case), quantization=quantization)
    transposed = _has_transposed_codes(quantization, variant)
    _assert_alike(baseline, gluon, has_transposed_codes=transposed)


@pytest.mark.parametrize("variant", plugin.cpu_isas_supported())
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_reaches_exactly_the_rows_that_see_it(
    monkeypatch, variant, quantization, bad
):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", variant)
    operands, keywords, *_ = cases.operands(dict(T=290, S=290, is_causal=True))
    query, key, value = operands
    value = value.at[0, 150, 1, 3].set(bad)
    out = jax_gluon.dot_product_attention(
        query, key, value, **keywords, quantization=quantization, implementation="cpu",
        kernel="gluon",
    )  # fmt: skip
    expected = np.zeros(out.shape, bool)
    # kv head 1 serves query heads 2 and 3; an INT8 row has one scale, so all of it is lost.
    expected[0, 150:, 2:, slice(3, 4) if quantization is None else slice(None)] = True
    np.testing.assert_array_equal(~np.isfinite(out), expected)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_what_is_hidden_never_leaks(quantization):
    """NaN and infinities in hidden keys and values change no bit of outputs and gradients."""
    operands, keywords, d_out, _ = cases.operands(dict(T=140, S=350, is_causal=True))
    lengths = np.array([130, 20], np.int32)

    def run(key, value):
        def attention(*x):
            return jax_gluon.dot_product_attention(
                *x, **keywords, key_value_seq_lengths=lengths, quantization=quantization,
                implementation="cpu", kernel="gluon",
            )  # fmt: skip

        out, pullback = jax.vjp(attention, operands[0], key, value)
        return out, *pullback(d_out)

    _, key, value = operands
    key, value = key.at[:, 130:].set(0), value.at[:, 130:].set(0)
    plain = run(key, value)
    for bad in (np.nan, np.inf, -np.inf):
        hidden = run(key.at[:, 130:].set(bad), value.at[:, 130:].set(bad))
        for x, y in zip(hidden, plain, strict=True):
            assert np.isfinite(y).all()
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_toggling_changes_nothing_else(quantization):
    """Threads that use one pipeline each, at once, get the bits that a call alone gets."""
    case = dict(T=150, S=600, H=32, V=32)
    operands, keywords, d_out, _ = cases.operands(case)
    compiled = {}
    for kernel in ("baseline", "gluon"):

        def attention(*x, kernel=kernel):
            return jax_gluon.dot_product_attention(
                *x, **keywords, quantization=quantization, implementation="cpu", kernel=kernel
            )

        def function(x, d_out, attention=attention):
            out, pullback = jax.vjp(attention, *x)
            return out, *pullback(d_out)

        compiled[kernel] = jax.jit(function).lower(operands, d_out).compile()
    alone = {kernel: run(operands, d_out) for kernel, run in compiled.items()}
    # The pipelines sum in another order: this test compares what differs.
    assert (np.asarray(alone["baseline"][0]) != np.asarray(alone["gluon"][0])).any()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kernels = ["baseline", "gluon"] * 40
        runs = [pool.submit(compiled[kernel], operands, d_out) for kernel in kernels]
        for kernel, run in zip(kernels, runs, strict=True):
            for x, y in zip(run.result(), alone[kernel], strict=True):
                np.testing.assert_array_equal(x, y)


PEAK = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import jax_gluon

kernel, S = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
query = jnp.asarray(rng.standard_normal((1, 96, 2, 64), np.float32))
key, value = (jnp.asarray(rng.standard_normal((1, S, 2, 64), np.float32)) for _ in range(2))
attention = jax.jit(lambda q, k, v: jax_gluon.dot_product_attention(
    q, k, v, implementation="cpu", kernel=kernel))
small = [x[:, :96] for x in (query, key, value)]
jax.block_until_ready(attention(*small))  # what a first call loads
compiled = attention.lower(query, key, value).compile()

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # resets VmHWM
before = status("VmRSS:")
jax.block_until_ready(compiled(query, key, value))
print(json.dumps(status("VmHWM:") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_scratch_does_not_grow_with_the_keys():
    """Baseline packs all keys and values; the ring holds two blocks of them."""
    S = 1 << 16

    def growth(kernel):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, kernel, str(S)], capture_output=True, text=True, check=True
        )
        return json.loads(run.stdout)

    operands = 2 * S * 2 * 64 * 4
    assert growth("baseline") > operands / 2
    assert growth("gluon") < operands / 8
