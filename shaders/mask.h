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
  int left;
  int right;

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
    // A window as long as the other sequence is no limit; so sums do not overflow.
    left = p.window_left < 0 ? p.T : min(p.window_left, p.T);
    right = p.window_right < 0 ? p.S : min(p.window_right, p.S);
    if (p.is_causal != 0) right = 0;
  }

  Range of_row(int i) const thread {
    if (i >= rows) return {0, 0};
    return {max(0, i - left), min(keys, i + right + 1)};
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
    return {max(0, of.begin - right), min(rows, of.end + left)};
  }
};
