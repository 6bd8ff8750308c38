// Keys or values as rows without the center of their head, whether the quantizer took it away or it
// is taken away here. Softmax does not see what all keys share, and the output gets back what all
// values share; without it rounding errors, relative to a row's largest element, are smaller, and
// what rounded outputs leave in delta has nothing to multiply.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/rows/logit_rules.h"
#include "cpu/rows/quantized_rows.h"
#include "cpu/rows/token_center.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class CenteredRows {
 public:
  // With `keeps_centers` rows come with their centers, whatever is called.
  CenteredRows(const AttentionCall& call, const QuantizableOperand& x, int64_t width,
               bool keeps_centers = false)
      : call_(call), x_(x), width_(width), keeps_centers_(keeps_centers) {}

  // Finds the centers that are not stored; without this call, rows are as they are stored.
  void find_centers(Parallel& parallel) {
    if (!x_.quantization || x_.quantization.center || keeps_centers_) return;
    centers_.allocate(call_.B * call_.K * width_);
    parallel.run(call_.B * call_.K, [this](int64_t head) { find_center(head); });
    has_centers_ = true;
  }
  // The same, and what `largest` gives.
  void find_centers_and_largest(Parallel& parallel) {
    if (!x_.quantization) return;
    find_centers(parallel);
    largest_.allocate(call_.B * call_.K);
    parallel.run(call_.B * call_.K, [this](int64_t head) { find_largest(head); });
  }

  // What rows of kv head k lack, or null.
  const float* center_of(int64_t b, int64_t k) const {
    if (keeps_centers_) return nullptr;
    return has_centers_ ? centers_.get() + (b * call_.K + k) * width_ : stored_center(x_, b, k);
  }

  // No finite element of kv head k's rows is larger, whatever its sign.
  float largest(int64_t b, int64_t k) const { return largest_[b * call_.K + k]; }

  void load(int64_t b, int64_t j, int64_t k, float* out) const {
    QuantizedRow<Isa>::load(x_, b, j, k, width_, out);
    if (keeps_centers_) {
      const float* stored = stored_center(x_, b, k);
      for (int64_t h = 0; stored && h < width_; ++h) out[h] += stored[h];
    }
    if (!has_centers_) return;
    const float* center = center_of(b, k);
    for (int64_t h = 0; h < width_; ++h) out[h] -= center[h];
  }

  // As QuantizedRow::codes_of, of the centered row.
  ScaledCodes codes_of(int64_t b, int64_t j, int64_t k, float* row, int8_t* codes) const {
    if (x_.quantization.head_block == 0) {
      return QuantizedRow<Isa>::codes_of(x_, b, j, k, width_, row, codes);
    }
    load(b, j, k, row);
    return {codes, {QuantizedRow<Isa>::round_to_codes(row, width_, codes), 0.0f}};
  }

 private:
  void find_center(int64_t head) {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Range keys = Visibility(call_, b).keys();
    const int64_t tokens = std::min(kCenterTokens, keys.end - keys.begin);
    const int64_t stride = round_up(width_, Isa::kLanes);
    Buffer<float> scratch((kCenterTokens + 1) * stride);
    float *rows = scratch.get(), *center = rows + kCenterTokens * stride;
    for (int64_t j = 0; j < tokens; ++j) {
      float* row = rows + j * stride;
      QuantizedRow<Isa>::load(x_, b, keys.begin + j, k, width_, row);
      std::fill(row + width_, row + stride, 0.0f);
    }
    median_of_rows<Isa>(rows, tokens, stride, stride, center);
    std::copy(center, center + width_, centers_.get() + head * width_);
  }

  // Over the finite elements of the keys that any row sees.
  void find_largest(int64_t head) {
    const int64_t b = head / call_.K, k = head % call_.K;
    const Range keys = Visibility(call_, b).keys();
    Buffer<float> scratch(width_ + Isa::kLanes);
    float* row = scratch.get();
    float largest = 0.0f;
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      load(b, j, k, row);
      for (int64_t h = 0; h < width_; ++h) {
        const float size = std::fabs(row[h]);
        largest = size <= std::numeric_limits<float>::max() ? std::max(largest, size) : largest;
      }
    }
    largest_[head] = largest;
  }

  const AttentionCall& call_;
  const QuantizableOperand& x_;
  const int64_t width_;
  const bool keeps_centers_;
  Buffer<float> centers_, largest_;
  bool has_centers_ = false;
};

}  // namespace
}  // namespace jax_gluon::cpu
