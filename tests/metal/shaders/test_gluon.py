"""The gluon pipelines against the baseline: results, counted work, and races."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_gluon._quantization.formats import QuantSpec
from tests.support.metal.encoder import SHADERS, Problem, backward, forward
from tests.support.metal.problems import DTYPES, QUANTIZED, draw, expected, feature

ROOT = Path(__file__).resolve().parents[3]

COUNT = dict(instrumentation="counters")
# What gluon may differ from the baseline by: relative L2, and of the output's elements one unit in
# the last place of the row's largest.
PARITY = {"float32": 1e-6, "float16": 3e-4, "bfloat16": 2e-3}
ORACLE = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 3.4e-3}
DIGITS = {"float32": 23, "float16": 10, "bfloat16": 7}


def check_parity(oracle, relative_error, problem, dtype, bound):
    baseline, gluon = (forward(problem, pipeline=x) for x in ("baseline", "gluon"))
    assert relative_error(gluon.out, expected(oracle, problem).out) <= bound
    assert relative_error(gluon.out, baseline.out) <= PARITY[dtype]
    wanted, found = (x.out.astype(np.float64) for x in (baseline, gluon))
    largest = np.abs(wanted).max(-1, keepdims=True, initial=0.0)
    unit = 2.0 ** (np.floor(np.log2(np.maximum(largest, 1e-30))) - DIGITS[dtype])
    if not problem.is_quantized():
        assert (np.abs(found - wanted) <= unit).all()
    sums = (x.row_maximum + x.log2_sum.astype(np.float64) for x in (gluon, baseline))
    np.testing.assert_allclose(*sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["causal", "window", "lengths", "bias", "soft_cap", "offset_causal", "everything"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules(oracle, relative_error, dtype, name):
    shape = dict(T=67, S=301)
    q, k, v, _ = draw(dtype, **shape)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], **feature(name, **shape))
    check_parity(oracle, relative_error, problem, dtype, ORACLE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "V"), [(72, 128), (130, 256)])
def test_head_dim(oracle, relative_error, dtype, H, V):
    q, k, v, _ = draw(dtype, H=H, V=V, T=41, S=150)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=True)
    check_parity(oracle, relative_error, problem, dtype, ORACLE[dtype])


@pytest.mark.parametrize("name", ["plain", "mask", "window"])
@pytest.mark.parametrize(
    "kind", ["int8", "int8_zero_point", "int8_channel", "int4", "int4_row", "float_query"]
)
def test_format(oracle, relative_error, kind, name):
    specs, _, bound = QUANTIZED[kind]
    q, k, v, _ = draw("float32", specs, S=150)
    problem = Problem(q, k, v, **feature(name, S=150))
    check_parity(oracle, relative_error, problem, "float32", bound)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_finite(dtype):
    """Visible numbers reach the rows that see them, in either pipeline alike; no others."""
    q, k, v, _ = draw(dtype, S=150)
    k[0, 40], v[0, 70, :, 3], v[1, 100, 0, 5] = np.nan, np.inf, np.nan
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=True, window=(9, 0))
    baseline, gluon = (forward(problem, pipeline=x).out for x in ("baseline", "gluon"))
    assert np.isnan(gluon).any()
    assert np.isfinite(gluon).any()
    np.testing.assert_array_equal(np.isfinite(gluon), np.isfinite(baseline))
    np.testing.assert_allclose(gluon, baseline, rtol=1e-3, atol=1e-3)


def check_backward(problem, d_out, *, found=None):
    """Both pipelines add the same numbers in the same order: their bits are the same."""
    found = found or forward(problem)
    d_lse = np.random.default_rng(5).standard_normal((problem.B, problem.T, problem.N))
    results = [
        backward(problem, found, d_out, d_lse.astype(np.float32), pipeline=x)
        for x in ("baseline", "gluon")
    ]
    for name in ("d_query", "d_key", "d_value"):
        baseline, gluon = (getattr(x, name) for x in results)
        np.testing.assert_array_equal(gluon, baseline, err_msg=name)
    return results[1]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("float32", "everything"), ("float32", "window"), ("float32", "plain"),
        ("float16", "lengths"), ("float16", "mask"), ("float16", "causal"),
        ("bfloat16", "soft_cap"), ("bfloat16", "bias"),
    ],
)  # fmt: skip
def test_backward_rules(oracle, relative_error, dtype, name):
    q, k, v, d_out = draw(dtype, T=67, S=101)
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], **feature(name, T=67, S=101))
    result = check_backward(problem, d_out)
    for x in (result.d_query, result.d_key, result.d_value):
        assert np.isfinite(x.astype(np.float32)).all()
    if name != "plain":
        return
    plain = backward(problem, forward(problem), d_out, pipeline="gluon")
    wanted = expected(oracle, problem, d_out=np.asarray(d_out, np.float64))
    for each in ("d_query", "d_key", "d_value"):
        assert relative_error(getattr(plain, each), getattr(wanted, each)) <= 3e-6, each


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("H", "V"), [(72, 128), (130, 256)])
def test_backward_head_dim(dtype, H, V):
    q, k, v, d_out = draw(dtype, H=H, V=V, T=41, S=50)
    check_backward(Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=True), d_out)


@pytest.mark.parametrize("kind", ["int8", "int8_zero_point", "int4", "int4_row", "float_query"])
def test_backward_format(kind):
    q, k, v, d_out = draw("float32", QUANTIZED[kind][0])
    check_backward(Problem(q, k, v, **feature("soft_cap")), d_out)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_backward_of_what_is_not_finite(dtype):
    q, k, v, d_out = draw(dtype, T=67, S=101)
    k[0, 40], v[0, 70, :, 3], q[1, 20], d_out[1, 50, 0, 5] = np.nan, np.inf, np.nan, np.inf
    problem = Problem(q, k, v, out_dtype=DTYPES[dtype], is_causal=True, window=(9, 0))
    gluon = check_backward(problem, d_out)
    for x in (gluon.d_query, gluon.d_key, gluon.d_value):
        assert np.isnan(x).any()
        assert np.isfinite(x).any()


#: What shaders/block_sizes.h says: bytes of the rings of dQ and of dK and dV, and barriers.
BACKWARD_RINGS = {
    ("float16", 64): (19212, 20488, 2),
    ("float16", 128): (17932, 18696, 4),
    ("float16", 256): (17292, 17800, 8),
    ("float32", 64): (20100, 18696, 4),
    ("float32", 128): (21508, 17800, 8),
    ("float32", 256): (25156, 17096, 16),
}


@pytest.mark.parametrize(("dtype", "H"), BACKWARD_RINGS)
def test_work_of_backward(dtype, H):
    """No more products, device bytes and barriers than the baseline's; one head after another."""
    *rings, barriers = BACKWARD_RINGS[dtype, H]
    table = (SHADERS / "block_sizes.h").read_text(encoding="utf-8")
    assert re.search(rf"{rings[0]:,} +\| {rings[1]:,} +\| {barriers} ", table)
    q, k, v, d_out = draw(dtype, B=1, N=2, K=1, T=128, S=128, H=H, V=H)

    few_rows = Problem(q[:, :32], k, v, out_dtype=DTYPES[dtype])
    few_keys = Problem(q, k[:, :32], v[:, :32], out_dtype=DTYPES[dtype])
    # Threadgroups of dQ: two, of 128 keys each; of dK and dV: one, of 256 rows.
    for kernel, problem, gradient, ring, granules in (
        ("query", few_rows, d_out[:, :32], rings[0], 2 * 2),
        ("key_value", few_keys, d_out, rings[1], 4),
    ):
        found = forward(problem)
        baseline, gluon = (
            getattr(
                backward(problem, found, gradient, pipeline=x, instrumented=(kernel,), **COUNT),
                f"{kernel}_counters",
            )
            for x in ("baseline", "gluon")
        )
        assert gluon.threadgroup_memory_peak == ring
        assert gluon.multiply_accumulates == baseline.multiply_accumulates
        assert gluon.device_bytes_read <= baseline.device_bytes_read
        assert gluon.device_bytes_written == baseline.device_bytes_written
        assert gluon.threadgroup_barriers <= baseline.threadgroup_barriers
        most = granules * barriers
        assert most - 2 <= gluon.threadgroup_barriers <= most


#: What shaders/block_sizes.h says: bytes of the ring, and barriers of 64 keys.
RING = {
    ("float16", 64): (23948, 2),
    ("float16", 128): (22348, 4),
    ("float16", 256): (17292, 8),
    ("float32", 64): (25060, 4),
    ("float32", 128): (21508, 8),
    ("float32", 256): (25156, 16),
}


@pytest.mark.parametrize(("dtype", "H"), RING)
def test_work(dtype, H):
    """No more products, device bytes and barriers than the baseline's, and a ring that fits."""

    def count(S, pipeline):
        q, k, v, _ = draw(dtype, B=1, N=1, K=1, T=32, S=S, H=H, V=H)
        problem = Problem(q, k, v, out_dtype=DTYPES[dtype])
        return forward(problem, pipeline=pipeline, **COUNT).counters

    size, barriers = RING[dtype, H]
    assert f"{size:,}" in (SHADERS / "block_sizes.h").read_text(encoding="utf-8")
    baseline, gluon = count(256, "baseline"), count(256, "gluon")
    assert gluon.threadgroup_memory_peak == size <= 32768
    assert gluon.multiply_accumulates <= 1.02 * baseline.multiply_accumulates
    assert gluon.device_bytes_read <= baseline.device_bytes_read
    assert gluon.device_bytes_written == baseline.device_bytes_written
    assert gluon.threadgroup_barriers <= baseline.threadgroup_barriers
    longer = count(320, "gluon").threadgroup_barriers - gluon.threadgroup_barriers
    assert longer == barriers


@pytest.mark.parametrize(("H", "with_backward"), [(64, True), (128, True), (256, False)])
def test_work_where_columns_are_staged(relative_error, H, with_backward):
    """Of INT4 keys and values with scales of columns: no more barriers and bytes either."""
    codes = QuantSpec(4, False, "channel_block", float_minimum=True)
    specs = (QuantSpec(), codes, codes)
    q, k, v, d_out = draw("float32", specs, B=1, N=1, K=1, T=32, S=160, H=H, V=H)
    problem = Problem(q, k, v)
    pipelines = ("baseline", "gluon")
    found = [forward(problem, pipeline=x, **COUNT) for x in pipelines]
    assert relative_error(found[1].out, found[0].out) <= PARITY["float32"]
    counters = [[x.counters for x in found]]
    if with_backward:
        gradients = [backward(problem, found[0], d_out, pipeline=x, **COUNT) for x in pipelines]
        np.testing.assert_array_equal(gradients[1].d_query, gradients[0].d_query)
        counters.append([x.query_counters for x in gradients])
    for baseline, gluon in counters:
        assert gluon.threadgroup_barriers <= baseline.threadgroup_barriers
        assert gluon.device_bytes_read <= baseline.device_bytes_read
        assert gluon.device_bytes_written == baseline.device_bytes_written


PROGRAM = """
import pathlib, sys
from tests.support.metal import encoder
from tests.support.metal.problems import QUANTIZED, draw
encoder.SHADERS = pathlib.Path(sys.argv[1])
kind, H = sys.argv[2], int(sys.argv[3])
specs = QUANTIZED[kind][0] if kind in QUANTIZED else (None,) * 3
shape = dict(T=150, S=32) if "backward" in sys.argv[4] else dict(T=32, S=150)
q, k, v, d_out = draw("float32", specs, B=1, N=2, K=1, H=H, V=H, **shape)
problem = encoder.Problem(q, k, v)
found = encoder.forward(problem, pipeline="gluon")
if "backward" in sys.argv[4]:
    encoder.backward(problem, found, d_out, pipeline="gluon")
"""
FORWARD, BACKWARD = "attention_forward", "attention_backward_key_value"
#: The barriers of the rings by what they say, and a problem that needs each.
BARRIERS = {
    "columns and powers are staged": ("int4", 64, FORWARD),
    "columns are staged": ("int4_channel", 64, FORWARD),
    "the first granules are filled": ("float32", 64, FORWARD),
    "the only slot is free": ("float32", 256, FORWARD),
    "the next granule is filled": ("float32", 64, FORWARD),
    "the first rows are filled": ("float32", 64, BACKWARD),
    "the only rows are free": ("float32", 256, BACKWARD),
    "the next rows are filled": ("float32", 64, BACKWARD),
}
RINGS = ("ring.h", "query_ring.h")


def run_under_thread_sanitizer(shaders: Path, kind: str, head_dim: int, stem: str) -> str:
    import softmetal

    environment = softmetal.sanitizer_environment("thread")
    # Most of the time is the compiler's.
    environment["SOFTMETAL_CLANG_FLAGS"] = "-O1"
    folders = (os.path.dirname(softmetal.__file__), str(ROOT))
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(shaders), kind, str(head_dim), stem],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    return finished.stdout + finished.stderr


def test_every_barrier_is_planted():
    text = "".join((SHADERS / name).read_text(encoding="utf-8") for name in RINGS)
    barriers = re.findall(r"(?m)\w+group_barrier\(.*$", text)
    found = [re.fullmatch(r"\w+group_barrier\(.*\);  // (.*)", each) for each in barriers]
    assert [each and each[1] for each in found] == list(BARRIERS)


@pytest.fixture
def shaders_of(tmp_path):
    """`shaders_of(problem)`: a copy of the shaders with the kernels that the program runs alone."""

    def copy(problem):
        _, head_dim, _ = problem
        shaders = tmp_path / "shaders"
        shutil.copytree(SHADERS, shaders)
        for kernels in shaders.glob("*.metal"):
            text = kernels.read_text(encoding="utf-8")
            run = rf"\({kernels.stem}_gluon, float\)"
            text = re.sub(rf"(?m)^JAX_GLUON_INSTANTIATE_ALL(?!{run}).*$", "", text)
            one = f"JAX_GLUON_INSTANTIATE({kernels.stem}_gluon, float, {head_dim})"
            text = re.sub(rf"(?m)^JAX_GLUON_INSTANTIATE_ALL{run}$", one, text)
            kernels.write_text(text, encoding="utf-8")
        return shaders

    return copy


@pytest.mark.sanitizers
@pytest.mark.parametrize("problem", sorted(set(BARRIERS.values())))
def test_no_race(device, shaders_of, problem):
    assert run_under_thread_sanitizer(shaders_of(problem), *problem) == ""


@pytest.mark.sanitizers
@pytest.mark.parametrize("barrier", BARRIERS)
def test_missing_barrier_is_a_race(device, shaders_of, barrier):
    problem = BARRIERS[barrier]
    shaders = shaders_of(problem)
    count = 0
    for name in RINGS:
        text = (shaders / name).read_text(encoding="utf-8")
        planted, found = re.subn(rf"\w+group_barrier\(.*\);(?=  // {barrier})", "", text)
        (shaders / name).write_text(planted, encoding="utf-8")
        count += found
    assert count == 1
    assert "data race" in run_under_thread_sanitizer(shaders, *problem)
