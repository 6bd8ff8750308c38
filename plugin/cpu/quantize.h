// Rows to INT8 codes with one scale each, keys centred first when asked.
#pragma once

#include <cmath>
#include <limits>

#include "../device.h"
#include "rows.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class Quantize {
  static constexpr int64_t W = Isa::kLanes;
  // Tokens per task, and tokens summed in float32 before their sum joins a double.
  static constexpr int64_t kTokens = 256, kPartial = 64;

 public:
  Quantize(const QuantizeCall& call, Parallel& parallel) : call_(call), parallel_(parallel) {}

  void run() {
    if (call_.center) parallel_.run(call_.B * call_.K, [this](int64_t task) { find_mean(task); });
    const int64_t blocks = ceil_div(call_.S, kTokens);
    parallel_.run(call_.B * blocks, [this, blocks](int64_t task) {
      const int64_t b = task / blocks, begin = task % blocks * kTokens;
      Buffer<float> row(call_.H + W);
      for (int64_t i = begin; i < std::min(call_.S, begin + kTokens); ++i) {
        for (int64_t k = 0; k < call_.K; ++k) quantize_row(b, i, k, row.get());
      }
    });
  }

 private:
  float* mean(int64_t b, int64_t k) const {
    return static_cast<float*>(call_.mean.data) + (b * call_.K + k) * call_.H;
  }

  // The mean over tokens of the finite values: any finite number keeps softmax's invariance exact,
  // and a NaN in one token must not reach the others.
  void find_mean(int64_t task) {
    const int64_t b = task / call_.K, k = task % call_.K, H = call_.H;
    int64_t tokens = call_.S;
    if (call_.lengths) {
      tokens = call_.lengths[call_.lengths_offset[static_cast<size_t>(b)]];
      tokens = std::min(std::max<int64_t>(tokens, 0), call_.S);
    }
    Buffer<float> scratch(3 * (H + W));
    float* row = scratch.get();
    float* sum = row + H + W;
    float* count = sum + H + W;
    Buffer<double> total(2 * H);
    std::fill(total.get(), total.get() + 2 * H, 0.0);
    for (int64_t begin = 0; begin < tokens; begin += kPartial) {
      std::fill(sum, sum + H, 0.0f);
      std::fill(count, count + H, 0.0f);
      for (int64_t i = begin; i < std::min(tokens, begin + kPartial); ++i) {
        load_row<Isa>(row_of(call_.x, b, i, k), call_.x.dtype, H, row);
        for (int64_t h = 0; h < H; ++h) {
          const bool finite = std::fabs(row[h]) <= std::numeric_limits<float>::max();
          sum[h] += finite ? row[h] : 0.0f;
          count[h] += finite ? 1.0f : 0.0f;
        }
      }
      for (int64_t h = 0; h < H; ++h) {
        total[h] += static_cast<double>(sum[h]);
        total[H + h] += static_cast<double>(count[h]);
      }
    }
    float* out = mean(b, k);
    for (int64_t h = 0; h < H; ++h) {
      out[h] = total[H + h] > 0.0 ? static_cast<float>(total[h] / total[H + h]) : 0.0f;
    }
  }

  void quantize_row(int64_t b, int64_t i, int64_t k, float* row) const {
    const int64_t H = call_.H, index = (b * call_.S + i) * call_.K + k;
    load_row<Isa>(row_of(call_.x, b, i, k), call_.x.dtype, H, row);
    const int64_t padded = round_up(H, W);
    std::fill(row + H, row + padded, 0.0f);
    auto largest = Isa::zero(), probe = Isa::zero();
    const float* centre = call_.center ? mean(b, k) : nullptr;
    for (int64_t h = 0; centre && h < H; ++h) row[h] -= centre[h];
    for (int64_t h = 0; h < padded; h += W) {
      const auto x = Isa::load(row + h);
      largest = Isa::max(largest, Isa::abs(x));
      probe = Isa::fma(x, Isa::zero(), probe);  // NaN once x is not finite
    }
    int8_t* code = static_cast<int8_t*>(call_.data.data) + index * H;
    float& scale = static_cast<float*>(call_.scale.data)[index];
    if (Isa::reduce_add(probe) != 0.0f) {
      scale = std::numeric_limits<float>::quiet_NaN();
      std::memset(code, 0, static_cast<size_t>(H));
      return;
    }
    scale = Isa::reduce_max(largest) / 127.0f;
    // A range below the normal numbers counts as zero: division by such a scale may overflow.
    if (scale < std::numeric_limits<float>::min()) {
      scale = 0.0f;
      std::memset(code, 0, static_cast<size_t>(H));
      return;
    }
    const auto divisor = Isa::set1(scale);
    alignas(kAlignment) int8_t tail[W];
    int64_t h = 0;
    for (; h + W <= H; h += W) {
      Isa::store_s8(code + h, Isa::to_int(Isa::div(Isa::load(row + h), divisor)));
    }
    if (h < H) {
      Isa::store_s8(tail, Isa::to_int(Isa::div(Isa::load(row + h), divisor)));
      std::memcpy(code + h, tail, static_cast<size_t>(H - h));
    }
  }

  const QuantizeCall& call_;
  Parallel& parallel_;
};

}  // namespace
}  // namespace jax_gluon::cpu
