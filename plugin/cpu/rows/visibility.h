// The keys that rows see, as ranges.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_call.h"

namespace jax_gluon::cpu {
namespace {

struct Range {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

inline Range intersect(Range a, Range b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

inline bool contains(Range a, Range b) { return a.begin <= b.begin && b.end <= a.end; }

// Rows and keys of `VisibleKeys::Section`.
struct Section {
  Range rows, keys;
};

// The range of keys that each row of one batch entry sees. Of causal, window and lengths alone its
// ends never decrease from row to row, but to rows past the lengths, which see nothing; else they
// are those of `VisibleKeys`, whose ranks are left to `LogitRules`.
class Visibility {
 public:
  Visibility(const AttentionCall& call, int64_t b)
      : listed_(call.visible_keys.empty() ? nullptr
                                          : call.visible_keys[static_cast<size_t>(b)].get()),
        reach_(reach_of(call)),
        offset_(call.query_offset
                    ? call.query_offset[call.query_offset_offset[static_cast<size_t>(b)]]
                    : 0),
        query_length_(length(call.query_seq_lengths, call.query_seq_lengths_offset, b, call.T)),
        key_length_(
            length(call.key_value_seq_lengths, call.key_value_seq_lengths_offset, b, call.S)),
        all_{{0, call.T}, {0, call.S}} {}

  Range of_row(int64_t i) const {
    if (listed_) {
      return {listed_->begin[static_cast<size_t>(i)], listed_->end[static_cast<size_t>(i)]};
    }
    if (i >= query_length_) return {};
    const int64_t position = i + offset_;
    return {clamp(position - reach_.left, key_length_),
            clamp(position + reach_.right + 1, key_length_)};
  }
  // The keys that any of these rows sees.
  Range of_rows(Range rows) const {
    if (listed_) return listed_range(rows);
    rows.end = std::min(rows.end, query_length_);
    if (rows.empty()) return {};
    return {of_row(rows.begin).begin, of_row(rows.end - 1).end};
  }
  // The keys that any row sees.
  Range keys() const {
    if (listed_) return {listed_->first, listed_->last};
    return of_rows({0, query_length_});
  }
  int64_t section_count() const {
    return listed_ ? static_cast<int64_t>(listed_->sections.size()) : 1;
  }
  Section section(int64_t i) const {
    if (!listed_) return all_;
    const VisibleKeys::Section* at = listed_->sections.data() + i;
    return {{i == 0 ? 0 : at[-1].end_row, at->end_row}, {i == 0 ? 0 : at[-1].end_key, at->end_key}};
  }
  // Whether each of these rows, of which there is one at least, sees all of `keys`.
  bool all_see(Range rows, Range keys) const {
    if (listed_) {
      bool all = !listed_->has_ranks();
      for (int64_t i = rows.begin; all && i < rows.end; ++i) all = contains(of_row(i), keys);
      return all;
    }
    return contains(of_row(rows.begin), keys) && contains(of_row(rows.end - 1), keys);
  }

 private:
  Range listed_range(Range rows) const {
    Range range;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const Range row = of_row(i);
      if (row.empty()) continue;
      range = range.empty() ? row
                            : Range{std::min(range.begin, row.begin), std::max(range.end, row.end)};
    }
    return range;
  }

  static int64_t clamp(int64_t x, int64_t max) { return std::min(std::max<int64_t>(x, 0), max); }

  static int64_t length(const int32_t* lengths, const std::vector<int64_t>& offset, int64_t b,
                        int64_t max) {
    return lengths ? clamp(lengths[offset[static_cast<size_t>(b)]], max) : max;
  }

  const VisibleKeys* listed_;
  Reach reach_;
  int64_t offset_;
  int64_t query_length_;  // rows at or past this see nothing
  int64_t key_length_;
  Section all_;
};

}  // namespace
}  // namespace jax_gluon::cpu
