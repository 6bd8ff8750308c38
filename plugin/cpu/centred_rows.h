// Keys or values as rows without the mean of their head, whether the quantizer took it away or it
// is taken away here. Softmax does not see what all keys share, and the output gets back what all
// values share; without it rounding errors, relative to a row's largest element, are smaller, and
// what rounded outputs leave in delta has nothing to multiply.
#pragma once

#include <cmath>
#include <limits>

#include "../device.h"
#include "logits.h"
#include "quantized_rows.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class CentredRows {
 public:
  CentredRows(const AttentionCall& call, const QuantizableOperand& x, int64_t width)
      : call_(call), x_(x), width_(width) {}

  // Finds the means that are not stored; without this call, rows are as they are stored.
  void find_means(Parallel& parallel) {
    if (!x_.quantization || x_.quantization.mean) return;
    find_means_and_largest(parallel);
  }
  // The same, and what `largest` gives.
  void find_means_and_largest(Parallel& parallel) {
    if (!x_.quantization) return;
    means_.allocate(call_.B * call_.K * width_);
    largest_.allocate(call_.B * call_.K);
    parallel.run(call_.B * call_.K, [this](int64_t head) { find_mean(head); });
    has_means_ = !x_.quantization.mean;
  }

  // What rows of kv head k lack, or null.
  const float* mean(int64_t b, int64_t k) const {
    return has_means_ ? means_.get() + (b * call_.K + k) * width_ : mean_of(x_, b, k);
  }

  // No finite element of kv head k's rows is larger, whatever its sign.
  float largest(int64_t b, int64_t k) const { return largest_[b * call_.K + k]; }

  void load(int64_t b, int64_t j, int64_t k, float* out) const {
    QuantizedRow<Isa>::load(x_, b, j, k, width_, out);
    if (!has_means_) return;
    const float* centre = mean(b, k);
    for (int64_t h = 0; h < width_; ++h) out[h] -= centre[h];
  }

  // As QuantizedRow::codes_of, of the centred row.
  const int8_t* codes_of(int64_t b, int64_t j, int64_t k, float* row, int8_t* codes,
                         ScaleAndOffset* scale) const {
    if (x_.quantization.head_block == 0) {
      return QuantizedRow<Isa>::codes_of(x_, b, j, k, width_, row, codes, scale);
    }
    load(b, j, k, row);
    *scale = {QuantizedRow<Isa>::round_to_codes(row, width_, codes), 0.0f};
    return codes;
  }

 private:
  // Over the finite elements of the keys within the lengths.
  void find_mean(int64_t head) {
    const int64_t b = head / call_.K, k = head % call_.K, keys = Visibility(call_, b).keys();
    Buffer<float> scratch(4 * (width_ + Isa::kLanes));
    float* row = scratch.get();
    float* sum = row + width_ + Isa::kLanes;
    float* count = sum + width_ + Isa::kLanes;
    float* most = count + width_ + Isa::kLanes;
    std::fill(sum, sum + width_, 0.0f);
    std::fill(count, count + width_, 0.0f);
    std::fill(most, most + width_, 0.0f);
    const float share = 1.0f / static_cast<float>(std::max<int64_t>(keys, 1));
    for (int64_t j = 0; j < keys; ++j) {
      QuantizedRow<Isa>::load(x_, b, j, k, width_, row);
      for (int64_t h = 0; h < width_; ++h) {
        const bool finite = std::fabs(row[h]) <= std::numeric_limits<float>::max();
        sum[h] += finite ? row[h] * share : 0.0f;
        count[h] += finite ? share : 0.0f;
        most[h] = finite ? std::max(most[h], std::fabs(row[h])) : most[h];
      }
    }
    float* out = means_.get() + head * width_;
    float largest = 0.0f;
    for (int64_t h = 0; h < width_; ++h) {
      out[h] = count[h] > 0.0f ? sum[h] / count[h] : 0.0f;
      // A stored mean is not in the rows that were looked at.
      largest = std::max(largest, most[h] + (x_.quantization.mean ? 0.0f : std::fabs(out[h])));
    }
    largest_[head] = std::min(largest, std::numeric_limits<float>::max());
  }

  const AttentionCall& call_;
  const QuantizableOperand& x_;
  const int64_t width_;
  Buffer<float> means_, largest_;
  bool has_means_ = false;
};

}  // namespace
}  // namespace jax_gluon::cpu
