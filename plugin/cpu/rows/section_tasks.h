// The work of a kernel: each section of each head, divided into tasks.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/rows/visibility.h"

namespace jax_gluon::cpu {
namespace {

// visit(section, entries, visibility) of every section of the call, or once for the one that all
// entries have, with the visibility of the first.
template <class Visit>
void for_each_section(const AttentionCall& call, const Visit& visit) {
  if (call.B == 0) return;
  const bool are_listed = !call.visible_keys.empty();
  for (int64_t b = 0; b < (are_listed ? call.B : 1); ++b) {
    const Visibility visibility(call, b);
    for (int64_t i = 0; i < visibility.section_count(); ++i) {
      visit(visibility.section(i), are_listed ? 1 : call.B, visibility);
    }
  }
}

inline int64_t count_sections(const AttentionCall& call) {
  int64_t count = 0;
  for_each_section(call,
                   [&](const Section&, int64_t entries, const Visibility&) { count += entries; });
  return count;
}

struct SectionTask {
  int64_t b, head;
  Section section;
  int64_t index, count;  // of the section's tasks
  int64_t first;         // the section's first task
};

class SectionTasks {
 public:
  // `count` gives the tasks of a section.
  template <class Count>
  SectionTasks(const AttentionCall& call, int64_t heads, const Count& count) : heads_(heads) {
    if (call.B == 0 || heads == 0) return;
    if (call.visible_keys.empty()) {
      all_ = Visibility(call, 0).section(0);
      count_ = count(all_);
      size_ = call.B * heads * count_;
      return;
    }
    for (int64_t b = 0; b < call.B; ++b) {
      const Visibility visibility(call, b);
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t i = 0; i < visibility.section_count(); ++i) {
          const Section section = visibility.section(i);
          const int64_t tasks = count(section), first = size_;
          // Last rows first: with causal masking they are the longest.
          for (int64_t t = tasks; t-- > 0; ++size_) {
            listed_.push_back({b, head, section, t, tasks, first});
          }
        }
      }
    }
  }

  int64_t size() const { return size_; }
  SectionTask operator[](int64_t task) const {
    if (!listed_.empty()) return listed_[static_cast<size_t>(task)];
    const int64_t head = task / count_, index = count_ - 1 - task % count_;
    return {head / heads_, head % heads_, all_, index, count_, head * count_};
  }

 private:
  const int64_t heads_;
  Section all_;
  int64_t count_ = 1, size_ = 0;
  std::vector<SectionTask> listed_;  // only of calls whose entries have sections of their own
};

}  // namespace
}  // namespace jax_gluon::cpu
