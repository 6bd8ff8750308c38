"""Work counters against closed forms: a tiled matrix product, by threads and by simdgroups."""

from __future__ import annotations

import numpy as np
import pytest

SOURCE = """#include <metal_stdlib>
using namespace metal;
constant constexpr uint kTile = 16, kDepth = 64;

kernel void threads(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                    device float* c [[buffer(2)]], constant uint& n [[buffer(3)]],
                    uint2 at [[thread_position_in_grid]],
                    uint2 in [[thread_position_in_threadgroup]]) {
  const uint width = n;
  threadgroup float left[kTile][kTile], right[kTile][kTile];
  float sum = 0;
  for (uint k = 0; k < kDepth; k += kTile) {
    left[in.y][in.x] = a[at.y * kDepth + k + in.x];
    right[in.y][in.x] = b[(k + in.y) * width + at.x];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < kTile; ++i) sum = fma(left[in.y][i], right[i][in.x], sum);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  c[at.y * width + at.x] = sum;
}

kernel void simdgroups(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                       device float* c [[buffer(2)]], constant uint& n [[buffer(3)]],
                       uint2 tile [[threadgroup_position_in_grid]]) {
  const uint width = n;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), x, y;
  for (uint k = 0; k < kDepth; k += 8) {
    simdgroup_load(x, a + tile.y * 8 * kDepth + k, kDepth);
    simdgroup_load(y, b + k * width + tile.x * 8, width);
    simdgroup_multiply_accumulate(sum, x, y, sum);
  }
  simdgroup_store(sum, c + tile.y * 8 * width + tile.x * 8, width);
}

kernel void twice(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  x[i] *= 2;
}

kernel void runs(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  for (uint k = 0; k < 16; ++k) x[16 * i + k] += 1;
}

kernel void exponentials(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  x[i] = exp(x[i]) + exp2(x[i]) + fast::exp2(x[i]);
}
"""
M, N, K = 48, 32, 64


@pytest.fixture(scope="module")
def library():
    import softmetal

    return softmetal.Library(SOURCE, instrumentation="counters")


def product(library, name, tile, threads):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    c = np.zeros((M, N), np.float32)
    width = np.array([N], np.uint32)
    counters = library.kernel(name)(
        grid=(N // tile, M // tile), threads=threads, buffers=[a, b, c, width]
    )
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-5)
    return counters


def test_product_by_threads(library):
    tile, groups = 16, (M // 16) * (N // 16)
    counters = product(library, "threads", tile, (tile, tile))
    steps = K // tile
    assert counters.multiply_accumulates == M * N * K
    # Each threadgroup reads its rows of a and columns of b once, and each thread the width.
    matrices = groups * steps * 2 * tile * tile * 4
    assert counters.device_bytes_read == matrices + M * N * 4
    assert counters.device_bytes_read_unique == 4 * (M * K + K * N + 1)
    assert counters.device_bytes_written == counters.device_bytes_written_unique == 4 * M * N
    assert counters.threadgroup_bytes_written == matrices
    assert counters.threadgroup_bytes_read == M * N * K * 2 * 4
    assert counters.threadgroup_barriers == groups * steps * 2
    assert counters.threadgroup_memory_peak == 2 * tile * tile * 4


def test_product_by_simdgroups(library):
    groups, steps = (M // 8) * (N // 8), K // 8
    counters = product(library, "simdgroups", 8, 32)
    assert counters.multiply_accumulates == M * N * K
    matrices = groups * steps * 2 * 64 * 4
    assert counters.device_bytes_read == matrices + groups * 32 * 4
    assert counters.device_bytes_read_unique == 4 * (M * K + K * N + 1)
    assert counters.device_bytes_written == counters.device_bytes_written_unique == 4 * M * N
    # Two loads and a product a step, and the store.
    assert counters.simdgroup_operations == groups * (3 * steps + 1)
    assert counters.threadgroup_barriers == counters.threadgroup_bytes_read == 0


def test_exponentials(library):
    x = np.zeros(96, np.float32)
    counters = library.kernel("exponentials")(grid=3, threads=32, buffers=[x])
    np.testing.assert_array_equal(x, 3)
    assert counters.exp2 == 3 * 96
    assert counters.device_bytes_read_unique == counters.device_bytes_written_unique == 384
    assert (counters.device_bytes_read, counters.device_bytes_written) == (3 * 384, 384)


def test_nothing_is_counted_without_instrumentation():
    import softmetal

    x = np.zeros(32, np.float32)
    counters = softmetal.Library(SOURCE).kernel("exponentials")(grid=1, threads=32, buffers=[x])
    assert (counters.exp2, counters.device_bytes_read, counters.threads) == (0, 0, 32)


def test_runs_of_numbers_that_a_processor_takes_at_once(library):
    counters = library.kernel("runs")(grid=2, threads=3, buffers=[np.ones(96, np.float32)])
    assert counters.device_bytes_read == counters.device_bytes_written == 96 * 4


def test_read_before_a_write_of_the_same_place(library):
    counters = library.kernel("twice")(grid=2, threads=3, buffers=[np.ones(6, np.float32)])
    assert counters.device_bytes_read == counters.device_bytes_written == 6 * 4


# Of one thread: expressions, and multiply-accumulates by hand.
PRODUCTS = [
    ("s += x * y;", 1),
    ("s = x * y + z;", 1),
    ("s = z - x * y;", 1),
    ("s -= x * y;", 1),
    ("s = x * y + z * s;", 1),  # to the other product
    ("s = x * y * z + s;", 1),
    ("s = fma(x, y, z) + x * y;", 2),
    ("for (int k = 0; k < n; ++k) s += x * y;", 5),
    ("if (x < 0) s += x * y;", 0),
    ("s = x < 0 ? x * y + z : z;", 0),
    ("half h = half(x); h = h * h + h; s = h;", 1),
    ("float p = x * y; s += p;", 0),  # two statements
    ("s = x * y;", 0),
    ("n = n * 3 + 4; s = n;", 0),
    ("bfloat b = bfloat(x); b = b * b + b; s = float(b);", 1),
    ("s = mix(x, y, z) + saturate(x);", 0),
    ("v += v * w;", 4),
    ("v = v * 2.0f + w;", 4),
    ("v = w - x * v;", 4),
    ("v -= v * w;", 4),
    ("v.xyz = v.xyz * w.zyx + 1;", 3),
    ("v.xy += v.zw * x;", 2),
    ("half2 h = half2(v.xy); h += h * h; s = h.x;", 2),
    ("packed_float3 p = packed_float3(v.xyz); p += w.xyz * x; s = p.x;", 3),
    ("v = v * w; v = v + w;", 0),
    ("int4 i = int4(v); i = i * i + i; s = i.x;", 0),
    ("s += dot(v, w);", 4),
    ("s = twice(v, w).x;", 4),
    ("float4x4 m(x); v = m * v + w;", 16),
    ("float2x4 m(1); s = (w * m).x;", 8),
]


@pytest.fixture(scope="module")
def products():
    import softmetal

    source = """#include <metal_stdlib>
    using namespace metal;
    template <typename T> T twice(T a, T b) { return a * b + a * b + b; }
    """
    for i, (expression, _) in enumerate(PRODUCTS):
        source += f"""
    kernel void f{i}(device float4* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {{
      float4 v = in[0], w = in[1];
      float x = v.x, y = v.y, z = v.z, s = w.x;
      int n = int(v.w);
      {expression}
      out[0] = v + w + s + n;
    }}"""
    return [softmetal.Library(source, instrumentation=kind) for kind in ("counters", "none")]


@pytest.mark.parametrize("index", range(len(PRODUCTS)), ids=lambda i: PRODUCTS[i][0])
def test_products_that_are_added(products, index):
    values = np.array([[0.5, 2, 3, 5], [1, -1, 4, 0.25]], np.float32)
    results = []
    for library in products:
        out = np.full((1, 4), np.nan, np.float32)
        counters = library.kernel(f"f{index}")(grid=1, threads=3, buffers=[out, values])
        results.append((counters, out))
    (counters, out), (_, plain) = results
    assert counters.multiply_accumulates == 3 * PRODUCTS[index][1]
    assert counters.device_bytes_written == 3 * 16
    np.testing.assert_array_equal(out, plain)  # counting changes nothing
