// Functions of numbers and of vectors.
#include <metal_stdlib>
using namespace metal;

// Every function of one argument at each x; the order is that of the table in the test.
kernel void math_1(device float* out [[buffer(0)]], device const float* x [[buffer(1)]],
                   constant uint& count [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const float v = x[i];
  const float results[] = {
      acos(v),      acosh(v + 2), asin(v),    asinh(v),     atan(v),     atanh(v), ceil(v),
      cos(v),       cosh(v),      cospi(v),   exp(v),       exp10(v),    exp2(v),  fabs(v),
      floor(v),     fract(v),     log(v + 2), log10(v + 2), log2(v + 2), rint(v),  round(v),
      rsqrt(v + 2), sin(v),       sinh(v),    sinpi(v),     sqrt(v + 2), tan(v),   tanh(v),
      tanpi(v),     trunc(v),     abs(v),     saturate(v),  sign(v)};
  for (uint f = 0; f < count; ++f) out[i * count + f] = results[f];
}

kernel void math_1_fast(device float* out [[buffer(0)]], device const float* x [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {
  out[6 * i] = fast::exp2(x[i]);
  out[6 * i + 1] = precise::exp(x[i]);
  out[6 * i + 2] = metal::fast::sqrt(x[i] + 2);
  out[6 * i + 3] = metal::precise::tanh(x[i]);
  out[6 * i + 4] = fast::max(x[i], 0.0f);
  out[6 * i + 5] = precise::divide(1.0f, x[i] + 2);
}

kernel void math_half(device half* out [[buffer(0)]], device const half* x [[buffer(1)]],
                      uint i [[thread_position_in_grid]]) {
  out[5 * i] = exp(x[i]);
  out[5 * i + 1] = tanh(x[i]);
  out[5 * i + 2] = fma(x[i], x[i], 1.0h);
  out[5 * i + 3] = max(x[i], 0.0h);
  out[5 * i + 4] = half4(cos(half4(x[i]))).w;
}

kernel void math_bfloat(device float* out [[buffer(0)]], device const bfloat* x [[buffer(1)]],
                        uint i [[thread_position_in_grid]]) {
  out[3 * i] = exp(float(x[i]));
  out[3 * i + 1] = exp(x[i]);
  out[3 * i + 2] = float(max(x[i], bfloat(0)));
}

kernel void math_2(device float* out [[buffer(0)]], device const float* x [[buffer(1)]],
                   device const float* y [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const float a = x[i], b = y[i];
  const float results[] = {atan2(a, b),     copysign(a, b), divide(a, b),    fdim(a, b),
                           fmax(a, b),      fmin(a, b),     fmod(a, b),      pow(abs(a), b),
                           powr(abs(a), b), step(a, b),     nextafter(a, b), max(a, b),
                           min(a, b)};
  for (uint f = 0; f < 13; ++f) out[i * 13 + f] = results[f];
}

kernel void math_3(device float* out [[buffer(0)]], device const float3* in [[buffer(1)]],
                   uint i [[thread_position_in_grid]]) {
  const float a = in[i].x, b = in[i].y, c = in[i].z;
  const float results[] = {
      fma(a, b, c),   clamp(a, -1.0f, 1.0f), mix(a, b, c),     smoothstep(-1.0f, 2.0f, a),
      min3(a, b, c),  max3(a, b, c),         median3(a, b, c), fmin3(a, b, c),
      fmax3(a, b, c), fmedian3(a, b, c)};
  for (uint f = 0; f < 10; ++f) out[i * 10 + f] = results[f];
}

kernel void math_vector(device float4* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {
  const float4 a = in[0], b = in[1];
  out[0] = exp2(a);
  out[1] = max(a, 0.0f);
  out[2] = clamp(a, -0.5f, b);
  out[3] = mix(a, b, 0.25f);
  out[4] = pow(abs(a), 2);
  out[5] = float4(min(a.xy, b.yx), fma(a.zw, b.zw, 1.0f));
  out[6] = select(a, b, a < b);
  out[7] = step(0.0f, a);
  out[8] = saturate(a);
  out[9] = float4(abs(int4(a * 4)));
  out[10] = float4(clamp(int4(b * 4), -1, 1));
}

kernel void math_parts(device float* out [[buffer(0)]], device int* exponents [[buffer(1)]],
                       device const float* x [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  int exponent;
  out[6 * i] = frexp(x[i], exponent);
  exponents[2 * i] = exponent;
  exponents[2 * i + 1] = ilogb(x[i]);
  out[6 * i + 1] = ldexp(x[i], 3);
  float whole, cosine;
  out[6 * i + 2] = modf(x[i], whole);
  out[6 * i + 3] = whole;
  out[6 * i + 4] = sincos(x[i], cosine);
  out[6 * i + 5] = cosine;
}

kernel void special_values(device float* out [[buffer(0)]], device const float* in [[buffer(1)]]) {
  const float nan = in[0], inf = in[1];
  out[0] = max(nan, 1.0f);
  out[1] = fmin(1.0f, nan);
  out[2] = saturate(nan);
  out[3] = exp(-inf);
  out[4] = log(0.0f);
  out[5] = sqrt(-1.0f);
  out[6] = clamp(inf, 0.0f, 2.0f);
  out[7] = sign(nan);
  out[8] = exp2(-150.0f);
  out[9] = nan == nan;
}

template <typename T>
static void integers(device T* out, T a, T b, T c) {
  out[0] = absdiff(a, b);
  out[1] = addsat(a, b);
  out[2] = subsat(a, b);
  out[3] = hadd(a, b);
  out[4] = rhadd(a, b);
  out[5] = mulhi(a, b);
  out[6] = madhi(a, b, c);
  out[7] = madsat(a, b, c);
  out[8] = rotate(a, T(5));
  out[9] = popcount(a);
  out[10] = clz(b);
  out[11] = ctz(a);
  out[12] = reverse_bits(a);
  out[13] = extract_bits(a, 2, 4);
  out[14] = insert_bits(a, b, 1, 3);
  out[15] = abs(b);
  out[16] = min(a, b);
  out[17] = clamp(c, a < b ? a : b, a < b ? b : a);
  out[18] = median3(a, b, c);
}
#define INTEGERS(T)                                                                      \
  kernel void integer_##T(device T* out [[buffer(0)]], device const T* in [[buffer(1)]], \
                          uint i [[thread_position_in_grid]]) {                          \
    integers<T>(out + 19 * i, in[3 * i], in[3 * i + 1], in[3 * i + 2]);                  \
  }
INTEGERS(char)
INTEGERS(uchar)
INTEGERS(short)
INTEGERS(ushort)
INTEGERS(int)
INTEGERS(uint)
INTEGERS(long)
INTEGERS(ulong)

kernel void integer_vectors(device int4* out [[buffer(0)]], device const int4* in [[buffer(1)]]) {
  out[0] = popcount(in[0]);
  out[1] = addsat(in[0], in[1]);
  out[2] = int4(absdiff(in[0], in[1]));
  out[3] = max(in[0], in[1]);
  out[4] = extract_bits(in[0], 1, 3);
  out[5] = int4(mul24(in[0].x, in[1].x), mad24(3, 4, 5), int(mul24(0x1000001u, 3u)), 0);
}

kernel void relational(device int* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {
  const float4 v = in[0];  // nan, inf, 1e-40, -2
  out[0] = isnan(v.x) && !isnan(v.y);
  out[1] = isinf(v.y) && !isinf(v.z);
  out[2] = isfinite(v.w) && !isfinite(v.x);
  out[3] = isnormal(v.w) && !isnormal(v.z);
  out[4] = signbit(v.w) && !signbit(v.y);
  out[5] = isunordered(v.x, v.w) && isordered(v.y, v.w);
  out[6] = any(isnan(v)) && !all(isnan(v));
  out[7] = all(isfinite(v.zw));
  out[8] = select(1, 2, v.w < 0);
  out[9] = select(int2(1, 2), int2(3, 4), bool2(true, false)).x * 10 + select(1.0f, 5.0f, false);
  out[10] = int4(isnan(v)).x * 8 + int4(isinf(v)).y;
}

kernel void geometric(device float4* out [[buffer(0)]], device const float3* in [[buffer(1)]]) {
  const float3 a = in[0], b = in[1];
  out[0] = float4(dot(a, b), length(a), distance(a, b), length_squared(b));
  out[1] = float4(cross(a, b), distance_squared(a, b));
  out[2] = float4(normalize(a), dot(a.xy, b.xy));
  out[3] = float4(reflect(a, normalize(b)), fast::length(b));
  out[4] = float4(refract(normalize(a), normalize(b), 0.5f), 0);
  out[5] = float4(faceforward(a, b, b), float(dot(half3(a), half3(b))));
}

kernel void packing(device uint* out [[buffer(0)]], device float4* unpacked [[buffer(1)]],
                    device const float4* in [[buffer(2)]]) {
  const float4 v = in[0];
  out[0] = pack_float_to_unorm4x8(v);
  out[1] = pack_float_to_snorm4x8(v);
  out[2] = pack_float_to_unorm2x16(v.xy);
  out[3] = pack_float_to_snorm2x16(v.xy);
  out[4] = pack_float_to_unorm10a2(v);
  out[5] = pack_half_to_unorm4x8(half4(v));
  out[6] = pack_float_to_unorm565(v.xyz);
  unpacked[0] = unpack_unorm4x8_to_float(out[0]);
  unpacked[1] = unpack_snorm4x8_to_float(out[1]);
  unpacked[2] = float4(unpack_unorm2x16_to_float(out[2]), unpack_snorm2x16_to_float(out[3]));
  unpacked[3] = unpack_unorm10a2_to_float(out[4]);
  unpacked[4] = float4(unpack_unorm4x8_to_half(out[5]));
}
