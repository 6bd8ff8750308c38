// Which calls go to Metal, of those that may run on either device.
#pragma once

#include <cstdint>

namespace jax_gluon {

// Whether such calls may go there at all: on a Mac, unless JAX_GLUON_METAL_BY_DEFAULT is 0. With 1
// they may go to the software device too, which tests use.
bool metal_by_default();

// The work that pays for a launch, in multiply-accumulates, where `jax-gluon tune` has measured
// nothing. It has not been measured on any GPU.
constexpr int64_t kMinProductsForMetal = int64_t{1} << 28;

// Whether such a call is for Metal: enough work, and rows that its kernels take. `min_products` is
// what was measured, or -1.
bool prefers_metal(int64_t products, int64_t widest, int64_t min_products);

}  // namespace jax_gluon
