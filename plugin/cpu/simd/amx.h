// AMX beside AVX-512: eight tile registers of 16 rows of 64 bytes, and their products.
// JAX_GLUON_EMULATE_AVX512 compiles the same text on emulated instructions.
#pragma once

#include "cpu/simd/avx512.h"

#ifdef JAX_GLUON_EMULATE_AVX512
#include "cpu/simd/amx_emulated.h"
#endif

namespace jax_gluon::cpu {
namespace {

#ifndef JAX_GLUON_EMULATE_AVX512
// The compiler's own functions for tiles don't say that they touch memory: stores of what a tile
// multiplies could move past its load. Tiles are no operands of these statements: nothing else uses
// them.
struct TileRegisters {
  static void store_config(void* config) {
    __asm__ volatile("sttilecfg %0" : "=m"(*static_cast<char (*)[64]>(config)));
  }
  static void load_config(const void* config) {
    __asm__ volatile("ldtilecfg %0" ::"m"(*static_cast<const char (*)[64]>(config)) : "memory");
  }
  static void release() { __asm__ volatile("tilerelease" ::: "memory"); }

  template <int kTile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile) : "memory");
  }
  template <int kTile>
  static void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(stride) : "memory");
  }
  // Of what is read once: it is not to displace what L1 holds.
  template <int kTile>
  static void stream(const void* p, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(stride)
                     : "memory");
  }
  template <int kTile>
  static void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(stride) : "memory");
  }
  // c += a b: rows of a are 16 times 4 int8 or 2 bfloat16, those of b 4 or 2 for each of 16
  // columns.
  template <int c, int a, int b>
  static void dot_s8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b) : "memory");
  }
  template <int c, int a, int b>
  static void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b) : "memory");
  }
};
#endif

struct Amx : Avx512 {
  static constexpr bool kHasTiles = true;
  using Tile = TileRegisters;
  static constexpr int64_t kTileStride = 64;

  // Whole tiles for this thread, for as long as it lives. What the thread had configured before is
  // put back: libraries remember that they did.
  class Tiles {
   public:
    Tiles() {
      Config whole = {};
      whole.palette = 1;
      for (int t = 0; t < 8; ++t) {
        whole.row_bytes[t] = static_cast<uint16_t>(kTileStride);
        whole.rows[t] = 16;
      }
      Tile::store_config(&before_);
      Tile::load_config(&whole);
    }
    ~Tiles() {
      if (before_.palette == 0) {
        Tile::release();
      } else {
        Tile::load_config(&before_);
      }
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

   private:
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);
    Config before_ = {};
  };
};

}  // namespace
}  // namespace jax_gluon::cpu
