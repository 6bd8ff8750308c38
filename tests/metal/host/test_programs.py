"""Programs that use the software Metal device: faults, command buffers, files, counters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAD = """
import json
import jax, jax.numpy as jnp, numpy as np
import jax_gluon
from jax_gluon._quantization.formats import PRESETS

INT8 = PRESETS["int8"]  # by its name it leaves few queries in float
attention = jax_gluon.dot_product_attention

def draw(seed, *shape, dtype="float32"):
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(x.astype(jnp.dtype(dtype)))
"""

TWICE = (
    HEAD
    + """
x = draw(0, 1, 64, 2, 64, dtype="float16")
for i in range(2):
    try:
        out = np.asarray(attention(x, x, x, is_causal=True, implementation="metal"))
        expected = attention(x, x, x, is_causal=True, implementation="cpu")
        assert np.allclose(out, expected, atol=2e-3)
        print("ok")
    except Exception as error:
        print(type(error).__name__, error)
print(json.dumps(jax_gluon.debug.metal_counters()))
print(json.dumps(jax_gluon.debug.metal_counters()))
"""
)

# Every kernel but those of the quantizer's extremes, odd sizes, batch and heads over 1; decode too.
EVERY_CALL = (
    HEAD
    + """
def function(implementation):
    def loss(query, key, value, bias, one):
        out = attention(query, key, value, bias, is_causal=True, implementation=implementation)
        few = attention(one, key, value, quantization=INT8, implementation=implementation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(few))
    return jax.jit(jax.value_and_grad(loss, argnums=range(5)))

x = [draw(0, 2, 70, 4, 24), draw(1, 2, 300, 2, 24), draw(2, 2, 300, 2, 16), draw(3, 1, 4, 70, 300)]
x.append(draw(4, 2, 1, 4, 24))
expected = function("cpu")(*x)
found = function("metal")(*x)
for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
    print(bool(error <= 5e-3), float(error), sep=", ")
print(json.dumps(jax_gluon.debug.metal_counters()))
"""
)

BFLOAT = (
    HEAD
    + """
x = draw(0, 1, 64, 2, 64, dtype="bfloat16")
one = x[:, :1]
y = np.tile(x, (1, 5, 1, 1))
for query in (x, one):
    out = attention(query, y, y, implementation="metal").astype(jnp.float32)
    expected = attention(query, y, y, implementation="cpu").astype(jnp.float32)
    print(np.allclose(out, expected, atol=2e-2))
print(json.dumps(jax_gluon.debug.metal_counters()))
"""
)


PIPELINES = (
    HEAD
    + """
x = [draw(i, 1, 70, 2, 40) for i in range(3)]
def loss(*x, kernel):
    return jnp.sum(attention(*x, kernel=kernel, implementation="metal") ** 2)

baseline, gluon = (
    jax.grad(loss, argnums=(0, 1, 2))(*x, kernel=kernel) for kernel in ("baseline", "gluon")
)
for wanted, found in zip(*jax.tree.map(np.asarray, (baseline, gluon)), strict=True):
    print(bool(np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)))
print(json.dumps(jax_gluon.debug.metal_counters()))
"""
)


def run(program=TWICE, **environment):
    finished = subprocess.run(
        [sys.executable, "-c", program],
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


def command_buffers(dispatches):
    """The kernels of each command buffer, in order."""
    numbers = dict.fromkeys(each["command_buffer"] for each in dispatches)
    return [
        [each["kernel"] for each in dispatches if each["command_buffer"] == number]
        for number in numbers
    ]


@SOFTWARE
def test_a_call_is_one_command_buffer():
    *checks, counted = run(EVERY_CALL)
    assert all(check.startswith("True") for check in checks), checks
    assert sorted(command_buffers(json.loads(counted))) == [
        ["attention_backward_bias_float_64"],
        ["attention_backward_query_float_64", "attention_backward_key_value_float_64"],
        ["attention_backward_query_float_64", "attention_backward_key_value_float_64"],
        ["attention_forward_float_64"],
        [
            "quantize_blocks",
            "quantize_center",
            "quantize_blocks",
            "quantize_blocks",
            "attention_decode_half_64",
            "attention_decode_combine",
        ],
    ]


@SOFTWARE
def test_each_pipeline_has_its_kernels():
    *checks, counted = run(PIPELINES)
    assert checks == ["True"] * 3
    stems = ["attention_forward", "attention_backward_query", "attention_backward_key_value"]
    assert [each["kernel"] for each in json.loads(counted)] == [
        *(f"{stem}_float_64" for stem in stems),
        *(f"{stem}_gluon_float_64" for stem in stems),
    ]


@SOFTWARE
@pytest.mark.parametrize(
    # Of the forward call: batch entries, heads of one, and single threadgroups.
    "products", [3_400_000, 900_000, 1],
)  # fmt: skip
def test_long_work_is_cut_into_command_buffers(products):
    *checks, counted = run(EVERY_CALL, JAX_GLUON_METAL_COMMAND_PRODUCTS=str(products))
    assert all(check.startswith("True") for check in checks), checks
    dispatches = json.loads(counted)
    forward = [each for each in dispatches if each["kernel"] == "attention_forward_float_64"]
    # Two batch entries of four heads of three blocks of rows.
    each_has = max(1, products // (2 * 4 * 70 * 300 * (24 + 16) // 24))
    if each_has >= 12:
        parts = 2 // min(2, each_has // 12)
    else:
        parts = 2 * -(-4 // (each_has // 3)) if each_has >= 3 else 2 * 4 * -(-3 // each_has)
    assert len(forward) == parts
    assert sum(each["threads"] for each in forward) == 128 * 24
    assert len({each["command_buffer"] for each in forward}) == parts
    assert len(command_buffers(dispatches)) >= parts


@SOFTWARE
def test_a_bad_number_of_products_is_an_error():
    for text in ("0", "many", ""):
        first, second, *_ = run(JAX_GLUON_METAL_COMMAND_PRODUCTS=text)
        assert f'JAX_GLUON_METAL_COMMAND_PRODUCTS is "{text}", expected an integer' in first
        assert second == first


@SOFTWARE
def test_memory_that_metal_does_not_take_is_copied():
    program = EVERY_CALL.replace(
        "found = function", "pin = jax_gluon.pin(x[1])\nfound = function"
    ).replace("print(json", "print(pin.uses > 0)\nprint(json")
    *checks, _ = run(
        program, SOFTMETAL_FAULT="no_copy_refused", JAX_GLUON_METAL_COMMAND_PRODUCTS="900000"
    )
    assert len(checks) == 7
    assert all(check.startswith("True") for check in checks), checks


@SOFTWARE
def test_a_compiler_without_bfloat():
    def kernels(**environment):
        *checks, counted = run(BFLOAT, **environment)
        assert checks == ["True", "True"]
        return [each["kernel"] for each in json.loads(counted)]

    native = ["attention_forward_bfloat_64", "attention_decode_bfloat_64"]
    assert kernels() == [*native, "attention_decode_combine"]
    without = [name.replace("bfloat", "float") for name in native]
    assert kernels(SOFTMETAL_FAULT="old_language") == [*without, "attention_decode_combine"]


@SOFTWARE
@pytest.mark.parametrize(("setting", "outcome"), [("1", "ok"), ("0", "no simdgroup matrices")])
def test_any_family_is_taken_where_told(setting, outcome):
    first, *_ = run(SOFTMETAL_FAULT="old_family:1", JAX_GLUON_METAL_ANY_FAMILY=setting)
    assert outcome in first


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
    assert dispatches[0]["simdgroup_operations"] > 0
    assert json.loads(again) == []
