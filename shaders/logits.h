// From scaled products to logits of base 2: bias, soft cap, masks.
#pragma once

#include "dropout.h"
#include "mask.h"

constant constexpr float kLog2E = 1.44269504088896340736f;

// The bias and mask of one query row of one head.
struct RowRules {
  device const uchar* bias;
  device const uchar* mask;
  Range visible;  // keys
  device const int* ranks;
  Range visible_ranks;  // empty: all
  Dropout dropout;

  bool sees(thread const AttentionParameters& p, int key) const thread {
    if (key < visible.begin || key >= visible.end) return false;
    if (!visible_ranks.is_empty()) {
      const int rank = ranks[key];
      if (rank < visible_ranks.begin || rank >= visible_ranks.end) return false;
    }
    return p.has_mask == 0 || mask[key * p.mask.key] != 0;
  }

  // The logit of a key that the row sees, from its scaled product in base 2. `slope` takes the
  // derivative of the soft cap.
  float logit(thread const AttentionParameters& p, float x, int key,
              thread float& slope) const thread {
    slope = 1.0f;
    bool is_hidden = false;
    if (p.has_bias != 0) {
      const float b = load_float(bias, p.bias_type, key * p.bias.key);
      // Such a bias hides its key even if the product is NaN, unless a cap makes it finite.
      is_hidden = b < JAX_GLUON_MIN_BIAS && p.soft_cap == 0.0f;
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

// Bias, mask and visible keys of the rows of one head.
struct HeadRules {
  device const uchar* bias;
  device const uchar* mask;
  Visibility visibility;
  Dropout dropout;

  HeadRules(thread const Operands& operands, int b, int n) thread : visibility(operands, b) {
    thread const AttentionParameters& p = *operands.parameters;
    bias = operands.bias;
    mask = operands.mask;
    if (p.has_bias != 0) {
      bias += (operands.batch_offset(kBiasBatch, b) + n * p.bias.head) * bias_size(p);
    }
    if (p.has_mask != 0) mask += operands.batch_offset(kMaskBatch, b) + n * p.mask.head;
    dropout = {uint(p.dropout_threshold), uint2(0), 0, 0, 0, 0};
    if (p.dropout_threshold != 0) {
      const BatchEntry entry = operands.entries[b];
      dropout.key = uint2(uint(entry.key0), uint(entry.key1));
      dropout.batch = uint(entry.batch);
      dropout.head = uint(entry.first_head) + uint(n) * uint(entry.head_step);
      dropout.row = uint(entry.first_row);
      dropout.first_key = entry.first_key;
    }
  }

  RowRules row(thread const AttentionParameters& p, int i) const thread {
    RowRules rules;
    rules.visible = i < p.T ? visibility.of_row(i) : Range{0, 0};
    rules.dropout = dropout;
    rules.dropout.row += uint(i);
    rules.visible_ranks = {0, 0};
    rules.ranks = visibility.list;
    if (visibility.has_ranks && i < p.T) {
      rules.visible_ranks = visibility.ranks_of_row(i);
      rules.ranks = visibility.ranks();
    }
    rules.bias = p.has_bias != 0 ? bias + i * p.bias.row * bias_size(p) : bias;
    rules.mask = p.has_mask != 0 ? mask + i * p.mask.row : mask;
    return rules;
  }

 private:
  static int bias_size(thread const AttentionParameters& p) { return p.bias_type == kF32 ? 4 : 2; }
};

// Whether logits get back what centering took from their keys before bias and soft cap; else the
// row's maximum gets it.
inline bool needs_whole_logits(thread const AttentionParameters& p) {
  return p.has_bias != 0 || p.soft_cap != 0.0f;
}
