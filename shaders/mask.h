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

// The range of keys that each row of one batch entry sees. Of causal, window and lengths alone its
// ends never decrease from row to row; else ranges are listed, and ranks may hide keys within them.
struct Visibility {
  int rows;  // at or past this, rows see nothing
  int keys;
  // Row i sees the keys from i + first to i + last. Of 64 bits, since both may be any number of 32
  // bits or more.
  Int64 first;
  Int64 last;
  device const int* list;
  bool is_listed;
  bool has_ranks;

  Visibility(thread const Operands& operands, int b) thread {
    thread const AttentionParameters& p = *operands.parameters;
    rows = p.T;
    keys = p.S;
    first = -p.reach_left;
    last = p.reach_right;
    list = operands.visible_keys;
    is_listed = has_ranks = false;
    if (p.has_entries == 0) return;
    const BatchEntry entry = operands.entries[b];
    rows = entry.rows;
    keys = entry.keys;
    first = entry.first;
    last = entry.last;
    is_listed = entry.list >= 0;
    has_ranks = entry.has_ranks != 0;
    if (is_listed) {
      rows = p.T;
      keys = p.S;
      list += entry.list;
    }
  }

  Range of_row(int i) const thread {
    if (is_listed) return listed(i);
    if (i >= rows) return {0, 0};
    return {between(i + first, keys), between(i + last + 1, keys)};
  }
  // The keys that any of these rows sees, or any of their eights.
  Range of_rows(Range of) const thread {
    of.end = min(of.end, rows);
    if (of.is_empty()) return {0, 0};
    if (is_listed) return any_of(of, rows);
    return {of_row(of.begin).begin, of_row(of.end - 1).end};
  }
  // The rows that see any of these keys, or any of their eights.
  Range rows_of_keys(Range of) const thread {
    of.end = min(of.end, keys);
    if (of.is_empty()) return {0, 0};
    if (is_listed) return any_of(of, rows + eights(rows));
    return {between(of.begin - last, rows), between(of.end - first, rows)};
  }
  // Where ranges say too little: the ranks that row i sees, and the rank of each key.
  Range ranks_of_row(int i) const thread { return listed(rows + eights(rows) + eights(keys) + i); }
  device const int* ranks() const thread {
    return list + 2 * (2 * rows + eights(rows) + eights(keys));
  }

 private:
  static int between(Int64 x, int max) { return int(clamp(x, Int64(0), Int64(max))); }
  static int eights(int x) { return (x + 7) / 8; }
  Range listed(int i) const thread { return {list[2 * i], list[2 * i + 1]}; }
  // The union of the ranges for eights, which are listed from `at` on.
  Range any_of(Range of, int at) const thread {
    Range all = {0, 0};
    for (int g = of.begin / 8; 8 * g < of.end; ++g) {
      const Range range = listed(at + g);
      if (range.is_empty()) continue;
      if (all.is_empty()) all = range;
      all = {min(all.begin, range.begin), max(all.end, range.end)};
    }
    return all;
  }
};
