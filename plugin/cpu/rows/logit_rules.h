// From scaled products to logits: bias, soft cap, masks. Logits are in base 2.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/rows/mask_tiles.h"
#include "cpu/rows/rows.h"
#include "cpu/rows/visibility.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Whether logits get back what centering took from their keys before bias and soft cap. A cap looks
// at all of a logit, and a large bias rounds: of two numbers that differ by the center not
// necessarily to two that do. Else the row's maximum gets it back.
inline bool needs_whole_logits(const AttentionCall& call) {
  return call.bias || call.soft_cap != 0.0f;
}

// tanh: an odd polynomial near 0, where 1 - 2 / (1 + e^2x) would cancel; 1e-7 relative.
template <class Isa>
typename Isa::F tanh(typename Isa::F x) {
  using F = typename Isa::F;
  const F u = Isa::mul(x, x), one = Isa::set1(1.0f);
  F p = Isa::fma(u, Isa::set1(-0.0058521687f), Isa::set1(0.020753629f));
  p = Isa::fma(u, p, Isa::set1(-0.0537687048f));
  p = Isa::fma(u, p, Isa::set1(0.13331689f));
  p = Isa::fma(u, p, Isa::set1(-0.333332833f));
  p = Isa::fma(u, p, one);
  const F near = Isa::mul(x, p);
  const F e = Isa::template exp2<5>(Isa::mul(Isa::abs(x), Isa::set1(-2.0f * kLog2E)));
  const F far = Isa::div(Isa::sub(one, e), Isa::add(one, e));
  const F minus_far = Isa::sub(Isa::zero(), far);
  return Isa::where_less(Isa::abs(x), Isa::set1(0.6f), near,
                         Isa::where_less(x, Isa::zero(), minus_far, far));
}

// The bias of one (batch, head), or a tangent of it: a number for each row and key.
template <class Isa>
class BiasRows {
 public:
  BiasRows(const AttentionCall& call, const Operand& bias, int64_t b, int64_t n) : bias_(bias) {
    if (!bias) return;
    last_element_ = (call.T - 1) * bias.stride[1] + (call.S - 1) * bias.stride[2];
    data_ = static_cast<const char*>(bias.data) +
            (bias.batch_offset[static_cast<size_t>(b)] + n * bias.stride[0]) *
                static_cast<int64_t>(size_of(bias.dtype));
  }

  explicit operator bool() const { return data_ != nullptr; }

  // Of the keys from `begin` to `end`, whole vectors; outside of `inside` anything. Read in place
  // where they can be, else into `scratch`: what follows a row's last key is the next row.
  const float* find(int64_t row, Range inside, Range keys, float* scratch) const {
    const int64_t at = row * bias_.stride[1], count = keys.end - keys.begin;
    if (bias_.stride[2] != 1 || at + keys.end - 1 > last_element_) {
      read(row, inside, keys.begin, keys.end, scratch);
      return scratch;
    }
    const char* p = data_ + (at + keys.begin) * static_cast<int64_t>(size_of(bias_.dtype));
    if (bias_.dtype == DType::kF32) return reinterpret_cast<const float*>(p);
    load_row<Isa>(p, bias_.dtype, count, scratch);
    return scratch;
  }
  // Of the keys from `begin` to `end`; outside of `inside` 0.
  void read(int64_t row, Range inside, int64_t begin, int64_t end, float* out) const {
    std::fill(out, out + (end - begin), 0.0f);
    const DType dtype = bias_.dtype;
    const int64_t ss = bias_.stride[2], at = row * bias_.stride[1];
    if (inside.empty()) return;
    if (ss == 1) {
      const char* p = data_ + (at + inside.begin) * static_cast<int64_t>(size_of(dtype));
      load_row<Isa>(p, dtype, inside.end - inside.begin, out + (inside.begin - begin));
    } else {
      for (int64_t j = inside.begin; j < inside.end; ++j) {
        out[j - begin] = float_at(data_, dtype, at + j * ss);
      }
    }
  }

 private:
  const Operand& bias_;
  const char* data_ = nullptr;
  int64_t last_element_ = 0;  // of this batch entry and head
};

// Bias, soft cap and masks of one (batch, head), applied to rows of a tile of scores.
template <class Isa, int kBlock>
class LogitRules {
 public:
  LogitRules(const AttentionCall& call, int64_t b, int64_t n, MaskPlane tiles = {})
      : call_(call), tiles_(tiles), bias_(call, call.bias, b, n), cap_(call.soft_cap * kLog2E) {
    has_mask_ = call.has_mask();
    if (call.block_mask) mask_blocks_ = call.block_mask.of(b, n);
    if (call.mask) {
      mask_ = call.mask + call.mask_batch_offset[static_cast<size_t>(b)] + n * call.mask_stride[0];
    }
    if (!call.visible_keys.empty()) {
      const VisibleKeys* listed = call.visible_keys[static_cast<size_t>(b)].get();
      if (listed->has_ranks()) ranked_ = listed;
    }
  }

  // Whether rows need more than masking outside their interval.
  bool any() const { return has_mask_ || any_but_mask(); }
  // Likewise, of their logits of `keys`.
  bool any(Range rows, Range keys) const {
    return any_but_mask() || (has_mask_ && !(tiles_ && tiles_.shows_all(rows, keys)));
  }

  // The first of `keys` that the mask shows to any of the rows, and those after it up to the first
  // that it shows to none: in whole steps.
  Range first_run(Range rows, Range keys, int64_t step) const {
    return tiles_ && !keys.empty() ? tiles_.first_run(rows, keys, step) : keys;
  }
  // From the first to the last of `keys` that the mask shows to any of the rows.
  Range seen(Range rows, Range keys) const {
    return tiles_ && !keys.empty() ? tiles_.seen(rows, keys) : keys;
  }

  // Turns scaled products s[begin..end), which stand for keys key0 + begin.., into logits: adds
  // bias, caps, hides. begin and end are multiples of the lanes; keys outside `visible` are hidden.
  // `cap_slope`, where given, takes d logit / d (uncapped logit).
  void apply(float* s, int64_t row, int64_t key0, int64_t begin, int64_t end, Range visible,
             float* cap_slope = nullptr) const {
    using F = typename Isa::F;
    constexpr int64_t W = Isa::kLanes;
    const Range inside = intersect({key0 + begin, key0 + end}, visible);
    if (bias_) {
      alignas(kAlignment) float scratch[kBlock];
      const float* bias = bias_.find(row, inside, {key0 + begin, key0 + end}, scratch);
      const F log2e = Isa::set1(kLog2E), hidden = Isa::set1(kHidden);
      const F lowest = Isa::set1(cap_ == 0.0f ? kMinBias : kHidden);
      for (int64_t j = begin; j < end; j += W) {
        const F b = Isa::load(bias + j - begin);
        const F sum = Isa::fma(b, log2e, Isa::load(s + j));
        // Such a bias hides its key even if the product is NaN, unless a cap makes it finite.
        Isa::store(s + j, Isa::where_less(b, lowest, hidden, sum));
      }
    }
    if (cap_ != 0.0f) {
      const F cap = Isa::set1(cap_), inverse = Isa::set1(1.0f / cap_);
      for (int64_t j = begin; j < end; j += W) {
        const F t = tanh<Isa>(Isa::mul(Isa::load(s + j), inverse));
        Isa::store(s + j, Isa::mul(t, cap));
        if (cap_slope) {
          Isa::store(cap_slope + j, Isa::sub(Isa::set1(1.0f), Isa::mul(t, t)));
        }
      }
    }
    if (has_mask_ || ranked_) {
      alignas(kAlignment) uint8_t seen[kBlock];
      read_mask(row, inside, key0 + begin, key0 + end, seen);
      if (ranked_) hide_other_ranks(row, inside, seen + (inside.begin - key0 - begin));
      for (int64_t j = begin; j < end; j += W) {
        Isa::store(s + j,
                   Isa::where_visible(seen + j - begin, Isa::load(s + j), Isa::set1(kHidden)));
      }
    } else {
      hide_outside(s, key0, begin, end, visible);
    }
  }

  static void hide_outside(float* s, int64_t key0, int64_t begin, int64_t end, Range visible) {
    constexpr int64_t W = Isa::kLanes;
    const auto hidden = Isa::set1(kHidden);
    const int64_t first = visible.begin - key0;
    const int64_t last = std::max(visible.end, visible.begin) - key0;
    const auto hide = [&](int64_t j) {
      const auto lane = [&](int64_t x) {
        return static_cast<int>(std::min(std::max<int64_t>(x - j, -1), W + 1));
      };
      Isa::store(s + j, Isa::where_between(lane(first), lane(last), Isa::load(s + j), hidden));
    };
    for (int64_t j = begin; j < end && j < first; j += W) hide(j);
    for (int64_t j = std::max(begin, last / W * W); j < end; j += W) hide(j);
  }

 private:
  bool any_but_mask() const { return bias_ || ranked_ || cap_ != 0.0f; }

  void read_mask(int64_t row, Range inside, int64_t begin, int64_t end, uint8_t* out) const {
    std::memset(out, 0, static_cast<size_t>(std::max<int64_t>(end - begin, 0)));
    if (inside.empty()) return;
    if (!has_mask_) {
      std::memset(out + (inside.begin - begin), 1, static_cast<size_t>(inside.end - inside.begin));
      return;
    }
    if (!mask_) {
      mask_blocks_.read(row, inside.begin, inside.end, out + (inside.begin - begin));
      return;
    }
    const uint8_t* p = mask_ + row * call_.mask_stride[1];
    const int64_t ss = call_.mask_stride[2];
    if (ss == 1) {
      std::memcpy(out + (inside.begin - begin), p + inside.begin,
                  static_cast<size_t>(inside.end - inside.begin));
    } else {
      for (int64_t j = inside.begin; j < inside.end; ++j) out[j - begin] = p[j * ss];
    }
  }

  void hide_other_ranks(int64_t row, Range inside, uint8_t* seen) const {
    const int32_t first = ranked_->first_rank[static_cast<size_t>(row)];
    const uint32_t count =
        static_cast<uint32_t>(ranked_->last_rank[static_cast<size_t>(row)] - first);
    const int32_t* ranks = ranked_->ranks.data() + inside.begin;
    for (int64_t j = 0; j < inside.end - inside.begin; ++j) {
      seen[j] &= static_cast<uint32_t>(ranks[j]) - static_cast<uint32_t>(first) < count;
    }
  }

  const AttentionCall& call_;
  const MaskPlane tiles_;
  const VisibleKeys* ranked_ = nullptr;  // where ranges say too little
  const BiasRows<Isa> bias_;
  // Bytes, else blocks.
  bool has_mask_ = false;
  const uint8_t* mask_ = nullptr;
  MaskBlocks mask_blocks_ = {};
  float cap_;
};

}  // namespace
}  // namespace jax_gluon::cpu
