// 8x8 matrices over one simdgroup.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

template <typename T>
[[kernel]] void load_and_store(device T* out [[buffer(0)]], device const T* in [[buffer(1)]]) {
  simdgroup_matrix<T, 8, 8> a, b, c, d;
  simdgroup_load(a, in, 24);
  simdgroup_store(a, out, 8);
  simdgroup_load(b, in, 24, ulong2(8, 4));
  simdgroup_store(b, out + 64, 8);
  simdgroup_load(c, in, 24, ulong2(0, 0), true);
  simdgroup_store(c, out + 128, 8);
  simdgroup_load(d, in + 2, 24);
  simdgroup_store(d, out + 192, 8, ulong2(0, 0), true);
  simdgroup_store(d, out + 256, 16, ulong2(8, 0));
}
template [[host_name("load_and_store_float")]] [[kernel]]
decltype(load_and_store<float>) load_and_store<float>;
template [[host_name("load_and_store_half")]] [[kernel]]
decltype(load_and_store<half>) load_and_store<half>;
template [[host_name("load_and_store_bfloat")]] [[kernel]]
decltype(load_and_store<bfloat>) load_and_store<bfloat>;

kernel void fill(device float* out [[buffer(0)]]) {
  simdgroup_float8x8 filled = make_filled_simdgroup_matrix<float, 8, 8>(3.5f);
  simdgroup_store(filled, out, 8);
  simdgroup_float8x8 diagonal(2);
  simdgroup_store(diagonal, out + 64, 8);
  simdgroup_float8x8 short_form = make_filled_simdgroup_matrix<float, 8>(1.f);
  simdgroup_store(short_form, out + 128, 8);
}

kernel void multiply(device float* out [[buffer(0)]], device const float* in [[buffer(1)]]) {
  simdgroup_float8x8 a, b, c, d;
  simdgroup_load(a, in, 8);
  simdgroup_load(b, in + 64, 8);
  simdgroup_load(c, in + 128, 8);
  simdgroup_multiply(d, a, b);
  simdgroup_store(d, out, 8);
  simdgroup_multiply_accumulate(d, a, b, c);
  simdgroup_store(d, out + 64, 8);
  simdgroup_multiply_accumulate(c, d, b, c);  // a product as a factor, in place
  simdgroup_store(c, out + 128, 8);
  simdgroup_store(a * b, out + 192, 8);
  simdgroup_multiply(a, a, simdgroup_float8x8(3));
  simdgroup_store(a, out + 256, 8);
}

template <typename Factor, typename Sum>
[[kernel]] void multiply_mixed(device Sum* out [[buffer(0)]],
                               device const Factor* in [[buffer(1)]]) {
  simdgroup_matrix<Factor, 8, 8> a, b;
  simdgroup_matrix<Sum, 8, 8> sum(0);
  for (int k = 0; k < 2; ++k) {
    simdgroup_load(a, in + 8 * k, 16);
    simdgroup_load(b, in + 128 + 64 * k, 8);
    simdgroup_multiply_accumulate(sum, a, b, sum);
  }
  simdgroup_store(sum, out, 8);
}
template [[host_name("multiply_half_float")]] [[kernel]]
decltype(multiply_mixed<half, float>) multiply_mixed<half, float>;
template [[host_name("multiply_bfloat_float")]] [[kernel]]
decltype(multiply_mixed<bfloat, float>) multiply_mixed<bfloat, float>;
template [[host_name("multiply_half_half")]] [[kernel]]
decltype(multiply_mixed<half, half>) multiply_mixed<half, half>;

// Elements reached in place, before and after the matrix is a factor.
kernel void elements(device float* out [[buffer(0)]], device const float* in [[buffer(1)]],
                     ushort lane [[thread_index_in_simdgroup]]) {
  simdgroup_float8x8 a, b, d;
  simdgroup_load(a, in, 8);
  simdgroup_load(b, in + 64, 8);
  thread auto& held = a.thread_elements();
  held *= 2;
  simdgroup_multiply(d, a, b);
  simdgroup_store(d, out, 8);
  held[0] += 1;  // every left element of the pairs
  simdgroup_multiply(d, a, b);
  simdgroup_store(d, out + 64, 8);
  out[128 + 2 * lane] = a.thread_elements()[0];
  out[128 + 2 * lane + 1] = a.thread_elements()[1];
  simdgroup_float8x8 copy = a;
  copy.thread_elements() = float2(lane);
  simdgroup_multiply(d, copy, simdgroup_float8x8(1));
  simdgroup_store(d, out + 192, 8);
  simdgroup_store(a, out + 256, 8);
}

// Load, product and store in place, with no barrier: each lane's elements are its own.
kernel void in_place(device float* inout [[buffer(0)]], device const float* in [[buffer(1)]]) {
  threadgroup float tile[64];
  simdgroup_float8x8 a, b, c;
  simdgroup_load(a, in, 8);
  simdgroup_load(b, inout, 8);
  simdgroup_multiply(c, a, b);
  simdgroup_store(c, inout, 8);
  simdgroup_load(b, inout, 8);
  simdgroup_multiply(c, a, b);
  simdgroup_store(c, tile, 8);
  simdgroup_load(b, tile, 8);
  simdgroup_multiply(b, a, b);
  simdgroup_store(b, inout, 8);
}
