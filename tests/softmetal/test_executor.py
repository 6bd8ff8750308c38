"""How threads run, and what the device refuses: each planted bug is told by name and place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
ARGUMENTS = (
    "device float* out [[buffer(0)]], uint i [[thread_position_in_grid]], "
    "uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]"
)


def library(body: str, *, name: str = "f", before: str = "", **keywords):
    import softmetal

    return softmetal.Library(
        f"{HEAD}{before}\nkernel void {name}({ARGUMENTS}) {{\n{body}\n}}", **keywords
    )


def run(body: str, *, threads=64, grid=1, before="", size=4096, library_keywords=None, **keywords):
    out = np.zeros(size, np.float32)
    kernel = library(body, before=before, **(library_keywords or {})).kernel("f")
    counters = kernel(grid=grid, threads=threads, buffers=[out], **keywords)
    return out, counters


def test_every_thread_has_its_place():
    import softmetal

    source = (
        HEAD
        + """
    kernel void f(device uint* out [[buffer(0)]], uint3 grid [[thread_position_in_grid]],
                  uint3 group [[threadgroup_position_in_grid]],
                  ushort3 thread [[thread_position_in_threadgroup]],
                  uint3 size [[threads_per_threadgroup]], uint3 all [[threads_per_grid]],
                  uint index [[thread_index_in_threadgroup]]) {
      uint at = (grid.z * all.y + grid.y) * all.x + grid.x;
      out[at] = group.x + 10 * group.y + 100 * group.z + 1000 * index + 1000000 * size.x;
    }"""
    )
    source = source.replace("ushort3 thread ", "ushort3 in ")
    kernel = softmetal.Library(source).kernel("f")
    out = np.zeros((3, 5, 7), np.uint32)
    # 7 x 5 x 3 threads in threadgroups of 4 x 2 x 2: those at the edges are smaller.
    counters = kernel(grid=(7, 5, 3), threads=(4, 2, 2), grid_in_threads=True, buffers=[out])
    assert counters.threads == 105
    z, y, x = np.indices(out.shape)
    wide, high = np.where(x < 4, 4, 3), np.where(y < 4, 2, 1)
    index = (z % 2 * high + y % 2) * wide + x % 4
    expected = x // 4 + 10 * (y // 2) + 100 * (z // 2) + 1000 * index + 1000000 * wide
    np.testing.assert_array_equal(out, expected)


def test_barriers_and_threadgroup_memory():
    body = """threadgroup float shared[64]; shared[t] = float(t);
    threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = shared[63 - t];"""
    out, counters = run(body, grid=3)
    np.testing.assert_array_equal(out[:192], np.tile(63 - np.arange(64), 3))
    assert (counters.threadgroup_barriers, counters.threadgroup_memory_peak) == (3, 256)


def test_memory_of_a_threadgroup_is_not_initialised():
    out, _ = run("threadgroup float shared[64]; out[i] = shared[t];")
    assert np.isnan(out[:64]).all()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_results_do_not_depend_on_order(seed, workers):
    body = """float sum = simd_sum(float(i)); threadgroup float part[2];
    if (lane == 0) part[t / 32] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = part[0] + part[1];"""
    out, counters = run(body, grid=6, seed=seed, workers=workers)
    expected = np.repeat(np.arange(384).reshape(6, 64).sum(1), 64)
    np.testing.assert_array_equal(out[:384], expected)
    assert counters.simdgroup_operations == 12


def test_an_order_shows_what_depends_on_it():
    """A missing barrier gives the right result in one order and a wrong one in another."""
    body = "threadgroup float shared[64]; shared[t] = 1; simd_sum(1.0f); out[i] = shared[63 - t];"
    results = {run(body, seed=seed)[0][:64].tobytes() for seed in range(6)}
    assert len(results) > 1


def test_dispatches_from_many_threads():
    kernel = library("out[i] = simd_sum(float(lane)) + t;").kernel("f")
    outs = [np.zeros(256, np.float32) for _ in range(8)]

    def work(out):
        for _ in range(5):
            kernel(grid=4, threads=64, buffers=[out])

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        np.testing.assert_array_equal(out, np.tile(np.arange(64) + 496.0, 4))


PLANTED = {
    "barrier_after_return": (
        "if (t < 7) return; threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = 1;",
        "threadgroup_barrier is reached by 57 of 64 threads; the others have returned",
    ),
    "barrier_in_a_branch": (
        "if (lane < 16) threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = simd_sum(1.0f);",
        "threadgroup_barrier reached while lane|deadlock|simd_sum is reached",
    ),
    "simd_sum_in_a_branch": (
        "if (lane < 16) out[i] = simd_sum(1.0f);",
        r"simd_sum is (not )?reached by",
    ),
    "different_operations": (
        "out[i] = lane < 16 ? simd_sum(1.0f) : simd_max(1.0f);",
        "lanes of simdgroup 0 are in different operations: lane 16 in simd_max, lane 0 in simd_sum",
    ),
    "too_much_memory": (
        "threadgroup float shared[8193]; shared[t] = 1; out[i] = shared[t];",
        "threadgroup memory exceeds 32768 bytes: 0 and 32772 for shared",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_told(bug):
    import softmetal

    body, message = PLANTED[bug]
    with pytest.raises(softmetal.Error, match=message) as told:
        run(body)
    assert "f: " in str(told.value)
    assert "(threadgroup (0, 0, 0), thread (" in str(told.value)
    run("out[i] = 1;")  # the device goes on


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(buffers=[]), r"argument out \[\[buffer\(0\)\]\] is not bound"),
        (dict(threads=1025), "1025 threads in a threadgroup; allowed: 1 to 1024"),
        (dict(threads=0), "0 threads in a threadgroup"),
        (dict(time_limit=0.05, which="forever"), r"time limit of 0.05\d* s exceeded"),
        (dict(which="half_of_it"), r"params \[\[buffer\(1\)\]\] has 8 bytes; Params needs 16"),
        (dict(which="memory"), r"argument m \[\[threadgroup\(0\)\]\] has no length"),
        (dict(which="few"), "64 threads in a threadgroup; the kernel's max_total_threads_per_t"),
    ],
)
def test_refused_dispatch(keywords, message):
    import softmetal

    source = (
        HEAD
        + """
    struct Params { float4 a; };
    kernel void plain(device float* out [[buffer(0)]]) { out[0] = 1; }
    kernel void forever(device float* out [[buffer(0)]]) { while (simd_sum(1.0f) > 0) out[0] += 1; }
    kernel void half_of_it(device float* out [[buffer(0)]], constant Params& params [[buffer(1)]]) {
      out[0] = params.a.x;
    }
    kernel void memory(threadgroup float* m [[threadgroup(0)]]) { m[0] = 1; }
    [[kernel, max_total_threads_per_threadgroup(32)]] void few(device float* out [[buffer(0)]]) {}
    """
    )
    arguments = dict(grid=1, threads=64, buffers=[np.zeros(4, np.float32), bytes(8)]) | keywords
    kernel = softmetal.Library(source).kernel(arguments.pop("which", "plain"))
    with pytest.raises(softmetal.Error, match=message):
        kernel(**arguments)


FAULTS = {
    "wild_pointer": (
        "device float* p = (device float*)(ulong(out[4000]) + 16); out[i] = t == 37 ? *p : 1;",
        r"invalid access of memory at 0x10 \(threadgroup \(0, 0, 0\), thread \(37, 0, 0\)\)",
    ),
    "far_out_of_range": (
        "out[t == 3 ? 1ul << 40 : i] = 1;",
        r"invalid access of memory at 0x[0-9a-f]+ \(threadgroup \(0, 0, 0\), thread \(3, 0, 0\)\)",
    ),
    "division_by_zero": ("out[i] = 7 / int(out[t]);", "integer division by zero"),
    "endless_recursion": ("out[i] = deep(out, 1 << 30);", "stack overflow: a thread has 262144"),
    "large_frame": (
        "volatile float big[100000]; big[int(out[0]) + t] = 3; out[i] = big[t];",
        "stack overflow: a thread has 262144",
    ),
}
DEEP = """
float deep(device float* p, int n) {
  float x[64];
  for (int k = 0; k < 64; ++k) x[k] = p[k] + n;
  if (n > 0) x[n % 64] += deep(p, n - 1);
  return x[n % 64] + x[n % 63];
}"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_an_error_of_the_dispatch(fault, workers):
    import softmetal

    body, message = FAULTS[fault]
    for _ in range(3):
        with pytest.raises(softmetal.Error, match=f"^f: {message}"):
            run(body, before=DEEP, grid=4, workers=workers)
        out, _ = run("out[i] = i;", grid=4)  # the device goes on
        np.testing.assert_array_equal(out[:256], np.arange(256))


@pytest.mark.parametrize(
    "body",
    [
        "while (atomic_load_explicit((device atomic_uint*)out, memory_order_relaxed) == 0) {}",
        "for (ulong k = 0; k < 1ul << 60; ++k) out[i] = sin(out[i]) + pow(out[i], 1.5f);",
    ],
    ids=["spin", "work"],
)
def test_a_loop_without_operations_meets_the_time_limit(body):
    import softmetal

    # The second compilation has its work counted, by functions in which no thread is stopped.
    for instrumentation in ("none", "counters"):
        keywords = {"instrumentation": instrumentation}
        begin = time.monotonic()
        with pytest.raises(softmetal.Error, match=r"f: time limit of 0.1\d* s exceeded"):
            run(body, grid=3, time_limit=0.1, library_keywords=keywords)
        assert 0.1 <= time.monotonic() - begin < 10
        run("out[i] = 1;", grid=3, time_limit=10)


def run_program(text):
    """A program of Python that has a library with the kernels `fine` and `wild`."""
    import softmetal

    kernels = """
    kernel void fine(device float* out [[buffer(0)]]) { out[0] = 1; }
    kernel void wild(device float* out [[buffer(0)]]) { out[0] = *(device float*)ulong(out[0]); }
    """
    program = f"""if True:
    import ctypes, faulthandler, numpy, softmetal
    library = softmetal.Library({kernels!r})
    def run(name):
        library.kernel(name)(grid=1, threads=1, buffers=[numpy.zeros(1, "f4")])
    {text}
    """
    environment = os.environ | {"PYTHONPATH": os.path.dirname(softmetal.__file__)}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    "text",
    ["run('fine')", "faulthandler.enable(); run('fine')", "run('fine'); faulthandler.enable()"],
)
def test_other_faults_stay_what_they_are(text):
    done = run_program(f"{text}; ctypes.string_at(0)")
    assert done.returncode == -signal.SIGSEGV, done.stderr
    told = "Fatal Python error: Segmentation fault" in done.stderr
    assert told == ("faulthandler" in text)


def test_a_handler_that_comes_later_does_not_get_a_kernels_faults():
    done = run_program("run('fine'); faulthandler.enable(); run('wild')")
    assert done.returncode == 1, done.stderr
    assert "wild: invalid access of memory at 0x0" in done.stderr
