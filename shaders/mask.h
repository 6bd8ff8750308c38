// Which keys a row sees.
#pragma once

#include "operands.h"

// [begin, end)
struct Range {
  int begin;
  int end;
  bool is_empty() const thread { return begin >= end; }
};

inline Range intersect(Range a, Range b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// The keys that causal, window and lengths let each row of one batch entry see: an interval whose
// ends never decrease from row to row.
struct Visibility {
  int rows;  // at or past this, rows see nothing
  int keys;
  // Row i sees the keys from i + first to i + last. Of 64 bits, since both may be any number of 32
  // bits or more.
  Int64 first;
  Int64 last;

  Visibility(thread const Operands& operands, int b) thread {
    thread const AttentionParameters& p = *operands.parameters;
    rows = p.T;
    keys = p.S;
    if (p.has_query_lengths != 0) {
      rows = clamp(operands.query_lengths[operands.batch_offset(kQueryLengthsBatch, b)], 0, p.T);
    }
    if (p.has_key_value_lengths != 0) {
      keys = clamp(operands.key_value_lengths[operands.batch_offset(kKeyValueLengthsBatch, b)], 0,
                   p.S);
    }
    Int64 position = 0;
    if (p.has_query_position != 0) {
      position = operands.query_position[operands.batch_offset(kQueryPositionBatch, b)];
    }
    first = p.window_left < 0 ? -kFar : position - p.window_left;
    last = p.is_causal != 0 ? position : p.window_right < 0 ? kFar : position + p.window_right;
  }

  Range of_row(int i) const thread {
    if (i >= rows) return {0, 0};
    return {between(i + first, keys), between(i + last + 1, keys)};
  }
  // The keys that any of these rows sees.
  Range of_rows(Range of) const thread {
    of.end = min(of.end, rows);
    if (of.is_empty()) return {0, 0};
    return {of_row(of.begin).begin, of_row(of.end - 1).end};
  }
  // The rows that see any of these keys.
  Range rows_of_keys(Range of) const thread {
    of.end = min(of.end, keys);
    if (of.is_empty()) return {0, 0};
    return {between(of.begin - last, rows), between(of.end - first, rows)};
  }

 private:
  static constant constexpr Int64 kFar = Int64(1) << 40;  // no sequence is as long
  static int between(Int64 x, int max) { return int(clamp(x, Int64(0), Int64(max))); }
};
