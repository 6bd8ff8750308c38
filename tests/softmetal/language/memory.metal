// Address spaces, threadgroup memory, barriers, atomics.
#include <metal_stdlib>
using namespace metal;

constant float kTable[4] = {1, 2, 4, 8};
constant constexpr int kRows = 2;
static constant float kGrid[kRows][3] = {{1, 2, 3}, {4, 5, 6}};

struct Scale {
  float factor;
  int offset;
};

static float from_device(device const float* p) { return p[1]; }
static float from_constant(constant float* p) { return p[1]; }
static float from_threadgroup(threadgroup const float* p) { return p[1]; }
static void through(thread float& x) { x *= 2; }

struct Counter {
  int value;
  void add(int n) thread { value += n; }
  int read() const thread { return value; }
};

kernel void address_spaces(device float* out [[buffer(0)]], device const float* in [[buffer(1)]],
                           constant Scale& scale [[buffer(2)]],
                           constant float* more [[buffer(3)]]) {
  threadgroup float shared[2];
  shared[1] = 5;
  float local = 3;
  through(local);
  thread float* pointer = &local;
  *pointer += 1;
  out[0] = from_device(in) * scale.factor + scale.offset;
  out[1] = from_constant(more) + from_constant(kTable);
  out[2] = from_threadgroup(shared);
  out[3] = local;
  out[4] = kGrid[1][2] + kTable[3];
  Counter counter{1};
  counter.add(4);
  out[5] = counter.read();
  device const packed_float2* pairs = reinterpret_cast<device const packed_float2*>(in);
  out[6] = pairs[1].y;
}

kernel void threadgroup_static(device uint* out [[buffer(0)]], device const uint* in [[buffer(1)]],
                               uint i [[thread_index_in_threadgroup]],
                               uint group [[threadgroup_position_in_grid]],
                               uint size [[threads_per_threadgroup]]) {
  threadgroup uint values[64];
  threadgroup uint2 total, pairs[2][2];
  values[i] = in[group * size + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) {
    uint sum = 0;
    for (uint k = 0; k < size; ++k) sum += values[k];
    total = uint2(sum, group);
    pairs[1][0] = 7;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[group * size + i] = total.x * 10 + total.y + pairs[1][0].x;
}

kernel void threadgroup_dynamic(device float* out [[buffer(0)]],
                                device const float* in [[buffer(1)]],
                                threadgroup float* first [[threadgroup(0)]],
                                threadgroup float4* second [[threadgroup(1)]],
                                uint i [[thread_index_in_threadgroup]],
                                uint size [[threads_per_threadgroup]]) {
  first[i] = in[i];
  second[i] = float4(in[i], 1, 2, 3);
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  out[i] = first[size - 1 - i] + second[(i + 1) % size].x;
}

// A sum in log2 steps: wrong wherever a barrier does not hold every thread.
kernel void reduction(device float* out [[buffer(0)]], device const float* in [[buffer(1)]],
                      uint i [[thread_index_in_threadgroup]],
                      uint group [[threadgroup_position_in_grid]],
                      uint size [[threads_per_threadgroup]]) {
  threadgroup float partial[256];
  partial[i] = in[group * size + i];
  for (uint width = size / 2; width > 0; width /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i < width) partial[i] += partial[i + width];
  }
  if (i == 0) out[group] = partial[0];
}

kernel void simdgroup_barriers(device uint* out [[buffer(0)]],
                               uint i [[thread_index_in_threadgroup]],
                               uint lane [[thread_index_in_simdgroup]]) {
  threadgroup uint values[64];
  values[i] = i * i;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = values[i - lane + (lane + 1) % 32];
}

kernel void atomics_device(device atomic_int* counters [[buffer(0)]],
                           device atomic_uint* bits [[buffer(1)]],
                           device atomic_float* sums [[buffer(2)]],
                           uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(&counters[0], 1, memory_order_relaxed);
  atomic_fetch_sub_explicit(&counters[1], int(i), memory_order_relaxed);
  atomic_fetch_max_explicit(&counters[2], int(i), memory_order_relaxed);
  atomic_fetch_min_explicit(&counters[3], -int(i), memory_order_relaxed);
  atomic_fetch_or_explicit(&bits[0], 1u << (i % 32), memory_order_relaxed);
  atomic_fetch_and_explicit(&bits[1], ~(1u << (i % 8)), memory_order_relaxed);
  atomic_fetch_xor_explicit(&bits[2], i, memory_order_relaxed);
  atomic_fetch_add_explicit(&sums[0], 0.5f, memory_order_relaxed);
  if (i == 5) {
    atomic_store_explicit(&bits[3], 77, memory_order_relaxed);
    atomic_store_explicit(&bits[4], atomic_exchange_explicit(&bits[5], 9u, memory_order_relaxed),
                          memory_order_relaxed);
  }
}

kernel void atomics_compare_exchange(device atomic_uint* values [[buffer(0)]],
                                     uint i [[thread_position_in_grid]]) {
  uint seen = atomic_load_explicit(&values[0], memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(&values[0], &seen, seen * 1u + i,
                                                memory_order_relaxed, memory_order_relaxed)) {
  }
}

// An atomic maximum of floats through their bits, as programs write it.
kernel void atomics_float_max(device atomic_uint* value [[buffer(0)]],
                              device const float* in [[buffer(1)]],
                              uint i [[thread_position_in_grid]]) {
  atomic_fetch_max_explicit(value, as_type<uint>(in[i]), memory_order_relaxed);
}

kernel void atomics_threadgroup(device int* out [[buffer(0)]],
                                uint i [[thread_index_in_threadgroup]],
                                uint group [[threadgroup_position_in_grid]]) {
  threadgroup atomic_int sum;
  threadgroup atomic<float> real;
  if (i == 0) {
    atomic_store_explicit(&sum, 0, memory_order_relaxed);
    atomic_store_explicit(&real, 0.0f, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  atomic_fetch_add_explicit(&sum, int(i), memory_order_relaxed);
  atomic_fetch_add_explicit(&real, 0.25f, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) {
    out[2 * group] = atomic_load_explicit(&sum, memory_order_relaxed);
    out[2 * group + 1] = int(atomic_load_explicit(&real, memory_order_relaxed));
  }
}

kernel void atomics_ulong(device atomic_ulong* value [[buffer(0)]],
                          uint i [[thread_position_in_grid]]) {
  atomic_max_explicit(value, (ulong(i) << 33) + 1, memory_order_relaxed);
}
