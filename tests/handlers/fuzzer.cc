// libFuzzer's target: the plugin's handlers, called with what bytes say.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "call_frame.h"
#include "guarded.h"

namespace {

// Of the process, printed as it ends: how far calls came.
struct Counts {
  int64_t calls = 0, unfit = 0, ran = 0, refused = 0, sound_refused = 0;
  ~Counts() {
    std::fprintf(
        stderr, "calls %lld: ran %lld, refused %lld (as they were drawn: %lld); unfit %lld\n",
        static_cast<long long>(calls), static_cast<long long>(ran), static_cast<long long>(refused),
        static_cast<long long>(sound_refused), static_cast<long long>(unfit));
  }
} counts;

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// Half of the inputs are bytes drawn anew from some place on: a draw reads on where the one before
// it ended, so that a byte that is put in or taken out changes all that follows anyway.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  std::minstd_rand random(seed);
  if (random() % 2 == 0) return LLVMFuzzerMutate(data, size, max_size);
  for (size_t i = random() % (size + 1); i < max_size; ++i) {
    data[i] = static_cast<uint8_t>(random() >> 8);
  }
  return max_size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace jax_gluon::handlers;
  const DrawnCall call = draw(Bytes(data, size));
  if (!fits(call, GuardedMemory::kLargest)) {
    ++counts.unfit;
    return -1;
  }
  ++counts.calls;
  force_variant(call.variant);
  const Outcome outcome = run(call);
  ++(outcome.succeeded ? counts.ran : counts.refused);
  if (!outcome.succeeded && call.is_sound) {
    ++counts.sound_refused;
    if (std::getenv("FUZZ_VERBOSE")) std::fprintf(stderr, "%s\n", outcome.message.c_str());
  }
  // XLA prints it: it is to say what is wrong.
  if (!outcome.succeeded && outcome.message.empty()) std::abort();
  if (!outcome.violation.empty()) {
    std::fprintf(stderr, "the handler %s\n", outcome.violation.c_str());
    std::abort();
  }
  return 0;
}
