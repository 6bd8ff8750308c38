// How the rows of sections are divided into parts, each with dK and dV of its own.
#pragma once

#include <algorithm>

#include "cpu/rows/section_tasks.h"
#include "device.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

class BackwardParts {
  // Tasks wanted, so that several cores are busy; but a section's rows are split no finer than
  // this, and no more often, since each part has dK and dV of all keys that it sees.
  static constexpr int64_t kTasks = 16, kMinPart = 512, kMaxParts = 4;

 public:
  explicit BackwardParts(const AttentionBackwardCall& call) : call_(call) {
    int64_t sections = 0;
    for_each_section(call, [&](const Section& x, int64_t entries, const Visibility&) {
      sections += entries;
      section_keys_ = std::max(section_keys_, x.keys.end - x.keys.begin);
    });
    wanted_parts_ = std::min(ceil_div(kTasks, std::max<int64_t>(sections * call.K, 1)), kMaxParts);
  }

  // No more keys are seen by this many adjacent rows of a section.
  int64_t max_keys(int64_t rows) const {
    if (call_.query_positions) return section_keys_;
    const Reach reach = reach_of(call_);
    return std::min(section_keys_, rows + reach.left + reach.right);
  }

  // Parts are whole blocks of as many rows.
  void set_block_rows(int64_t rows) { block_rows_ = rows; }

  int64_t count(const Section& section) const {
    return ceil_div(std::max<int64_t>(section.rows.end - section.rows.begin, 1),
                    part_rows(section));
  }
  Range rows(const Section& section, int64_t part) const {
    const int64_t rows = part_rows(section), first = section.rows.begin + part * rows;
    return {first, std::min(first + rows, section.rows.end)};
  }

  // The largest number of keys that a part sees, and that a block of it sees.
  struct Seen {
    int64_t by_part = 0, by_block = 0;
  };
  Seen max_seen() const {
    Seen seen;
    for_each_section(call_, [&](const Section& x, int64_t, const Visibility& visibility) {
      const bool is_listed = !call_.visible_keys.empty();
      const auto widen = [&](int64_t step, Range part, int64_t& max_seen) {
        for (int64_t i = part.begin; is_listed && i < part.end; i += step) {
          const Range keys = visibility.of_rows({i, std::min(i + step, part.end)});
          max_seen = std::max(max_seen, keys.end - keys.begin);
        }
        if (!is_listed) max_seen = std::max(max_seen, max_keys(step));
      };
      for (int64_t p = 0; p < count(x); ++p) {
        widen(part_rows(x), rows(x, p), seen.by_part);
        widen(block_rows_, rows(x, p), seen.by_block);
      }
    });
    return seen;
  }

 private:
  int64_t part_rows(const Section& section) const {
    const int64_t rows = std::max<int64_t>(section.rows.end - section.rows.begin, 1);
    const int64_t parts = std::min(wanted_parts_, ceil_div(rows, kMinPart));
    return round_up(ceil_div(rows, parts), block_rows_);
  }

  const AttentionBackwardCall& call_;
  int64_t section_keys_ = 0;  // of the largest
  int64_t wanted_parts_ = 1;  // of a section
  int64_t block_rows_ = 1;
};

// A part of the rows of a section, while its task runs.
struct BackwardPart {
  const Visibility& visibility;
  int64_t b, k;
  Range keys;         // that any of its rows sees
  int64_t first_key;  // where packed keys, dK and dV start
  int64_t packed;     // keys before this are packed
  float *d_key, *d_value;
};

}  // namespace
}  // namespace jax_gluon::cpu
