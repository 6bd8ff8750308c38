// Rows of keys and values in the order in which their storage unpacks to vectors of float32.
#pragma once

#include "cpu/rows/rows.h"

namespace jax_gluon::cpu {
namespace {

// Elements of a stored row as vectors. A step reads kStep elements; where a byte holds two, the
// first vector takes the even and the second the odd ones, and whatever meets them is stored in
// that order.
template <class Isa, DType dtype>
struct StoredRow {
  using F = typename Isa::F;
  static constexpr bool kNibbles = dtype == DType::kU4x2;
  static constexpr int kVectors = kNibbles ? 2 : 1;
  static constexpr int64_t kStep = kVectors * Isa::kLanes;

  // `row` points at element i.
  static void load(const char* row, F* out) {
    if constexpr (dtype == DType::kF32) {
      out[0] = Isa::load(reinterpret_cast<const float*>(row));
    } else if constexpr (dtype == DType::kBF16) {
      out[0] = Isa::load_bf16(reinterpret_cast<const uint16_t*>(row));
    } else if constexpr (dtype == DType::kF16) {
      out[0] = Isa::load_f16(reinterpret_cast<const uint16_t*>(row));
    } else if constexpr (dtype == DType::kS8) {
      out[0] = Isa::load_s8(reinterpret_cast<const int8_t*>(row));
    } else {
      Isa::load_nibbles(reinterpret_cast<const uint8_t*>(row), &out[0], &out[1]);
    }
  }
  static constexpr int64_t bytes(int64_t elements) {
    return kNibbles ? elements / 2 : elements * static_cast<int64_t>(size_of(dtype));
  }
  // Where element h stands in the order of the vectors.
  static constexpr int64_t position(int64_t h) {
    if constexpr (!kNibbles) return h;
    return h / kStep * kStep + h % 2 * Isa::kLanes + h % kStep / 2;
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
