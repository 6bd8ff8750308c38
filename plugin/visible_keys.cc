#include "visible_keys.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <numeric>

#include "attention_call.h"

namespace jax_gluon {
namespace {

// Of a key or a row: ordered by segment, then by position.
struct Place {
  int32_t segment;
  int64_t position;
  bool operator<(const Place& other) const {
    return segment != other.segment ? segment < other.segment : position < other.position;
  }
};

// Where the numbers of a batch entry start; null where there are none.
const int32_t* entry(const TokenIntegers& x, int64_t b) {
  return x ? x.data + x.batch_offset[static_cast<size_t>(b)] : nullptr;
}

int64_t length(const int32_t* lengths, const std::vector<int64_t>& offset, int64_t b, int64_t max) {
  if (!lengths) return max;
  return std::clamp<int64_t>(lengths[offset[static_cast<size_t>(b)]], 0, max);
}

// The least and largest of any range of numbers.
class RangeExtremes {
 public:
  explicit RangeExtremes(const std::vector<int32_t>& x) : min_{x}, max_{x} {
    for (size_t step = 1; 2 * step <= x.size(); step *= 2) {
      const std::vector<int32_t>&low = min_.back(), &high = max_.back();
      std::vector<int32_t> lower(low.size() - step), higher(low.size() - step);
      for (size_t i = 0; i < lower.size(); ++i) {
        lower[i] = std::min(low[i], low[i + step]);
        higher[i] = std::max(high[i], high[i + step]);
      }
      min_.push_back(std::move(lower));
      max_.push_back(std::move(higher));
    }
  }

  // Of [begin, end), which is not empty.
  int32_t min(size_t begin, size_t end) const {
    const size_t level = level_of(end - begin), last = end - (size_t{1} << level);
    return std::min(min_[level][begin], min_[level][last]);
  }
  int32_t max(size_t begin, size_t end) const {
    const size_t level = level_of(end - begin), last = end - (size_t{1} << level);
    return std::max(max_[level][begin], max_[level][last]);
  }

 private:
  static size_t level_of(size_t count) {
    size_t level = 0;
    while (size_t{2} << level <= count) ++level;
    return level;
  }
  std::vector<std::vector<int32_t>> min_, max_;  // of the 2^level numbers from i on
};

// Rows of a section, at least: a few blocks of a kernel, each of which may be the last and not
// full.
constexpr int32_t kMinSectionRows = 256;

std::vector<VisibleKeys::Section> find_sections(const VisibleKeys& keys, int64_t S) {
  const auto rows = static_cast<int32_t>(keys.begin.size());
  // The least key that this row or a later one sees.
  std::vector<int32_t> min_key(keys.begin.size() + 1, static_cast<int32_t>(S));
  for (size_t i = keys.begin.size(); i-- > 0;) {
    min_key[i] =
        keys.begin[i] < keys.end[i] ? std::min(min_key[i + 1], keys.begin[i]) : min_key[i + 1];
  }
  std::vector<VisibleKeys::Section> sections;
  int32_t first_row = 0, end_key = 0;
  for (int32_t i = 0; i < rows; ++i) {
    const auto row = static_cast<size_t>(i);
    if (i - first_row >= kMinSectionRows && end_key <= min_key[row]) {
      sections.push_back({i, end_key});
      first_row = i;
    }
    end_key = std::max(end_key, keys.end[row]);
  }
  sections.push_back({rows, static_cast<int32_t>(S)});
  return sections;
}

VisibleKeys find_entry(const AttentionCall& call, int64_t b) {
  const int32_t *query_segment = entry(call.query_segment_ids, b),
                *key_segment = entry(call.key_value_segment_ids, b),
                *query_position = entry(call.query_positions, b),
                *key_position = entry(call.key_value_positions, b);
  const int64_t rows = length(call.query_seq_lengths, call.query_seq_lengths_offset, b, call.T);
  const int64_t keys =
      length(call.key_value_seq_lengths, call.key_value_seq_lengths_offset, b, call.S);
  const int64_t offset =
      call.query_offset ? call.query_offset[call.query_offset_offset[static_cast<size_t>(b)]] : 0;
  const Reach reach = reach_of(call);

  std::vector<Place> places(static_cast<size_t>(keys));
  for (int64_t j = 0; j < keys; ++j) {
    places[static_cast<size_t>(j)] = {key_segment ? key_segment[j] : 0,
                                      key_position ? key_position[j] : j};
  }
  std::vector<int32_t> order(static_cast<size_t>(keys));
  std::iota(order.begin(), order.end(), 0);
  const bool is_sorted = std::is_sorted(places.begin(), places.end());
  if (!is_sorted) {
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
      return places[static_cast<size_t>(x)] < places[static_cast<size_t>(y)];
    });
    std::vector<Place> sorted(places.size());
    for (size_t r = 0; r < sorted.size(); ++r) sorted[r] = places[static_cast<size_t>(order[r])];
    places = std::move(sorted);
  }
  const RangeExtremes extremes(is_sorted ? std::vector<int32_t>() : order);

  VisibleKeys found;
  for (std::vector<int32_t>* x : {&found.begin, &found.end, &found.first_rank, &found.last_rank}) {
    x->resize(static_cast<size_t>(call.T));
  }
  bool is_exact = true;
  int32_t first_key = std::numeric_limits<int32_t>::max(), last_key = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t segment = query_segment ? query_segment[i] : 0;
    const int64_t position = query_position ? query_position[i] : i + offset;
    const auto first =
        std::lower_bound(places.begin(), places.end(), Place{segment, position - reach.left});
    const auto last = std::upper_bound(first, places.end(), Place{segment, position + reach.right});
    if (first == last) continue;
    const size_t begin = static_cast<size_t>(first - places.begin());
    const size_t end = static_cast<size_t>(last - places.begin()), row = static_cast<size_t>(i);
    found.first_rank[row] = static_cast<int32_t>(begin);
    found.last_rank[row] = static_cast<int32_t>(end);
    found.begin[row] = is_sorted ? found.first_rank[row] : extremes.min(begin, end);
    found.end[row] = is_sorted ? found.last_rank[row] : extremes.max(begin, end) + 1;
    is_exact &= found.end[row] - found.begin[row] == static_cast<int32_t>(end - begin);
    first_key = std::min(first_key, found.begin[row]);
    last_key = std::max(last_key, found.end[row]);
  }
  if (first_key < last_key) {
    found.first = first_key;
    found.last = last_key;
  }
  if (!is_exact) {
    found.ranks.assign(static_cast<size_t>(call.S), -1);
    for (size_t r = 0; r < order.size(); ++r) {
      found.ranks[static_cast<size_t>(order[r])] = static_cast<int32_t>(r);
    }
  }
  found.sections = find_sections(found, call.S);
  return found;
}

}  // namespace

std::vector<std::shared_ptr<const VisibleKeys>> find_visible_keys(const AttentionCall& call) {
  std::vector<std::shared_ptr<const VisibleKeys>> found;
  if (!call.query_segment_ids && !call.query_positions) return found;
  // Entries that read the same numbers, as vmap over other operands makes them, share the answer.
  std::map<std::array<int64_t, 7>, std::shared_ptr<const VisibleKeys>> known;
  const auto at = [](const std::vector<int64_t>& offsets, int64_t b) {
    return offsets.empty() ? 0 : offsets[static_cast<size_t>(b)];
  };
  for (int64_t b = 0; b < call.B; ++b) {
    const std::array<int64_t, 7> key = {at(call.query_segment_ids.batch_offset, b),
                                        at(call.key_value_segment_ids.batch_offset, b),
                                        at(call.query_positions.batch_offset, b),
                                        at(call.key_value_positions.batch_offset, b),
                                        at(call.query_seq_lengths_offset, b),
                                        at(call.key_value_seq_lengths_offset, b),
                                        at(call.query_offset_offset, b)};
    std::shared_ptr<const VisibleKeys>& entry = known[key];
    if (!entry) entry = std::make_shared<const VisibleKeys>(find_entry(call, b));
    found.push_back(entry);
  }
  return found;
}

}  // namespace jax_gluon
