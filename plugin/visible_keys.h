// Which keys each row of a batch entry sees where segments or positions say so.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace jax_gluon {

struct AttentionCall;

// Row i sees keys in [begin[i], end[i]): all of them if `ranks` is empty, which it is wherever keys
// of a segment are adjacent and in the order of their positions. Else those whose rank is in
// [first_rank[i], last_rank[i]), where keys are ranked by segment and position.
struct VisibleKeys {
  // Adjacent rows and adjacent keys, which see and are seen by no others: documents that are packed
  // in a row, short ones together. Each starts where the one before ends; the last ends at T and S.
  struct Section {
    int32_t end_row, end_key;
  };

  std::vector<int32_t> begin, end;             // [T]
  std::vector<int32_t> first_rank, last_rank;  // [T]
  std::vector<int32_t> ranks;                  // [S]
  int32_t first = 0, last = 0;                 // the range of the keys that any row sees
  std::vector<Section> sections;

  bool has_ranks() const { return !ranks.empty(); }
};

// One for each batch entry, shared by equal ones; empty where the call has neither segments nor
// positions. Lengths, causal and window are taken into account.
std::vector<std::shared_ptr<const VisibleKeys>> find_visible_keys(const AttentionCall& call);

}  // namespace jax_gluon
