// Which kernels a device has for a call, and what it says of those that ran.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attention_call.h"

namespace jax_gluon {

constexpr std::array<const char*, 4> kKernelNames = {"baseline", "gluon", "decode", "small"};

inline const char* name_of(Kernel kernel) { return kKernelNames[static_cast<size_t>(kernel)]; }

inline std::optional<Kernel> kernel_named(std::string_view name) {
  for (size_t i = 0; i < kKernelNames.size(); ++i) {
    if (name == kKernelNames[i]) return static_cast<Kernel>(i);
  }
  return {};
}

// Of any kernel's blocks, in keys, and of any ring's: what bounds its scratch.
constexpr int64_t kMaxBlockKeys = 4096, kMaxStages = 8;

// What a size of a kernel may be: `preferred`, or from `min` to `max` in steps. Of a kernel that
// has no such size, or one value for it, all are 0.
struct SizeRange {
  int64_t preferred = 0, min = 0, max = 0, step = 0;
};

// What a call must be for a kernel to take it, where that is not any call: 0 where it may be
// anything. Rows are those of the queries that share a kv head.
struct KernelLimits {
  int64_t max_queries = 0, max_rows = 0, min_keys = 0, max_keys = 0;
};

// A kernel that a device has for a call. Where it has subtiles, block_k is at least two of them,
// and whole ones. Plain data: files of one instruction set make it, and must instantiate nothing.
struct KernelOffer {
  Kernel kernel = Kernel::kBaseline;
  const char* arithmetic = "";  // what is multiplied: "float32", "bfloat16", "float16", "int8"
  KernelLimits limits;
  SizeRange block_k, subtile, stages;
  const char* reason = "";  // why it is the faster one, where that is not in its limits
};

struct KernelOffers {
  KernelOffer data[kKernelNames.size()];
  size_t size = 0;

  void add(const KernelOffer& offer) { data[size++] = offer; }
  const KernelOffer* begin() const { return data; }
  const KernelOffer* end() const { return data + size; }
};

// What an offer is for, in words; empty where it is for any call.
std::string reason_for(const KernelOffer& offer);

// The most keys that any row can see.
int64_t max_visible_keys(const AttentionCall& call);

// What a device says of a call whose kernel is not among the offers for it; else nothing.
std::optional<std::string> check(const char* device, const KernelChoice& choice,
                                 const KernelOffers& offers);

// The choice with the sizes that its kernel has: those that it lacks are the ones that the offer
// prefers. A program may have been made on a processor whose kernels have others; for the same
// reason sizes need not be among the offered ones.
KernelChoice with_sizes(const KernelChoice& choice, const KernelOffers& offers);

// What ran: a kernel, with the sizes that it took.
struct KernelRun {
  const char* pass = "";  // "forward", "backward", "backward_bias"
  const char* device = "";
  std::string variant;  // the CPU's instruction set; of Metal the functions that were dispatched
  Kernel kernel = Kernel::kBaseline;
  const char* arithmetic = "";
  int64_t block_k = 0, subtile = 0, stages = 0;
};

// Keeps a run, in the place of the oldest where there are kMaxRuns.
constexpr size_t kMaxRuns = 256;
void keep(const KernelRun& run);
// The runs that are kept, oldest first; `reset` forgets them.
std::vector<KernelRun> kept_runs(bool reset);

}  // namespace jax_gluon
