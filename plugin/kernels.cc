#include "kernels.h"

#include <algorithm>
#include <deque>
#include <mutex>

namespace jax_gluon {
namespace {

// Never destroyed: XLA's threads may run to the end of the process.
struct Log {
  std::mutex mutex;
  std::deque<KernelRun> runs;
};

Log& log() {
  static Log& log = *new Log;
  return log;
}

}  // namespace

int64_t max_visible_keys(const AttentionCall& call) {
  // With an offset the first row may stand anywhere.
  int64_t seen = call.S;
  if (call.causal && call.query_offset == nullptr) seen = std::min(seen, call.T);
  const int64_t left = call.window_left, right = call.causal ? 0 : call.window_right;
  // Compared first: a sum of the largest would overflow.
  if (left < 0 || right < 0 || left >= seen || right >= seen) return seen;
  return std::min(seen, left + right + 1);
}

const KernelOffer* find(const KernelOffers& offers, Kernel kernel) {
  for (const KernelOffer& offer : offers) {
    if (offer.kernel == kernel) return &offer;
  }
  return nullptr;
}

std::string refusal(const char* device, Kernel kernel, const KernelOffers& offers) {
  std::string names;
  for (const KernelOffer& offer : offers) {
    if (!names.empty()) names += ", ";
    names += std::string("\"") + name_of(offer.kernel) + "\"";
  }
  return std::string("the call is for the kernel \"") + name_of(kernel) + "\"; " + device +
         " has for it " + names;
}

std::string check(const char* device, const KernelChoice& choice, const KernelOffers& offers) {
  const KernelOffer* offer = find(offers, choice.kernel);
  if (!offer) return refusal(device, choice.kernel, offers);
  const auto is_missing = [](int64_t size, const SizeRange& range) {
    return range.max != 0 && size == 0;
  };
  const char* missing = is_missing(choice.block_k, offer->block_k)   ? "block_k"
                        : is_missing(choice.subtile, offer->subtile) ? "subtile"
                        : is_missing(choice.stages, offer->stages)   ? "stages"
                                                                     : nullptr;
  if (!missing) return {};
  return std::string("the call has no ") + missing + " for the kernel \"" + name_of(choice.kernel) +
         "\"";
}

void keep(const KernelRun& run) {
  const std::lock_guard<std::mutex> lock(log().mutex);
  if (log().runs.size() == kMaxRuns) log().runs.pop_front();
  log().runs.push_back(run);
}

std::vector<KernelRun> kept_runs(bool reset) {
  const std::lock_guard<std::mutex> lock(log().mutex);
  std::vector<KernelRun> runs(log().runs.begin(), log().runs.end());
  if (reset) log().runs.clear();
  return runs;
}

}  // namespace jax_gluon
