// The randomised Hadamard rotation of rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/memory/buffer.h"

namespace jax_gluon::cpu {
namespace {

// Signs of the rotation: the lowest bit of SplitMix64 of h + 1; the Python side has the same.
inline float rotation_sign(int64_t h) {
  uint64_t z = static_cast<uint64_t>(h + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return ((z ^ (z >> 31)) & 1) != 0 ? -1.0f : 1.0f;
}

// Of rows of H elements: signs, then a fast Walsh-Hadamard transform of each block of the largest
// power of two that divides H.
class Rotation {
 public:
  void prepare(int64_t H) {
    H_ = H;
    sign_.allocate(H);
    const float norm = 1.0f / std::sqrt(static_cast<float>(H & -H));
    for (int64_t h = 0; h < H; ++h) sign_[h] = rotation_sign(h) * norm;
  }

  void apply(float* row) const {
    for (int64_t h = 0; h < H_; ++h) row[h] *= sign_[h];
    for (int64_t half = 1; half < (H_ & -H_); half *= 2) {
      for (int64_t h = 0; h < H_; h += 2 * half) {
        for (int64_t i = h; i < h + half; ++i) {
          const float a = row[i], b = row[i + half];
          row[i] = a + b;
          row[i + half] = a - b;
        }
      }
    }
  }

 private:
  int64_t H_ = 0;
  Buffer<float> sign_;
};

}  // namespace
}  // namespace jax_gluon::cpu
