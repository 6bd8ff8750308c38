// From scaled products to logits of base 2: bias, soft cap, masks.
#pragma once

#include "mask.h"

constant constexpr float kLog2E = 1.44269504088896340736f;
// A bias below this hides its key like -inf: its logit may not be finite in base 2.
constant constexpr float kLeastBias = -2.35e38f;

// The bias and mask of one query row of one head.
struct RowRules {
  device const uchar* bias;
  device const uchar* mask;
  Range visible;  // keys

  RowRules(thread const Operands& operands, thread const Visibility& visibility, int b, int n,
           int i) thread {
    constant AttentionParameters& p = *operands.parameters;
    visible = i < p.T ? visibility.of_row(i) : Range{0, 0};
    bias = operands.bias;
    mask = operands.mask;
    if (has_bias) {
      const Int64 first =
          operands.batch_offset(kBiasBatch, b) + n * p.bias.head + i * p.bias.row;
      bias += first * (p.bias_type == kF32 ? 4 : 2);
    }
    if (has_mask) {
      mask += operands.batch_offset(kMaskBatch, b) + n * p.mask.head + i * p.mask.row;
    }
  }

  bool sees(constant AttentionParameters& p, int key) const thread {
    if (key < visible.begin || key >= visible.end) return false;
    return !has_mask || mask[key * p.mask.key] != 0;
  }

  // The logit of a key that the row sees, from its scaled product in base 2. `slope` takes the
  // derivative of the soft cap.
  float logit(constant AttentionParameters& p, float x, int key, thread float& slope) const thread {
    slope = 1.0f;
    bool is_hidden = false;
    if (has_bias) {
      const float b = load_float(bias, p.bias_type, key * p.bias.key);
      // Such a bias hides its key even if the product is NaN, unless a cap makes it finite.
      is_hidden = b < kLeastBias && p.soft_cap == 0.0f;
      x = fma(b, kLog2E, x);
    }
    if (p.soft_cap != 0.0f) {
      const float cap = p.soft_cap * kLog2E;
      const float t = precise::tanh(x / cap);
      slope = 1.0f - t * t;
      x = t * cap;
    }
    return is_hidden ? -INFINITY : x;
  }
};

// Whether logits get back what centring took from their keys before bias and soft cap; else the
// row's maximum gets it.
inline bool needs_whole_logits(constant AttentionParameters& p) {
  return has_bias || p.soft_cap != 0.0f;
}
