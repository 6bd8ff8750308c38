// Calls that get no memory: each allocation of a call is refused in turn. The call is then an error
// that says so, or right; nothing is lost, and the call after it is right. And a pool that takes no
// task:
//   faults CALLS [SEED]
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>

#include "allocations.h"
#include "call_frame.h"
#include "guarded.h"

namespace jax_gluon::handlers {
namespace {

// Counts what the handler allocates, not what stands for XLA.
class Watch : public Observer {
 public:
  explicit Watch(int64_t refused) : refused_(refused) {}
  void call_begins() override { watch_allocations(refused_); }
  void call_ends() override { allocations = stop_watching(); }
  void xla_begins() override { pause_watching(true); }
  void xla_ends() override { pause_watching(false); }

  int64_t allocations = 0;

 private:
  int64_t refused_;
};

class RefusingPool : public Pool {
 public:
  bool schedule(void (*)(void*), void*) override {
    ++refused;
    return false;
  }
  int64_t refused = 0;
};

struct Counts {
  int64_t calls = 0, refused = 0, errors = 0, recovered = 0, refused_tasks = 0, failures = 0;
};

class Checker {
 public:
  Checker(const DrawnCall& call, Counts& counts) : call_(call), counts_(counts) {}

  void check(const char* name) {
    name_ = name;
    alone_ = run(call_);
    if (!alone_.succeeded) return;
    ++counts_.calls;
    Watch counted(-1);
    run(call_, nullptr, &counted);
    for (int64_t n = 0; n < counted.allocations; ++n) refuse(n);
    RefusingPool pool;
    expect_same(run(call_, &pool), "with a pool that takes no task");
    counts_.refused_tasks += pool.refused;
  }

 private:
  void refuse(int64_t n) {
    const std::string where = "without allocation " + std::to_string(n);
    const int64_t live = live_allocations();
    bool succeeded = false;
    {
      Watch watch(n);
      ++counts_.refused;
      Outcome outcome;
      try {
        outcome = run(call_, nullptr, &watch);
      } catch (const std::exception&) {
        stop_watching();
        return fail(where, "an exception left the handler");
      }
      succeeded = outcome.succeeded;
      if (succeeded) {
        ++counts_.recovered;
        expect_same(outcome, where);
      } else {
        ++counts_.errors;
        const bool is_clear = outcome.message.find("out of memory") != std::string::npos;
        if (!is_clear) fail(where, outcome.message);
        if (!outcome.violation.empty()) fail(where, outcome.violation);
      }
    }
    // What ran is kept for `debug.kernels`.
    if (const int64_t more = live_allocations() - live; more != 0 && !succeeded) {
      fail(where, std::to_string(more) + " allocations more are live");
    }
    expect_same(run(call_), where + ", the call after it");
  }
  void expect_same(const Outcome& outcome, const std::string& where) {
    if (!outcome.succeeded) return fail(where, outcome.message);
    if (!outcome.violation.empty()) fail(where, outcome.violation);
    if (outcome.results != alone_.results) fail(where, "other results");
  }
  void fail(const std::string& where, const std::string& what) {
    ++counts_.failures;
    std::printf("%s %s: %s\n", name_.c_str(), where.c_str(), what.c_str());
  }

  const DrawnCall& call_;
  Counts& counts_;
  std::string name_;
  Outcome alone_;
};

int run_all(int64_t calls, uint32_t seed) {
  std::mt19937 random(seed);
  Counts counts;
  for (int64_t drawn = 0; counts.calls < calls; ++drawn) {
    uint8_t bytes[256];
    for (uint8_t& each : bytes) each = static_cast<uint8_t>(random());
    DrawnCall call = draw(Bytes(bytes, sizeof bytes));
    if (!call.is_sound || !fits(call, GuardedMemory::kLargest)) continue;
    force_variant(call.variant);
    call.threads = 1 + drawn % 3;
    Checker(call, counts).check(("draw " + std::to_string(drawn)).c_str());
  }
  std::printf(
      "%lld calls of seed %u: %lld allocations refused (%lld errors, %lld calls right all the "
      "same),"
      " %lld tasks refused: %lld failures\n",
      static_cast<long long>(counts.calls), seed, static_cast<long long>(counts.refused),
      static_cast<long long>(counts.errors), static_cast<long long>(counts.recovered),
      static_cast<long long>(counts.refused_tasks), static_cast<long long>(counts.failures));
  return counts.failures == 0 && counts.errors > 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_gluon::handlers

int main(int count, char** arguments) {
  const auto number = [&](int at, long other) {
    return count > at ? std::atol(arguments[at]) : other;
  };
  return jax_gluon::handlers::run_all(number(1, 200), static_cast<uint32_t>(number(2, 0)));
}
