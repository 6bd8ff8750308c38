"""Kernels under clang's sanitizers: planted bugs are reported at their line, sound ones are not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
SIGNATURE = (
    "kernel void f(device float* out [[buffer(0)]], device const float* in [[buffer(1)]], "
    "uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]], "
    "uint lane [[thread_index_in_simdgroup]]) {"
)
SOUND = """threadgroup float shared[64];
shared[t] = in[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
float sum = simd_sum(shared[63 - t]);
threadgroup_barrier(mem_flags::mem_threadgroup);
shared[t] = sum;
simdgroup_barrier(mem_flags::mem_threadgroup);
out[i] = shared[t ^ 1];"""

# Of each sanitizer: the body, and what is said. The body begins at line 4.
PLANTED = {
    "address": {
        "read_past_a_buffer": ("out[i] = in[i + 1];", "heap-buffer-overflow", 4),
        "write_past_a_buffer": ("out[i] = 1;\nout[i + 1] = 2;", "heap-buffer-overflow", 5),
        "past_a_threadgroup_array": (
            "threadgroup float shared[63], other[64]; other[t] = 1;\nshared[t] = 1;",
            "use-after-poison",
            5,
        ),
    },
    "thread": {
        "no_barrier": (
            "threadgroup float shared[64]; shared[t] = 1;\nout[i] = shared[63 - t];",
            "data race",
            5,
        ),
        "barrier_without_memory": (
            "threadgroup float shared[64]; shared[t] = 1; "
            "threadgroup_barrier(mem_flags::mem_none);\n"
            "out[i] = shared[63 - t];",
            "data race",
            5,
        ),
        "simd_sum_is_no_barrier": (
            "threadgroup float shared[64]; shared[t] = 1; simd_sum(1.0f);\nout[i] = shared[t ^ 1];",
            "data race",
            5,
        ),
        # What a processor does at once is several accesses all the same.
        "eight_numbers_in_a_row": (
            "threadgroup float shared[64];\n"
            "for (uint k = 0; k < 8; ++k) shared[t / 16 * 8 + k] = float(i + k);\n"
            "threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = shared[t];",
            "data race",
            5,
        ),
        "two_threadgroups": ("out[t] += 1;", "data race", 4),
    },
    "undefined": {
        "overflow": ("int big = 2147483647 - int(i);\nout[i] = float(big + 64);", "overflow", 5),
        "shift": ("out[i] = float(1 << (int(i) + 1));", "shift", 4),
    },
}


def run(sanitizer: str, body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Two threadgroups of 64 threads, in a process of its own."""
    import softmetal

    program = f"""
    import numpy as np, softmetal
    kernel = softmetal.Library({HEAD + SIGNATURE + chr(10) + body + chr(10) + "}"!r}).kernel("f")
    out, numbers = np.zeros(128, np.float32), np.ones(128, np.float32)
    kernel(grid=2, threads=64, workers=1, buffers=[out, numbers])
    print("finished")
    """
    environment = softmetal.sanitizer_environment(sanitizer) | variables
    environment["PYTHONPATH"] = softmetal.__file__.rpartition("/")[0]
    # numpy arrays from malloc, so that their ends are known.
    environment["PYTHONMALLOC"] = "malloc"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("sanitizer", PLANTED)
def test_a_sound_kernel_is_silent(sanitizer):
    finished = run(sanitizer, SOUND)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "finished\n"
    assert "WARNING" not in finished.stderr
    assert "runtime error" not in finished.stderr


@pytest.mark.parametrize(
    ("sanitizer", "bug"), [(each, bug) for each, bugs in PLANTED.items() for bug in bugs]
)
def test_a_planted_bug_is_reported_at_its_line(sanitizer, bug):
    body, kind, line = PLANTED[sanitizer][bug]
    finished = run(sanitizer, body)
    assert kind in finished.stderr, finished.stderr[-2000:]
    assert f"program_source:{line}" in finished.stderr


@pytest.mark.parametrize(
    ("sanitizer", "bug"), [("address", "past_a_threadgroup_array"), ("undefined", "overflow")]
)
def test_flags_add_a_sanitizer_to_another(sanitizer, bug):
    """Both report, as tests/metal/shaders/test_sanitizers.py runs every kernel."""
    body, kind, line = PLANTED[sanitizer][bug]
    finished = run("address", body, SOFTMETAL_CLANG_FLAGS="-O0 -fsanitize=undefined")
    assert kind in finished.stderr, finished.stderr[-2000:]
    assert f"program_source:{line}" in finished.stderr


def test_an_unknown_sanitizer_is_refused():
    import softmetal

    with pytest.raises(softmetal.Error, match='sanitizer is "memory"; allowed: address, thread'):
        softmetal.sanitizer_environment("memory")
