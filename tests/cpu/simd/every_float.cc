// Every float32 (or one in as many as the argument says) through exp2 of a SIMD target: prints the
// greatest error of each kernel in units of the last place of the exact result, and fails where a
// result breaks what the kernels need. TARGET is the target's struct, as in main.cc.
#include <algorithm>

#include "checks.h"

namespace jax_gluon::cpu {
namespace {

struct Kernel {
  const char* name;
  F (*run)(F);
  float most;  // of the domain; its least is -126, below which results are 0 or as little
  double bar;  // in ulp
};

// Of the float32 nearest to `exact`, a normal number.
double ulp_of(double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::ldexp(1.0, std::max(exponent, -125) - 24);
}

struct Worst {
  double ulps = 0.0;
  float at = 0.0f;
};

int64_t seen = 0;

// All bits from `first` to `last`, `step` apart, and `last`.
template <class Check>
void visit(const Kernel& kernel, uint32_t first, uint32_t last, uint32_t step, Check check) {
  uint64_t next = first;
  for (bool is_last = false; !is_last;) {
    Floats x;
    for (float& each : x.v) {
      is_last = is_last || next >= last;
      each = float_from_bits(static_cast<uint32_t>(next >= last ? last : next));
      next += step;
    }
    const Floats y = lanes_of(kernel.run(vector_of(x)));
    for (int i = 0; i < W; ++i) check(x.v[i], y.v[i], i);
    seen += W;
  }
}

constexpr uint32_t kMinus = 0x80000000u;

void test(const Kernel& kernel, uint32_t step) {
  Worst worst;
  const auto near = [&](float x, float y, int) {
    const double exact = std::exp2(static_cast<double>(x));
    const double ulps = std::fabs(static_cast<double>(y) - exact) / ulp_of(exact);
    if (!(ulps <= worst.ulps)) worst = {ulps, x};
  };
  visit(kernel, 0, bits_of(kernel.most), step, near);
  visit(kernel, kMinus, bits_of(-126.0f), step, near);
  std::printf("%s: %.3f ulp at %a, of at most %g\n", kernel.name, worst.ulps,
              static_cast<double>(worst.at), kernel.bar);
  if (!(worst.ulps <= kernel.bar)) fail(kernel.name, 0, worst.ulps, kernel.bar);
  const auto little = [&](float x, float y, int i) {
    const bool is_little = y >= 0.0f && y < 0x1.0002p-126f && (x > -200.0f || y == 0.0f);
    if (!is_little) fail("of little", i, static_cast<double>(y), 0.0);
  };
  visit(kernel, bits_of(std::nextafter(-126.0f, -200.0f)), bits_of(-kInfinity), step, little);
  const auto nan = [&](float, float y, int i) {
    if (y == y) fail("of NaN", i, static_cast<double>(y), 0.0);
  };
  visit(kernel, bits_of(kInfinity) + 1, 0x7fffffffu, step, nan);
  visit(kernel, bits_of(-kInfinity) + 1, 0xffffffffu, step, nan);
}

int run(uint32_t step) {
  test({"degree 5", T::exp2<5>, 127.0f, 3.001}, step);
  test({"degree 3", T::exp2<3>, 127.0f, 1231.0}, step);
#ifdef TARGET_HAS_BF16
  test({"of 8 bits", T::exp2_below, 8.0f, 1256.0}, step);
#endif
  std::printf("%lld floats, %d failures\n", static_cast<long long>(seen), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_gluon::cpu

int main(int count, char** arguments) {
  return jax_gluon::cpu::run(count > 1 ? static_cast<uint32_t>(std::atol(arguments[1])) : 1u);
}
