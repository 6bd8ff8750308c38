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
  int64_t seen = call.S;
  // Any number of keys may have one position.
  if (call.query_positions) return seen;
  // With an offset the first row may stand anywhere.
  if (call.causal && call.query_offset == nullptr) seen = std::min(seen, call.T);
  const Reach reach = reach_of(call);
  return std::min(seen, reach.left + reach.right + 1);
}

std::string reason_for(const KernelOffer& offer) {
  const KernelLimits& limits = offer.limits;
  std::string text = offer.reason;
  const auto add = [&](const char* bound, int64_t number, const char* what) {
    if (number == 0) return;
    text += std::string(text.empty() ? "" : " and ") + bound + std::to_string(number) + what;
  };
  add("at most ", limits.max_queries, " queries");
  add("at most ", limits.max_rows, " rows of queries of a kv head");
  add("at least ", limits.min_keys, " keys");
  add("at most ", limits.max_keys, " keys");
  return text;
}

std::optional<std::string> check(const char* device, const KernelChoice& choice,
                                 const KernelOffers& offers) {
  const std::string kernel = std::string("the kernel \"") + name_of(choice.kernel) + "\"";
  std::string names;
  for (const KernelOffer& offer : offers) {
    if (offer.kernel == choice.kernel) return {};
    names += std::string(names.empty() ? "\"" : ", \"") + name_of(offer.kernel) + "\"";
  }
  return "the call is for " + kernel + "; " + device + " has for it " + names;
}

KernelChoice with_sizes(const KernelChoice& choice, const KernelOffers& offers) {
  KernelChoice sized = choice;
  const auto complete = [](int64_t& size, const SizeRange& range) {
    if (range.max != 0 && size == 0) size = range.preferred;
  };
  for (const KernelOffer& offer : offers) {
    if (offer.kernel != choice.kernel) continue;
    complete(sized.block_k, offer.block_k);
    complete(sized.subtile, offer.subtile);
    complete(sized.stages, offer.stages);
  }
  return sized;
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
