// The tasks of a backward pass. Each owns the rows of a kv head's section, or a part of them, and
// sums of its own for dK and dV; the order of every sum is fixed by the shape and the sections.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/backward/backward_parts.h"
#include "cpu/memory/buffer.h"
#include "cpu/rows/rows.h"

namespace jax_gluon::cpu {
namespace {

// `Blocks` says where the dK and dV of a part start, and how many columns and keys they have.
template <class Isa, class Blocks>
class BackwardTasks {
  using Part = BackwardPart;
  static constexpr int64_t W = Isa::kLanes;
  static constexpr int64_t kSumKeys = 96;  // of a task that sums parts

 public:
  BackwardTasks(const AttentionBackwardCall& call, Parallel& parallel, const Blocks& blocks)
      : call_(call),
        parallel_(parallel),
        blocks_(blocks),
        tasks_(call, call.K, [this](const Section& x) { return blocks_.parts.count(x); }),
        scratch_(parallel.threads()) {}

  // body(part, rows) adds to dK and dV of a part, which start as zeros.
  template <class Body>
  void run(const Body& body) {
    find_sums();
    d_key_parts_.allocate(slots_ * blocks_.part_keys * blocks_.head_columns);
    d_value_parts_.allocate(slots_ * blocks_.part_keys * blocks_.value_columns);
    parallel_.run(tasks_.size(), [&](int64_t task) { differentiate(task, body); });
    parallel_.run(static_cast<int64_t>(sums_.size()),
                  [this](int64_t i) { sum_parts(sums_[static_cast<size_t>(i)]); });
  }

 private:
  struct Scratch {
    Buffer<float> d_key, d_value;  // [part keys][columns], of a whole section
    Buffer<float> zeros;
  };
  // Keys of a section of more than one part, whose dK and dV are summed in the end.
  struct Sum {
    SectionTask task;
    Range keys;
  };

  // Parts of such sections have slots.
  void find_sums() {
    slot_.allocate(tasks_.size());
    for (int64_t t = 0; t < tasks_.size(); ++t) {
      const SectionTask task = tasks_[t];
      slot_[t] = -1;
      if (task.count == 1) continue;
      slot_[t] = slots_++;
      if (t != task.first) continue;
      const Range keys = task.section.keys;
      for (int64_t j = keys.begin; j < keys.end; j += kSumKeys) {
        sums_.push_back({task, {j, std::min(j + kSumKeys, keys.end)}});
      }
    }
  }

  template <class Body>
  void differentiate(int64_t t, const Body& body) {
    const SectionTask task = tasks_[t];
    const int64_t b = task.b, k = task.head;
    const Visibility visibility(call_, b);
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    const Range rows = blocks_.parts.rows(task.section, task.index);
    const Range keys = visibility.of_rows(rows);
    const int64_t first_key = Blocks::first_key(keys);
    Part part{visibility, b, k, keys, first_key, first_key, nullptr, nullptr};
    if (task.count > 1) {
      const int64_t at = slot_[t] * blocks_.part_keys;
      part.d_key = d_key_parts_.get() + at * blocks_.head_columns;
      part.d_value = d_value_parts_.get() + at * blocks_.value_columns;
    } else {
      s.d_key.allocate(blocks_.part_keys * blocks_.head_columns);
      s.d_value.allocate(blocks_.part_keys * blocks_.value_columns);
      part.d_key = s.d_key.get();
      part.d_value = s.d_value.get();
    }
    if (!keys.empty()) {
      const int64_t count = round_up(keys.end - first_key, Blocks::kColumnStep);
      std::fill(part.d_key, part.d_key + count * blocks_.head_columns, 0.0f);
      std::fill(part.d_value, part.d_value + count * blocks_.value_columns, 0.0f);
    }
    body(part, rows);
    if (task.count > 1) return;
    s.zeros.allocate(std::max(call_.H, call_.V) + W);
    for (int64_t j = task.section.keys.begin; j < task.section.keys.end; ++j) {
      const bool seen = keys.begin <= j && j < keys.end;
      const int64_t at = seen ? j - first_key : -1;
      store_key_value(b, j, k, at < 0 ? nullptr : part.d_key + at * blocks_.head_columns,
                      at < 0 ? nullptr : part.d_value + at * blocks_.value_columns, s.zeros.get());
    }
  }

  // dK and dV of a key; null where no row sees it. `zeros` is scratch.
  void store_key_value(int64_t b, int64_t j, int64_t k, const float* d_key, const float* d_value,
                       float* zeros) const {
    if (!d_key) std::fill(zeros, zeros + std::max(call_.H, call_.V), 0.0f);
    store_row<Isa>(call_.d_key, call_.d_key.at(b, j, k), d_key ? d_key : zeros, call_.H,
                   call_.scale);
    store_row<Isa>(call_.d_value, call_.d_value.at(b, j, k), d_key ? d_value : zeros, call_.V,
                   1.0f);
  }

  void sum_parts(const Sum& sum) const {
    const SectionTask& task = sum.task;
    const Visibility visibility(call_, task.b);
    Buffer<float> zeros(std::max(call_.H, call_.V) + W);
    std::vector<Range> seen_by_part;
    seen_by_part.reserve(static_cast<size_t>(task.count));
    for (int64_t p = 0; p < task.count; ++p) {
      seen_by_part.push_back(visibility.of_rows(blocks_.parts.rows(task.section, p)));
    }
    for (int64_t j = sum.keys.begin; j < sum.keys.end; ++j) {
      float *d_key = nullptr, *d_value = nullptr;
      for (int64_t p = 0; p < task.count; ++p) {
        const Range seen = seen_by_part[static_cast<size_t>(p)];
        if (j < seen.begin || j >= seen.end) continue;
        // The last part comes first.
        const int64_t slot = slot_[task.first + task.count - 1 - p];
        const int64_t at = slot * blocks_.part_keys + j - Blocks::first_key(seen);
        float* x = d_key_parts_.get() + at * blocks_.head_columns;
        float* y = d_value_parts_.get() + at * blocks_.value_columns;
        if (d_key) {
          add_row(d_key, x, blocks_.head_columns);
          add_row(d_value, y, blocks_.value_columns);
        } else {
          d_key = x;
          d_value = y;
        }
      }
      store_key_value(task.b, j, task.head, d_key, d_value, zeros.get());
    }
  }

  static void add_row(float* sum, const float* x, int64_t n) {
    for (int64_t h = 0; h < n; h += W) {
      Isa::store(sum + h, Isa::add(Isa::load(sum + h), Isa::load(x + h)));
    }
  }

  const AttentionBackwardCall& call_;
  Parallel& parallel_;
  const Blocks& blocks_;
  const SectionTasks tasks_;
  std::vector<Sum> sums_;
  Buffer<int64_t> slot_;  // of each task, which has d_key_parts_ and d_value_parts_; else -1
  int64_t slots_ = 0;
  Buffer<float> d_key_parts_, d_value_parts_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
