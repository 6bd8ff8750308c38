// Kernels: their names, arguments, attributes and constants.
#include <metal_stdlib>
using namespace metal;

template <typename T, int N>
[[kernel]] void scale_by(device T* out [[buffer(0)]], device const T* in [[buffer(1)]],
                         uint i [[thread_position_in_grid]]) {
  out[i] = in[i] * T(N);
}

template [[host_name("scale_float_3")]] [[kernel]] decltype(scale_by<float, 3>) scale_by<float, 3>;
typedef decltype(scale_by<int, 5>) scale_int_t;
template [[host_name("scale_int_5")]] kernel scale_int_t scale_by<int, 5>;
template [[host_name("scale_half_2")]] [[kernel]] void scale_by<half, 2>(
    device half* out [[buffer(0)]], device const half* in [[buffer(1)]],
    uint i [[thread_position_in_grid]]);

namespace inner {
[[kernel]] void in_namespace(device int* out [[buffer(0)]]) { out[0] = 11; }
}  // namespace inner

constant bool kNegate [[function_constant(0)]];
constant int kOffset [[function_constant(1)]];
constant uint kCount [[function_constant(2)]];
constant float kScale [[function_constant(3)]];
constant half kHalf [[function_constant(4)]];
constant short kShort [[function_constant(5)]];
constant ushort kUnsignedShort [[function_constant(6)]];
constant uchar kByte [[function_constant(7)]];
constant char kSignedByte [[function_constant(8)]];
constant float4 kVector [[function_constant(9)]];
constant long kLong [[function_constant(10)]];
constant ulong kUnsignedLong [[function_constant(11)]];
constant bfloat kBrain [[function_constant(12)]];
constant int kAbsent [[function_constant(20)]];
constant int kDerived = kOffset * 2 + (kNegate ? 1 : 0);
constant int kDefaulted = is_function_constant_defined(kAbsent) ? kAbsent : 99;
constant bool kHasExtra [[function_constant(21)]];

kernel void function_constants(device float* out [[buffer(0)]]) {
  out[0] = kNegate;
  out[1] = kOffset;
  out[2] = kCount;
  out[3] = kScale;
  out[4] = kHalf;
  out[5] = kShort;
  out[6] = kUnsignedShort;
  out[7] = kByte;
  out[8] = kSignedByte;
  out[9] = kVector.y + kVector.w;
  out[10] = kLong;
  out[11] = kUnsignedLong;
  out[12] = float(kBrain);
  out[13] = kDerived;
  out[14] = kDefaulted;
  out[15] = is_function_constant_defined(kOffset);
}

kernel void optional_argument(device float* out [[buffer(0)]],
                              device const float* extra [[buffer(1), function_constant(kHasExtra)]],
                              uint i [[thread_position_in_grid]]) {
  if (kHasExtra) {
    out[i] = extra[i];
  } else {
    out[i] = -1;
  }
}

// All attributes of a thread, in a grid of 3 dimensions.
kernel void positions(
    device uint* out [[buffer(0)]], uint3 grid [[thread_position_in_grid]],
    uint3 local [[thread_position_in_threadgroup]], uint3 group [[threadgroup_position_in_grid]],
    uint3 size [[threads_per_threadgroup]], uint3 groups [[threadgroups_per_grid]],
    uint3 threads [[threads_per_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]], uint width [[threads_per_simdgroup]],
    uint quad_lane [[thread_index_in_quadgroup]], uint quad [[quadgroup_index_in_threadgroup]],
    uint3 dispatched [[dispatch_threads_per_threadgroup]], uint3 origin [[grid_origin]],
    uint3 extent [[grid_size]]) {
  const uint values[] = {grid.x,   grid.y,       grid.z,    local.x,    local.y,   local.z,
                         group.x,  group.y,      group.z,   size.x,     size.y,    size.z,
                         groups.x, groups.y,     groups.z,  threads.x,  threads.y, threads.z,
                         index,    lane,         simdgroup, simdgroups, width,     quad_lane,
                         quad,     dispatched.x, origin.x,  extent.x};
  const uint at = (grid.z * threads.y + grid.y) * threads.x + grid.x;
  for (uint i = 0; i < 28; ++i) out[28 * at + i] = values[i];
}

kernel void narrow_positions(device ushort* out [[buffer(0)]],
                             ushort2 grid [[thread_position_in_grid]],
                             ushort lane [[thread_index_in_simdgroup]],
                             ushort2 size [[threads_per_grid]]) {
  out[grid.y * size.x + grid.x] = grid.x * 100 + grid.y * 10 + lane;
}

enum Slot { kSlotOut, kSlotIn = 3 };

kernel void index_expressions(device int* out [[buffer(kSlotOut)]],
                              constant int (&weights)[3] [[buffer(kSlotIn + 1)]],
                              constant int& bias [[buffer(kSlotIn)]]) {
  out[0] = weights[0] + weights[1] * 10 + weights[2] * 100 + bias;
}

kernel void implicit_indices(device int* out, constant int& a, constant int& b) { out[0] = a - b; }
