"""Memory is linear in the sequence length: no buffer of T x S anywhere."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jax_gluon

QUANTIZATIONS = pytest.mark.parametrize("quantization", [None, "int8"])


def _functions(implementation, quantization):
    def forward(query, key, value):
        return jax_gluon.dot_product_attention(
            query, key, value, is_causal=True,
            implementation=implementation, quantization=quantization,
        )  # fmt: skip

    def backward(query, key, value, d_out):
        return jax.vjp(forward, query, key, value)[1](d_out)

    return {"forward": (forward, 3), "backward": (backward, 4)}


@QUANTIZATIONS
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiled_temporaries_grow_linearly(implementation, direction, quantization):
    """XLA's own account of the buffers it plans."""
    function, arguments = _functions(implementation, quantization)[direction]

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        analysis = jax.jit(function).lower(*[x] * arguments).compile().memory_analysis()
        return analysis.temp_size_in_bytes, x.size * x.dtype.itemsize

    (short, _), (long, operand) = temporaries(2048), temporaries(8192)
    # Four times the length: about four times the memory (sixteen times would be T x S), and never
    # near the T x S float32 of even one head.
    assert long <= 6 * max(short, operand / 4)
    assert long < 8192 * 8192


PEAK = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import jax_gluon

direction, quantization = sys.argv[1], sys.argv[2] or None
T = 8192
rng = np.random.default_rng(0)
x = [jnp.asarray(rng.standard_normal((1, T, 2, 64), np.float32)) for _ in range(4)]
forward = lambda q, k, v: jax_gluon.dot_product_attention(
    q, k, v, implementation="cpu", quantization=quantization)
if direction == "forward":
    function, operands, results = forward, x[:3], 1
else:
    function = lambda q, k, v, g: jax.vjp(forward, q, k, v)[1](g)
    operands, results = x, 4  # the output of the forward pass is a residual
compiled = jax.jit(function).lower(*operands).compile()
small = [a[:, :64] for a in operands]
jax.block_until_ready(jax.jit(function)(*small))  # what a first call loads

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # resets VmHWM
before = status("VmRSS:")
jax.block_until_ready(compiled(*operands))
inputs_and_outputs = sum(a.nbytes for a in operands) + results * x[0].nbytes
print(json.dumps([status("VmHWM:") - before, inputs_and_outputs]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@QUANTIZATIONS
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_process_peak_stays_under_three_times_inputs_and_outputs(direction, quantization):
    run = subprocess.run(
        [sys.executable, "-c", PEAK, direction, quantization or ""],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    growth, inputs_and_outputs = json.loads(run.stdout)
    assert 0 < growth < 3 * inputs_and_outputs
    assert growth < 8192 * 8192 * 4
