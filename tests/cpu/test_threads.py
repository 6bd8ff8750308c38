"""The same bits from any number of threads, and no call that waits for a thread it may not get.

Run as a program, this file prints a digest of every result; the tests compare digests of processes
whose XLA pools differ in size.
"""

import concurrent.futures
import functools
import hashlib
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

if __name__ != "__main__":
    pytest.importorskip("jax_gluon._plugin", reason="jax_gluon._plugin is not built")

# Long enough for several tasks along every axis: blocks are 96 rows and up to 256 keys.
B, T, S, N, K, H = 2, 200, 300, 4, 2, 32
# Backward splits the rows of few and long heads into parts, and adds their sums.
LONG = dict(B=1, T=1100, N=2, K=1)
THREADS = 8


def operands(seed=0, B=B, T=T, N=N, K=K):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (1, N, T, S), (B, T, N, H)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="kernel")
def attention(quantization, query, key, value, bias, d_out, kernel="baseline"):
    """Every kernel at once: output, log-sum-exp and the gradients of query, key, value and bias."""

    def function(*inputs):
        return jax_gluon.attention_with_log_sum_exp(
            *inputs, is_causal=True, quantization=quantization, implementation="cpu", kernel=kernel
        )

    results, pullback = jax.vjp(function, query, key, value, bias)
    return *results, *pullback((d_out, jnp.ones_like(results[1])))


@jax.jit
def independent_calls(query, key, value, bias, d_out):
    """Calls that XLA may start at once, from its own pool."""
    return [
        jax_gluon.dot_product_attention(query * i, key, value, bias, implementation="cpu")
        for i in range(1, 17)
    ]


@functools.partial(jax.jit, static_argnums=0)
def windowed(kernel, query, key, value, bias, d_out):
    """In bfloat16, for AMX's kernels; a value that is not finite is added apart."""
    arrays = [x.astype(jnp.bfloat16) for x in (query, key, value.at[0, 150, 0, 3].set(jnp.nan))]

    def function(*x):
        return jax_gluon.attention_with_log_sum_exp(
            *x, local_window_size=(60, 50), implementation="cpu", kernel=(kernel, "gluon")
        )

    results, pullback = jax.vjp(function, *arrays)
    return *results, *pullback((d_out.astype(jnp.bfloat16), jnp.ones_like(results[1])))


def digest(results):
    hashed = hashlib.sha256()
    for x in results:
        hashed.update(np.asarray(x).tobytes())
    return hashed.hexdigest()


def pool_threads():
    """Threads of XLA's pools, where the system lists them by name."""
    names = Path("/proc/self/task").glob("*/comm")
    return sum(name.read_text().startswith("tf_XLAEigen") for name in names)


def main():
    for kernel in ("baseline", "gluon"):
        for quantization in (None, "int8"):
            for sizes in ({}, LONG):
                print(digest(attention(quantization, *operands(**sizes), kernel=kernel)))
    query, key, value, bias, d_out = operands(**LONG)
    few = query, key[:, :250], value[:, :250], bias[..., :250], d_out
    print(digest(attention(None, *few, kernel=("small", "baseline"))))
    print(digest(independent_calls(*operands())))
    small = "gluon"
    if "emulated_amx" in jax_gluon._plugin.cpu_isas_supported():
        os.environ["JAX_GLUON_CPU_ISA"] = "emulated_amx"
        small = jax_gluon.CpuKernel("gluon", block_k=128)
    print(digest(windowed(small, *operands(B=1, T=300, N=2, K=1))))
    print(pool_threads())


@functools.cache
def digests(threads):
    """Digests that a process prints whose XLA pool has that many threads, and that number."""
    finished = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NPROC": str(threads)},
        capture_output=True,
        text=True,
        timeout=300,  # a call that waits for a thread which never comes ends here
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    *hashed, pool = finished.stdout.split()
    return hashed, int(pool)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_results_are_the_same_bits_for_any_number_of_threads(threads):
    one, _ = digests(1)
    many, _ = digests(threads)
    assert len(one) == 11
    assert many == one


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not listed by name")
def test_the_processes_compared_do_have_pools_of_different_size():
    sizes = [digests(threads)[1] for threads in (1, 3, 7)]
    assert sizes == [1, 3, 7]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_concurrent_calls_give_the_bits_of_a_call_alone(quantization):
    """Every thread has its own operands, so that scratch shared by mistake shows."""
    inputs = [operands(seed) for seed in range(THREADS)]
    alone = [digest(attention(quantization, *x)) for x in inputs]
    assert len(set(alone)) == THREADS
    start = threading.Barrier(THREADS)

    def repeat(x):
        start.wait(timeout=60)
        return [digest(attention(quantization, *x)) for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as executor:
        together = list(executor.map(repeat, inputs))
    assert together == [[expected] * 4 for expected in alone]


def test_errors_in_one_thread_leave_the_others_alone():
    """Bad and good calls at the same time: each gets its own outcome."""
    x = operands()
    expected = digest(attention(None, *x))
    start = threading.Barrier(THREADS)

    def good(_):
        start.wait(timeout=60)
        return [digest(attention(None, *x)) for _ in range(4)]

    def bad(_):
        start.wait(timeout=60)
        messages = []
        for _ in range(4):
            call = jax.ffi.ffi_call("jax_gluon.quantize", jax.ShapeDtypeStruct((3,), jnp.int8))
            with pytest.raises(jax.errors.JaxRuntimeError) as error:
                call(jnp.ones(3), center=np.int64(0), has_lengths=np.int64(0)).block_until_ready()
            messages.append("jax_gluon.quantize" in str(error.value))
        return messages

    with concurrent.futures.ThreadPoolExecutor(THREADS) as executor:
        outcomes = [executor.submit(good if i % 2 else bad, i) for i in range(THREADS)]
        outcomes = [outcome.result(timeout=300) for outcome in outcomes]
    assert outcomes == [[expected] * 4 if i % 2 else [True] * 4 for i in range(THREADS)]


if __name__ == "__main__":
    main()
