"""AMX's tiles, and the transposed kernels: what the tests of every variant do not reach."""

import itertools
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import CpuKernel
from tests.support import cases
from tests.support.arrays import placed
from tests.support.cases import BARS

plugin = pytest.importorskip("jax_gluon._plugin")
pytestmark = pytest.mark.usefixtures("poison")

ROOT = Path(__file__).resolve().parents[2]
NATIVE = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16"
NATIVE += " -mamx-tile -mamx-int8 -mamx-bf16 -DJAX_GLUON_HAVE_AMX"
VARIANTS = [isa for isa in plugin.cpu_isas_supported() if "amx" in isa]
# On vectors, forward of codes alone.
OF_CODES = [isa for isa in plugin.cpu_isas_supported() if "avx512" in isa]


@pytest.mark.parametrize("target", ["emulated", "native"])
def test_operations_give_what_they_say(target, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-DJAX_GLUON_EMULATE_AVX512"] if target == "emulated" else NATIVE.split()
    sources = [ROOT / "tests" / "cpu" / "simd" / "tiles.cc"]
    if target == "native":
        sources.append(ROOT / "plugin" / "cpu" / "amx_support.cc")
    program = tmp_path / target
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        *flags,
        f"-I{ROOT / 'plugin'}",
        *sources,
        "-o",
        program,
    ]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if target == "native" and "unrecognized" in compiled.stderr:
        pytest.skip("the compiler does not know AMX")
    assert compiled.returncode == 0, compiled.stderr
    finished = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    if finished.returncode == 77:
        pytest.skip("compiled; the processor has no AMX, or may not use it")
    assert finished.stdout == "0 failures\n"


def run(kernel, arrays, quantization=None, **keywords):
    def attention(*x):
        return jax_gluon.attention_with_log_sum_exp(
            *x, **keywords, implementation="cpu", kernel=kernel, quantization=quantization
        )

    out = jax.block_until_ready(jax.jit(attention)(*arrays))
    ran = jax_gluon.debug.kernels()[-1]
    assert ran["variant"] == plugin.cpu_isa()
    assert ran["kernel"] == kernel.name
    assert ran["stages"] == 0  # the transposed kernels have no ring
    assert ran["block_k"] == kernel.block_k
    return out


def growing(dtype):
    """Rows whose largest logits come ever later, by far more than sums have room for."""
    (query, key, value), *_ = cases.operands(dict(T=50, S=420, N=2, K=1, H=40, V=20), dtype)
    sizes = np.linspace(-3, 3, 420)[:, None, None].astype(np.float32) ** 3
    return query * 4 + 6, (key * 0.2 + sizes).astype(dtype), value


@pytest.mark.parametrize(
    ("variant", "pipeline", "dtype"),
    [
        *itertools.product(VARIANTS, ("baseline", "gluon"), ("bfloat16", "int8")),
        *((variant, "gluon", "int8") for variant in OF_CODES),
    ],
)
def test_maxima_that_grow_from_block_to_block(
    use, oracle, fake_quantize, relative_error, variant, pipeline, dtype
):
    """Sums that are there already are rescaled, also while products are on their way."""
    use(variant)
    quantization = "int8" if dtype == "int8" else None
    arrays = growing("float32" if quantization else dtype)
    point = arrays
    if quantization:
        point = [
            fake_quantize(x, center=c) for x, c in zip(arrays, (False, True, False), strict=True)
        ]
    exact = oracle(*point)
    # Blocks of one and of several steps, the last ones short.
    for block_k in (128, 256, 512):
        kernel = CpuKernel(pipeline, block_k=block_k)
        out, log_sum_exp = run(kernel, arrays, quantization)
        assert relative_error(out, exact.out) <= BARS[dtype][0]
        np.testing.assert_allclose(log_sum_exp, exact.log_sum_exp, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *itertools.product(VARIANTS, ("bfloat16", "int8")),
        *((variant, "int8") for variant in OF_CODES),
    ],
)
def test_scales_that_are_not_positive(
    use, oracle, fake_quantize, relative_error, variant, scale, dtype
):
    use(variant)
    quantization = "int8" if dtype == "int8" else None
    arrays, *_ = cases.operands(dict(T=40, S=70), "float32" if quantization else dtype)
    point = arrays
    if quantization:
        point = [
            fake_quantize(x, center=c) for x, c in zip(arrays, (False, True, False), strict=True)
        ]
    exact = oracle(*point, scale=scale)
    out, _ = run(CpuKernel("gluon", block_k=128), arrays, quantization, scale=scale)
    assert relative_error(out, exact.out) <= BARS[dtype][0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pipeline", ["baseline", "gluon"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_reach_who_sees_them(use, variant, pipeline, bad):
    """In a query its row; in a key and a value the rows from it on, and of the value one column."""
    use(variant)
    kernel = CpuKernel(pipeline, block_k=128)
    arrays, *_ = cases.operands(dict(B=1, T=70, S=70, N=1, K=1, H=16, V=16), "bfloat16")
    plain, _ = run(kernel, arrays, is_causal=True)

    def affected(operand, index):
        changed = [np.array(x) for x in arrays]
        changed[operand][index] = bad
        out, _ = run(kernel, map(placed, changed), is_causal=True)
        finite = np.isfinite(np.asarray(out, np.float32))
        np.testing.assert_array_equal(np.asarray(out)[finite], np.asarray(plain)[finite])
        return ~finite[0, :, 0]

    rows, columns = np.arange(70)[:, None], np.arange(16)
    np.testing.assert_array_equal(affected(0, (0, 33, 0, 3)), (rows == 33) & (columns >= 0))
    np.testing.assert_array_equal(affected(2, (0, 33, 0, 3)), (rows >= 33) & (columns == 3))
    if np.isnan(bad):
        np.testing.assert_array_equal(affected(1, (0, 33, 0, 3)), (rows >= 33) & (columns >= 0))


@pytest.mark.parametrize("variant", [x for x in OF_CODES if x != "avx512"])
@pytest.mark.parametrize("pipeline", ["baseline", "gluon"])
def test_gradients_over_more_keys_than_are_kept(use, oracle, relative_error, variant, pipeline):
    """P and dP of so many are made twice."""
    use(variant)
    S = 20500 if pipeline == "baseline" else 41000
    operands = cases.operands(dict(B=1, T=40, S=S, N=1, K=1, H=8, V=8), "bfloat16")

    def attention(*x):
        return jax_gluon.dot_product_attention(*x, implementation="cpu", kernel=pipeline)

    gradients = jax.vjp(attention, *operands.arrays)[1](operands.d_out)
    assert jax_gluon.debug.kernels()[-1]["arithmetic"] == "bfloat16"
    exact = oracle(*operands.arrays, d_out=operands.d_out)
    for x, y in zip(gradients, exact[2:5], strict=True):
        assert relative_error(x, y) <= BARS["bfloat16"][1]


def test_a_refusal_of_the_operating_system_is_explained(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    monkeypatch.setattr(plugin, "cpu_isa_refusal", lambda: "the operating system refuses tiles")
    plan = jax_gluon.explain(x, x, x, implementation="cpu")
    assert plan.reasons[0].endswith("; the operating system refuses tiles")
