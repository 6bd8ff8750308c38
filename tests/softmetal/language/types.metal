// Types: what they hold, how they are made, how they convert.
#include <metal_stdlib>
using namespace metal;

kernel void sizes(device uint* out [[buffer(0)]]) {
  const uint sizes[] = {
      sizeof(bool),          sizeof(char),          sizeof(uchar),        sizeof(short),
      sizeof(ushort),        sizeof(int),           sizeof(uint),         sizeof(long),
      sizeof(ulong),         sizeof(size_t),        sizeof(half),         sizeof(bfloat),
      sizeof(float),         sizeof(float2),        sizeof(float3),       sizeof(float4),
      sizeof(half2),         sizeof(half3),         sizeof(half4),        sizeof(char3),
      sizeof(bool2),         sizeof(bool4),         sizeof(ulong4),       sizeof(bfloat4),
      sizeof(packed_float2), sizeof(packed_float3), sizeof(packed_half3), sizeof(packed_char3),
      sizeof(float2x2),      sizeof(float3x3),      sizeof(float4x4),     sizeof(half2x3),
      alignof(float3),       alignof(float4),       alignof(half4),       alignof(packed_float3),
      alignof(char2),        alignof(half3x2)};
  for (uint i = 0; i < sizeof(sizes) / sizeof(uint); ++i) out[i] = sizes[i];
}

kernel void construction(device float4* out [[buffer(0)]], device const float* in [[buffer(1)]]) {
  const float a = in[0], b = in[1], c = in[2], d = in[3];
  const float2 ab(a, b);
  const float3 abc(a, b, c);
  out[0] = float4(a);
  out[1] = float4(a, b, c, d);
  out[2] = float4(ab, c, d);
  out[3] = float4(a, ab, d);
  out[4] = float4(a, b, ab);
  out[5] = float4(ab, ab);
  out[6] = float4(abc, d);
  out[7] = float4(d, abc);
  out[8] = float4(float3(ab, c), d);
  out[9] = float4(float3(a, ab), d);
  out[10] = {a, b, c, d};
  out[11] = 2;
  out[12] = float4();
  float4 e{d, c, b, a};
  out[13] = e;
  out[14] = vec<float, 4>(int(a), uint(b), half(c), 1);
}

kernel void operators(device float4* out [[buffer(0)]], device int4* bits [[buffer(1)]],
                      device const float4* in [[buffer(2)]]) {
  const float4 a = in[0], b = in[1];
  out[0] = a + b;
  out[1] = a - b;
  out[2] = a * b;
  out[3] = a / b;
  out[4] = -a;
  out[5] = a * 2;
  out[6] = 2.0f - a;
  out[7] = a;
  out[7] += b;
  out[7] *= 0.5;
  float4 c = a;
  c[2] = 7;
  c.w++;
  ++c;
  out[8] = c;
  const int4 i(a), j(b);
  bits[0] = i & j;
  bits[1] = i | j;
  bits[2] = i ^ 5;
  bits[3] = ~i;
  bits[4] = i << 2;
  bits[5] = j >> 1;
  bits[6] = i % 3;
  bits[7] = int4(a < b);
  bits[8] = int4(a == a.xxzz);
  bits[9] = int4((a < b) && !(a == b));
}

kernel void swizzle_read(device float4* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {
  const float4 v = in[0];
  out[0] = v.wzyx;
  out[1] = v.xxyy;
  out[2] = v.bgra;
  out[3] = float4(v.zx, v.yw);
  out[4] = float4(v.xyz, v.a);
  out[5] = float4(v.yyy.zyx, v.rg.y);
  out[6] = v.xy.xyxy;
  out[7] = float4(v.xyz.zzy, float2(v.wz).y);
}

kernel void swizzle_write(device float4* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {
  float4 v = in[0];
  v.xy = v.yx;
  out[0] = v;
  v.wzy = float3(1, 2, 3);
  out[1] = v;
  v.xz += v.yw;
  out[2] = v;
  v.rgba = v.abgr;
  out[3] = v;
  v.xyz *= 2;
  out[4] = v;
  v.a = v.g = 9;
  out[5] = v;
  out[6] = 0;
  out[6].yz = v.xw;
}

template <typename T, int N>
static T sum_of(vec<T, N> v) {
  T sum = 0;
  for (int i = 0; i < N; ++i) sum += v[i];
  return sum;
}

kernel void vector_templates(device float* out [[buffer(0)]],
                             device const float4* in [[buffer(1)]]) {
  out[0] = sum_of(in[0]);
  out[1] = sum_of(in[0].xy);
  out[2] = sum_of(in[0].zyx);
  out[3] = sum_of(int3(in[0].yzw));
}

struct Particle {
  packed_float3 position;
  float mass;
  packed_half2 spin;
};

kernel void packed(device float* out [[buffer(0)]], device packed_float3* moved [[buffer(1)]],
                   device const Particle* in [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  const float3 p = in[i].position;
  const float3 scaled = in[i].position * in[i].mass + 1;
  out[4 * i] = dot(p, scaled);
  out[4 * i + 1] = in[i].position.y;
  out[4 * i + 2] = in[i].position[2];
  out[4 * i + 3] = float(in[i].spin.x + half2(in[i].spin).y);
  moved[i] = scaled.zyx;
  moved[i].x += 1;
  moved[i] *= 2;
}

kernel void conversions(device int* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {
  const float4 v = in[0];
  int4 i = int4(v);
  out[0] = i.x;
  out[1] = i.y;
  out[2] = uchar4(int4(300, 256, 255, -1)).x;
  out[3] = uchar4(int4(300, 256, 255, -1)).w;
  out[4] = char(200);
  out[5] = short(int(v.z) * 1000);
  out[6] = bool4(v).x;
  out[7] = bool4(v).w;
  out[8] = int(half(v.z));
  out[9] = static_cast<int>(float4(bool4(true, false, true, true)).z);
  out[10] = (int)v.y;
  out[11] = int3(half3(v.xyz)).z;
  out[12] = int(float(ulong(1) << 40) / float(1 << 30));
  out[13] = int(bfloat(v.z));
}

kernel void bits_as_type(device uint* out [[buffer(0)]], device const float4* in [[buffer(1)]]) {
  out[0] = as_type<uint>(in[0].x);
  const uint4 all = as_type<uint4>(in[0]);
  out[1] = all.y;
  out[2] = as_type<uint>(half2(in[0].xy));
  out[3] = as_type<uint>(uchar4(1, 2, 3, 4));
  const uint2 halves = as_type<uint2>(half4(in[0]));
  out[4] = halves.y;
  out[5] = as_type<ushort>(bfloat(in[0].z));
  out[6] = as_type<uint>(as_type<float>(0x7fc00001u));
  out[7] = uint(as_type<ulong>(uint2(5, 6)) >> 32);
}

kernel void half_arithmetic(device half* out [[buffer(0)]], device const half* in [[buffer(1)]]) {
  const half a = in[0], b = in[1], c = in[2];
  out[0] = a + b;
  out[1] = a * b;
  out[2] = a / b;
  out[3] = a * b + c;  // rounds twice
  out[4] = 1.5h;
  out[5] = half(1) / 3;
  out[6] = HALF_MAX;
  out[7] = HALF_MAX * 2.0h;
  out[8] = -c;
  half4 v(a, b, c, 1.0h);
  v += v.yxwz;
  out[9] = v.x;
  out[10] = v.z;
}

kernel void bfloat_arithmetic(device bfloat* out [[buffer(0)]], device float* wide [[buffer(1)]],
                              device const bfloat* in [[buffer(2)]]) {
  const bfloat a = in[0], b = in[1], c = in[2];
  out[0] = a + b;
  out[1] = a * b;
  out[2] = a / b;
  out[3] = a * b + c;  // rounds twice
  out[4] = bfloat(1.0f / 3);
  out[5] = -a;
  bfloat4 v(a, b, c, a);
  v *= v.wzyx;
  out[6] = v.x;
  out[7] = v.y;
  wide[0] = a + 0.001f;
  wide[1] = float(a) * float(b);
}

kernel void matrices(device float4* out [[buffer(0)]], device const float4x4* in [[buffer(1)]],
                     device const float4* vector [[buffer(2)]]) {
  const float4x4 a = in[0], b = in[1];
  const float4x4 product = a * b;
  for (int c = 0; c < 4; ++c) out[c] = product[c];
  out[4] = a * vector[0];
  out[5] = vector[0] * a;
  const float4x4 flipped = transpose(a);
  for (int c = 0; c < 4; ++c) out[6 + c] = flipped[c];
  out[10] = float4(determinant(a), determinant(float3x3(a[0].xyz, a[1].xyz, a[2].xyz)),
                   determinant(float2x2(a[0].xy, a[1].xy)), a[2][1]);
  float4x4 scaled = (a + b * 2 - a) * 0.5f;
  out[11] = scaled[3];
  const float4x4 diagonal(3);
  out[12] = diagonal[1];
  const float2x3 rectangle(float3(1, 2, 3), float3(4, 5, 6));
  out[13] = float4(rectangle * float2(1, 2), rectangle[1].z);
  const half4x4 narrow = half4x4(a);
  out[14] = float4(narrow[2]);
  float3x3 listed(1, 2, 3, 4, 5, 6, 7, 8, 9);
  listed[1].x = 0;
  out[15] = float4(listed[1], listed[2][2]);
}

kernel void arrays(device int* out [[buffer(0)]], device const array<int, 4>* in [[buffer(1)]]) {
  array<int, 4> a = in[0];
  a[1] += 10;
  int sum = 0;
  for (int element : a) sum += element;
  out[0] = sum;
  out[1] = a.size();
  out[2] = a.back();
}

kernel void limits(device float* out [[buffer(0)]], device long* integers [[buffer(1)]]) {
  out[0] = numeric_limits<float>::max();
  out[1] = numeric_limits<float>::lowest();
  out[2] = numeric_limits<float>::min();
  out[3] = numeric_limits<float>::epsilon();
  out[4] = numeric_limits<float>::infinity();
  out[5] = numeric_limits<float>::denorm_min();
  out[6] = numeric_limits<half>::max();
  out[7] = numeric_limits<half>::min();
  out[8] = numeric_limits<half>::epsilon();
  out[9] = float(numeric_limits<bfloat>::max());
  out[10] = float(numeric_limits<bfloat>::epsilon());
  out[11] = numeric_limits<float>::quiet_NaN();
  out[12] = -INFINITY;
  out[13] = FLT_MAX;
  out[14] = M_PI_F;
  integers[0] = numeric_limits<int>::min();
  integers[1] = numeric_limits<uint>::max();
  integers[2] = numeric_limits<short>::lowest();
  integers[3] = numeric_limits<uchar>::max();
  integers[4] = numeric_limits<long>::max();
  integers[5] = numeric_limits<char>::min();
  integers[6] = numeric_limits<ushort>::digits;
  integers[7] = numeric_limits<half>::digits;
  integers[8] = INT_MAX;
  constexpr int kBits = numeric_limits<uint>::digits;
  threadgroup uint storage[kBits];
  integers[9] = sizeof(storage);
}

template <typename T, typename = enable_if_t<is_integral_v<T>>>
static int kind_of(T) {
  return 1;
}
template <typename T, enable_if_t<is_floating_point<T>::value, bool> = true>
static int kind_of(T) {
  return 2;
}

kernel void traits(device int* out [[buffer(0)]]) {
  out[0] = is_same<float, float>::value && !is_same_v<float, half>;
  out[1] = is_floating_point_v<half> && is_floating_point_v<bfloat> && !is_floating_point_v<int>;
  out[2] = is_same_v<conditional_t<true, int, float>, int>;
  out[3] =
      is_same_v<remove_cv_t<const volatile int>, int> && is_same_v<decay_t<const float&>, float>;
  out[4] = is_same_v<make_unsigned_t<int>, uint> && is_unsigned_v<ushort> && is_signed_v<half>;
  out[5] = is_convertible_v<int, float> && is_pointer_v<device int*>;
  out[6] = kind_of(1u) * 10 + kind_of(1.0h);
  out[7] = integral_constant<int, 42>::value;
  out[8] = integral_constant<int, 5>{} + 1;
  out[9] = is_same_v<decltype(declval<float4>().xy), float2>;
  out[10] = is_same_v<decltype(float4().x), float>;
  out[11] = is_same_v<float4, vec<float, 4>>;
  out[12] = is_same_v<common_type_t<int, float>, float>;
}

enum class Shape : uint { kCircle = 3, kSquare = 7 };

kernel void literals(device float* out [[buffer(0)]]) {
  out[0] = 1.5;
  out[1] = 1e-3;
  out[2] = 0x1.8p1;
  out[3] = 2.5f;
  out[4] = 0.25h;
  out[5] = max(0.5, 0.25f);
  out[6] = 1.0 / 3;
  out[7] = sizeof(1.0);
  out[8] = 0xffu;
  out[9] = 'a';
  out[10] = uint(Shape::kSquare);
  out[11] = 1.0bf;
  out[12] = 0b101;
  out[13] = 1'000;
}
