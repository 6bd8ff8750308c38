// C = A B, in tiles of 32 x 32 by threadgroups of 4 simdgroups. Each simdgroup makes 16 x 16 of the
// tile with 8 x 8 simdgroup matrices; A and B go through threadgroup memory, 32 columns at a time,
// with zeros past the edges, so that any size will do.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

constant constexpr uint kTile = 32, kThreads = 128;

struct Shape {
  uint m, n, k;
};

kernel void matmul(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
                   device float* c [[buffer(2)]], constant Shape& shape [[buffer(3)]],
                   uint2 tile [[threadgroup_position_in_grid]],
                   uint thread_index [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float left[kTile * kTile];
  threadgroup float right[kTile * kTile];
  const uint row = tile.y * kTile, column = tile.x * kTile;
  const uint simdgroup_row = simdgroup / 2 * 16, simdgroup_column = simdgroup % 2 * 16;

  simdgroup_float8x8 sums[2][2];
  for (uint i = 0; i < 2; ++i) {
    for (uint j = 0; j < 2; ++j) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (uint start = 0; start < shape.k; start += kTile) {
    for (uint i = thread_index; i < kTile * kTile; i += kThreads) {
      const uint y = i / kTile, x = i % kTile;
      const bool in_a = row + y < shape.m && start + x < shape.k;
      const bool in_b = start + y < shape.k && column + x < shape.n;
      left[i] = in_a ? a[(row + y) * shape.k + start + x] : 0.0f;
      right[i] = in_b ? b[(start + y) * shape.n + column + x] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < kTile; k += 8) {
      simdgroup_float8x8 x[2], y[2];
      for (uint i = 0; i < 2; ++i) {
        simdgroup_load(x[i], left + (simdgroup_row + 8 * i) * kTile + k, kTile);
        simdgroup_load(y[i], right + k * kTile + simdgroup_column + 8 * i, kTile);
      }
      for (uint i = 0; i < 2; ++i) {
        for (uint j = 0; j < 2; ++j) {
          simdgroup_multiply_accumulate(sums[i][j], x[i], y[j], sums[i][j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Through threadgroup memory again: only what is inside goes out.
  for (uint i = 0; i < 2; ++i) {
    for (uint j = 0; j < 2; ++j) {
      simdgroup_store(sums[i][j], left + (simdgroup_row + 8 * i) * kTile + simdgroup_column + 8 * j,
                      kTile);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < kTile * kTile; i += kThreads) {
    const uint y = row + i / kTile, x = column + i % kTile;
    if (y < shape.m && x < shape.n) c[y * shape.n + x] = left[i];
  }
}
