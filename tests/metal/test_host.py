"""Metal from inside `jax.jit`, on the software device: what the kernels' own tests do not see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon import QuantSpec
from jax_gluon.formats import PRESETS

ROOT = Path(__file__).resolve().parents[2]
plugin = pytest.importorskip("jax_gluon._plugin")


@pytest.fixture(scope="module", autouse=True)
def _metal(request):
    if sys.platform != "darwin":
        request.getfixturevalue("device")
    name, why = plugin.metal_device()
    assert name, why
    assert name == "Software Metal" or sys.platform == "darwin"


def draw(seed, *shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def operands(seed=0, B=2, T=40, S=70, N=4, K=2, H=24, V=16, dtype=jnp.float32):
    return draw(seed, (B, T, N, H), (B, S, K, H), (B, S, K, V), dtype=dtype)


def gradients(implementation, **keywords):
    @jax.jit
    def function(*x):
        def loss(*x):
            out = jax_gluon.dot_product_attention(*x, implementation=implementation, **keywords)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*x)

    return function


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("T", [40, 2], ids=["blocks", "decode"])
def test_as_on_the_cpu(relative_error, quantization, T):
    x = operands(T=T, S=600 if T == 2 else 70)
    keywords = dict(quantization=quantization, logits_soft_cap=5.0)
    ((_, out), grads) = gradients("metal", **keywords)(*x)
    ((_, cpu_out), cpu_grads) = gradients("cpu", **keywords)(*x)
    # The CPU's probabilities have 8 bits where operands are quantized.
    bar = 3e-6 if quantization is None else 1.3e-2
    assert relative_error(out, cpu_out) <= bar
    for actual, expected in zip(grads, cpu_grads, strict=True):
        assert relative_error(actual, expected) <= 2 * bar


@pytest.mark.parametrize("granularity", ["tensor", "head", "row", "block", "group", "channel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_as_on_the_cpu(bits, granularity):
    spec = QuantSpec(bits=bits, granularity=granularity, symmetric=bits == 8)
    (x,) = draw(1, (2, 50, 3, 32))
    actual = jax_gluon.quantize(x, spec, implementation="metal")
    expected = jax_gluon.quantize(x, spec, implementation="cpu")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_centred_and_rotated_codes():
    (x,) = draw(2, (2, 50, 3, 32))
    lengths = np.array([50, 7], np.int32)
    for spec in (PRESETS["int8"].key, PRESETS["int4"].key, QuantSpec(rotate=True)):
        assert spec is not None
        keywords = dict(lengths=lengths if spec.center else None)
        metal = jax_gluon.quantize(x, spec, **keywords, implementation="metal")
        cpu = jax_gluon.quantize(x, spec, **keywords, implementation="cpu")
        difference = metal.dequantize() - cpu.dequantize()
        # Sums in another order move a mean by a rounding, and a code by one at most.
        step = np.abs(np.asarray(cpu.scale, np.float32)).max()
        assert float(jnp.abs(difference).max()) <= 1.01 * step
        assert float(jnp.mean(jnp.abs(difference) > 1e-5)) < 0.01


def test_vmap_over_every_operand(relative_error):
    query, key, value = draw(3, (3, 2, 20, 4, 16), (2, 30, 2, 16), (3, 2, 30, 2, 8))
    (bias,) = draw(4, (3, 1, 4, 20, 30))

    def function(implementation):
        def attention(query, value, bias):
            return jax_gluon.dot_product_attention(
                query, key, value, bias, implementation=implementation
            )

        def loss(*x):
            return jnp.sum(jax.vmap(attention)(*x) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, value, bias)

    for actual, expected in zip(function("metal"), function("cpu"), strict=True):
        assert relative_error(actual, expected) <= 1e-5


def test_no_rows_and_no_keys():
    for sizes in (dict(T=0), dict(B=0), dict(S=0)):
        x = operands(**sizes)
        (_, out), grads = gradients("metal")(*x)
        assert out.shape == (*x[0].shape[:3], 16)
        assert not np.any(out)
        assert not any(np.any(grad) for grad in grads)


def test_from_many_threads():
    """Two shapes through one cache of pipelines; each thread gets its own results."""
    functions = {T: gradients("metal", is_causal=True) for T in (33, 65)}
    inputs = {(T, seed): operands(seed, T=T, S=T) for T in functions for seed in range(3)}
    expected = {
        key: np.asarray(gradients("cpu", is_causal=True)(*x)[0][1]) for key, x in inputs.items()
    }
    wrong = []

    def work(key):
        out = np.asarray(functions[key[0]](*inputs[key])[0][1])
        if not np.allclose(out, expected[key], atol=1e-5):
            wrong.append(key)

    threads = [threading.Thread(target=work, args=(key,)) for key in inputs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_explain():
    x = operands()
    plan = jax_gluon.explain(*x, implementation="metal")
    assert plan.implementation == "metal"
    assert f'"{plugin.metal_device()[0]}"' in plan.reasons[0]
    # The software device is for those who ask for it.
    large = jax.ShapeDtypeStruct((8, 4096, 16, 128), jnp.float32)
    expected = "metal" if sys.platform == "darwin" else "cpu"
    assert jax_gluon.explain(large, large, large).implementation == expected


def test_head_dims_over_256_are_refused():
    with pytest.raises(ValueError, match=r'implementation is "metal" for a head dim of 257'):
        jax_gluon.dot_product_attention(*operands(H=257), implementation="metal")


def test_float64_is_refused(configure):
    with configure(jax_enable_x64=True):
        x = operands(dtype=jnp.float64)
        with pytest.raises(ValueError, match=r'implementation is "metal" for float64'):
            jax_gluon.dot_product_attention(*x, implementation="metal")


# --- In a process of its own ---

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import jax_gluon
x = jax.random.normal(jax.random.key(0), (1, 64, 2, 64), jnp.float16)
for i in range(2):
    try:
        attention = jax_gluon.dot_product_attention
        out = attention(x, x, x, is_causal=True, implementation="metal")
        expected = attention(x, x, x, is_causal=True, implementation="cpu")
        assert np.allclose(out, expected, atol=2e-3)
        print("ok")
    except Exception as error:
        print(type(error).__name__, error)
print(json.dumps(jax_gluon.debug.metal_counters()))
print(json.dumps(jax_gluon.debug.metal_counters()))
"""


def run(**environment):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | environment,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


SOFTWARE = pytest.mark.skipif(sys.platform == "darwin", reason="of the software device alone")


@SOFTWARE
@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        # Asked twice: for the default device, then for all.
        ("nil_device:2", ("RuntimeError", "no Metal device")),
        ("old_family", ("RuntimeError", "no simdgroup matrices", "MTLGPUFamilyApple7")),
        ("compile_failure", ("does not compile attention_forward", "injected")),
        # Asked twice: for the one on disk, then for a new one.
        ("pipeline_failure:2", ("no pipeline of attention_forward_half_64", "injected")),
        ("out_of_memory", ("Metal has no memory",)),
        ("command_buffer_error", ("Internal Error",)),
        ("command_buffer_out_of_memory", ("Insufficient Memory", "smaller batches")),
        ("watchdog", ("GPU Timeout", "smaller batches")),
    ],
)
def test_a_fault_is_an_error_and_poisons_nothing(fault, messages):
    first, second, *_ = run(SOFTMETAL_FAULT=fault if ":" in fault else f"{fault}:1")
    for message in messages:
        assert message in first
    assert 'implementation="cpu"' in first or '"cpu"' in first
    assert second == "ok"


@SOFTWARE
def test_pipelines_are_kept_on_disk(tmp_path):
    where = {"JAX_GLUON_CACHE_DIR": str(tmp_path / "new" / "folder")}
    assert run(**where)[:2] == ["ok", "ok"]
    (archive,) = (tmp_path / "new" / "folder").iterdir()
    assert "attention_forward_half_64" in archive.read_text()
    before = archive.stat().st_mtime_ns
    assert run(**where)[:2] == ["ok", "ok"]
    assert archive.stat().st_mtime_ns == before  # found there, so nothing was added
    archive.write_text("something else")
    assert run(**where)[:2] == ["ok", "ok"]
    assert "attention_forward_half_64" in archive.read_text()
    # No folder can be made: nothing is kept, and all is well.
    assert run(JAX_GLUON_CACHE_DIR=str(archive / "below"))[:2] == ["ok", "ok"]


@SOFTWARE
def test_counters():
    first, second, counted, again = run(SOFTMETAL_INSTRUMENT="counters")
    assert (first, second) == ("ok", "ok")
    dispatches = json.loads(counted)
    assert [each["kernel"] for each in dispatches] == ["attention_forward_half_64"] * 2
    # Tiles of 8 x 8 with a visible pair: 36 of 64 in the causal triangle, for two heads, QK and PV.
    assert dispatches[0]["multiply_accumulates"] == 2 * 36 * 64 * (64 + 64)
    assert dispatches[0]["device_bytes_written"] >= 64 * 2 * (64 * 2 + 8)
    assert dispatches[0]["threadgroup_bytes"] > 0
    assert dispatches[0]["barriers"] > 0
    assert dispatches[0]["simd_operations"] > 0
    assert json.loads(again) == []
