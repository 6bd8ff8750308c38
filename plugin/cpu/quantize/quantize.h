// Float rows to codes of any format: extremes of each block that shares a scale, the scale (and
// zero point or minimum) as it is stored, then codes computed from the stored numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/quantize/extremes.h"
#include "cpu/quantize/rotation.h"
#include "cpu/rows/quantized_rows.h"
#include "cpu/rows/token_center.h"
#include "cpu/rows/token_powers.h"
#include "cpu/rows/visibility.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class Quantize {
  using F = typename Isa::F;
  using Extremes = ColumnExtremes<Isa>;
  static constexpr int64_t W = Isa::kLanes;
  static constexpr int64_t kTokens = 256;  // of a task
  // A step below this counts as zero: dividing by it, or halving it, might leave the normal
  // numbers.
  static constexpr float kMinScale = 0x1p-125f;

 public:
  Quantize(const QuantizeCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        width_(round_up(call.H, W)),
        scales_(call.head_block == 0 ? 1 : ceil_div(call.H, call.head_block)),
        power_cells_(call.has_powers ? power_cells(call.token_block) : 0),
        highest_(call.bits == 8 ? 127.0f : 7.0f),
        lowest_(call.symmetric ? -highest_ : -highest_ - 1.0f) {}

  void run() {
    if (call_.rotate) rotation_.prepare(call_.H);
    if (call_.is_centered) {
      if (call_.has_powers) ordinary_norm_.allocate(call_.B * call_.K);
      parallel_.run(call_.B * call_.K, [this](int64_t task) { find_center(task); });
    }
    if (call_.token_block == 0) {
      quantize_whole_axis();
      return;
    }
    const int64_t step =
        round_up(std::max(call_.token_block, std::min(kTokens, call_.S)), call_.token_block);
    const int64_t chunks = ceil_div(call_.S, step);
    parallel_.run(call_.B * chunks, [this, step, chunks](int64_t task) {
      const int64_t b = task / chunks, begin = task % chunks * step;
      if (call_.bits == 8 && call_.symmetric && call_.token_block == 1 && call_.head_block == 0 &&
          !call_.rotate && call_.H >= W) {
        quantize_rows(b, {begin, std::min(call_.S, begin + step)});
        return;
      }
      Scratch s(*this);
      for (int64_t i = begin; i < std::min(call_.S, begin + step); i += call_.token_block) {
        const int64_t end = std::min(call_.S, i + call_.token_block);
        for (int64_t k = 0; k < call_.K; ++k) quantize_block(b, k, i, end, s);
      }
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Quantize& q) : memory(6 * q.width_), codes(q.width_) {
      row = memory.get();
      extremes = {row + q.width_, q.width_};
      divisor = row + 4 * q.width_;
      offset = divisor + q.width_;
    }
    Buffer<float> memory;
    Buffer<int8_t> codes;
    float* row;
    Extremes extremes;
    float *divisor, *offset;  // of each element: scale, and zero point or minimum
  };

  float* center_of(int64_t b, int64_t k) const {
    return static_cast<float*>(call_.center.data) + (b * call_.K + k) * call_.H;
  }

  bool is_visible(int64_t b, int64_t i) const {
    return !call_.visible || call_.visible[call_.visible_offset[static_cast<size_t>(b)] + i] != 0;
  }

  // Row (b, i, k) as float32, rotated and zero-padded; not yet centered.
  void load(int64_t b, int64_t i, int64_t k, float* row) const {
    load_row<Isa>(row_of(call_.x, b, i, k), call_.x.dtype, call_.H, row);
    std::fill(row + call_.H, row + width_, 0.0f);
    if (call_.rotate) rotation_.apply(row);
  }

  // Zeros where the token can't be seen.
  void load_centered(int64_t b, int64_t i, int64_t k, float* row) const {
    if (!is_visible(b, i)) {
      std::fill(row, row + width_, 0.0f);
      return;
    }
    load(b, i, k, row);
    if (!call_.is_centered) return;
    const float* center = center_of(b, k);
    int64_t h = 0;
    for (; h + W <= call_.H; h += W) {
      Isa::store(row + h, centered(Isa::load(row + h), Isa::load(center + h)));
    }
    constexpr float kLargest = std::numeric_limits<float>::max();
    for (; h < call_.H; ++h) {
      const float x = std::min(std::max(row[h] - center[h], -kLargest), kLargest);
      row[h] = std::fabs(row[h]) <= kLargest ? x : row[h];
    }
  }

  // The row as it becomes codes, and the power of 4 that it was divided by.
  int load_divided(int64_t b, int64_t i, int64_t k, float* row) const {
    load_centered(b, i, k, row);
    if (!call_.has_powers) return 0;
    const int power = token_power(dot<Isa>(row, row, width_), ordinary_norm_[b * call_.K + k]);
    if (power != 0) scale_row<Isa>(row, width_, std::ldexp(1.0f, -2 * power));
    return power;
  }

  // x less the center; a difference of two finite numbers is kept finite.
  static F centered(F x, F center) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    const F largest = Isa::set1(kLargest), lowest = Isa::set1(-kLargest);
    const F infinity = Isa::set1(std::numeric_limits<float>::infinity());
    F difference = Isa::max(Isa::sub(x, center), lowest);
    difference = Isa::where_less(difference, largest, difference, largest);
    return Isa::where_less(Isa::abs(x), infinity, difference, x);
  }

  // Any finite number keeps softmax's invariance exact.
  void find_center(int64_t task) const {
    const int64_t b = task / call_.K, k = task % call_.K;
    Buffer<float> scratch((kCenterTokens + 1) * width_);
    float *rows = scratch.get(), *center = rows + kCenterTokens * width_;
    int64_t count = 0, tokens[kCenterTokens];
    for (int64_t i = 0; i < call_.S && count < kCenterTokens; ++i) {
      if (!is_visible(b, i)) continue;
      load(b, i, k, rows + count * width_);
      tokens[count++] = i;
    }
    median_of_rows<Isa>(rows, count, width_, width_, center);
    std::copy(center, center + call_.H, center_of(b, k));
    if (!call_.has_powers) return;
    // The same of the rows' norms.
    float norms[kCenterTokens * W];
    std::fill(norms, norms + kCenterTokens * W, 0.0f);
    for (int64_t c = 0; c < count; ++c) {
      load_centered(b, tokens[c], k, rows);
      norms[c * W] = dot<Isa>(rows, rows, width_);
    }
    float median[W];
    median_of_rows<Isa>(norms, count, W, W, median);
    ordinary_norm_[task] = median[0] >= kMinOrdinaryNorm ? median[0] : 0.0f;
  }

  // Symmetric 8-bit rows, straight from the operand.
  void quantize_rows(int64_t b, Range tokens) const {
    switch (call_.x.dtype) {
      case DType::kF32:
        return quantize_rows_of<float>(b, tokens, [](const float* p) { return Isa::load(p); });
      case DType::kBF16:
        return quantize_rows_of<uint16_t>(b, tokens,
                                          [](const uint16_t* p) { return Isa::load_bf16(p); });
      default:
        return quantize_rows_of<uint16_t>(b, tokens,
                                          [](const uint16_t* p) { return Isa::load_f16(p); });
    }
  }

  template <class Stored, class Load>
  void quantize_rows_of(int64_t b, Range tokens, Load load) const {
    for (int64_t i = tokens.begin; i < tokens.end; ++i) {
      const int64_t first = (b * call_.S + i) * call_.K;
      for (int64_t k = 0; k < call_.K; ++k) {
        const Stored* x = static_cast<const Stored*>(row_of(call_.x, b, i, k));
        const float* center = call_.is_centered ? center_of(b, k) : nullptr;
        int8_t* codes = static_cast<int8_t*>(call_.data.data) + (first + k) * call_.H;
        float* scale = static_cast<float*>(call_.scale.data) + first + k;
        if (!is_visible(b, i)) {
          std::fill(codes, codes + call_.H, static_cast<int8_t>(0));
          *scale = 0.0f;
          continue;
        }
        if (center) {
          round_row([&](int64_t h) { return centered(load(x + h), Isa::load(center + h)); }, codes,
                    scale);
        } else {
          round_row([&](int64_t h) { return load(x + h); }, codes, scale);
        }
      }
    }
  }

  // Calls body with where the vectors of a row start; the last ends with it, and may overlap.
  template <class Body>
  void each_vector(Body body) const {
    int64_t h = 0;
    for (; h + W <= call_.H; h += W) body(h);
    if (h < call_.H) body(call_.H - W);
  }

  // element(h) is a vector of a row.
  template <class Element>
  void round_row(Element element, int8_t* codes, float* scale) const {
    F max = Isa::zero(), probe = Isa::zero();
    each_vector([&](int64_t h) {
      const F x = element(h);
      max = Isa::max(Isa::abs(x), max);
      probe = Isa::fma(x, Isa::zero(), probe);  // NaN once x is not finite
    });
    const float largest = Isa::reduce_max(max) + Isa::reduce_add(probe);
    float step = largest / highest_;
    if (step < kMinScale) step = 0.0f;
    *scale = step;
    // Codes of a row without a usable scale are 0.
    const F divisor = Isa::set1(step > 0.0f ? step : std::numeric_limits<float>::infinity());
    each_vector([&](int64_t h) {
      const F code = Isa::div(element(h), divisor);
      Isa::store_s8(codes + h, Isa::to_int(step > 0.0f ? code : Isa::zero()));
    });
  }

  // Tokens [begin, end) of one head, which share scales.
  void quantize_block(int64_t b, int64_t k, int64_t begin, int64_t end, Scratch& s) const {
    if (call_.token_block == 1 && !call_.has_powers) {
      load_centered(b, begin, k, s.row);
      const int64_t block = block_index(b, begin, k), size = head_block();
      for (int64_t c = 0; c < scales_; ++c) {
        float low, high;
        find_extremes<Isa>(s.row + c * size, std::min(size, call_.H - c * size), &low, &high);
        store_parameters_of(block, c, low, high);
      }
      load_parameters(b, begin, k, s);
      store_codes(b, begin, k, s);
      return;
    }
    s.extremes.clear();
    for (int64_t i = begin; i < end; ++i) {
      if (!is_visible(b, i)) continue;
      load_divided(b, i, k, s.row);
      s.extremes.add(s.row);
    }
    store_parameters(b, begin / call_.token_block, k, s.extremes);
    load_parameters(b, begin / call_.token_block, k, s);
    uint16_t* cells = power_cells_of(block_index(b, begin / call_.token_block, k));
    std::fill(cells, cells + power_cells_, static_cast<uint16_t>(0));
    for (int64_t i = begin; i < end; ++i) {
      const int power = load_divided(b, i, k, s.row);
      if (call_.has_powers) add_power(cells, i - begin, power);
      store_codes(b, i, k, s);
    }
    for (int64_t c = 0; c < power_cells_; ++c) cells[c] = power_cell_of(cells[c]);
  }

  uint16_t* power_cells_of(int64_t block) const {
    return static_cast<uint16_t*>(call_.scale.data) + scale_index(block) + scales_;
  }
  static void add_power(uint16_t* cells, int64_t token, int power) {
    cells[token / kPowersInCell] =
        static_cast<uint16_t>(cells[token / kPowersInCell] | power << 3 * (token % kPowersInCell));
  }

  // Scales shared by all tokens: extremes of chunks of tokens, then of heads or of everything, then
  // codes.
  void quantize_whole_axis() {
    const int64_t chunks = std::max<int64_t>(1, ceil_div(call_.S, kTokens)), heads = call_.K;
    Buffer<float> extremes(call_.B * heads * chunks * 3 * width_);
    const auto of = [&](int64_t b, int64_t k, int64_t chunk) {
      return Extremes{extremes.get() + ((b * heads + k) * chunks + chunk) * 3 * width_, width_};
    };
    parallel_.run(call_.B * heads * chunks, [&](int64_t task) {
      const int64_t chunk = task % chunks, k = task / chunks % heads, b = task / chunks / heads;
      Buffer<float> row(width_);
      const Extremes x = of(b, k, chunk);
      x.clear();
      for (int64_t i = chunk * kTokens; i < std::min(call_.S, (chunk + 1) * kTokens); ++i) {
        if (!is_visible(b, i)) continue;
        load_centered(b, i, k, row.get());
        x.add(row.get());
      }
    });
    const int64_t batch = call_.B / std::max<int64_t>(call_.L, 1);
    for (int64_t b = 0; b < call_.B; ++b) {
      for (int64_t k = 0; k < heads; ++k) {
        for (int64_t chunk = 1; chunk < chunks; ++chunk) of(b, k, 0).merge(of(b, k, chunk));
      }
      if (!call_.per_tensor) {
        for (int64_t k = 0; k < heads; ++k) store_parameters(b, 0, k, of(b, k, 0));
        continue;
      }
      for (int64_t k = 1; k < heads; ++k) of(b, 0, 0).merge(of(b, k, 0));
      if (b % batch != 0) of(b - b % batch, 0, 0).merge(of(b, 0, 0));
    }
    for (int64_t b = 0; call_.per_tensor && heads > 0 && b < call_.B; ++b) {
      store_parameters(b, 0, 0, of(b - b % batch, 0, 0));
    }
    parallel_.run(call_.B * heads * chunks, [&](int64_t task) {
      const int64_t chunk = task % chunks, k = task / chunks % heads, b = task / chunks / heads;
      Scratch s(*this);
      load_parameters(b, 0, k, s);
      for (int64_t i = chunk * kTokens; i < std::min(call_.S, (chunk + 1) * kTokens); ++i) {
        load_centered(b, i, k, s.row);
        store_codes(b, i, k, s);
      }
    });
  }

  // Of the block of tokens `block` of a head among all that are stored.
  int64_t block_index(int64_t b, int64_t block, int64_t k) const {
    const int64_t blocks = call_.token_block == 0 ? 1 : ceil_div(call_.S, call_.token_block);
    const int64_t heads = call_.per_tensor ? 1 : call_.K;
    return (b * blocks + block) * heads + (call_.per_tensor ? 0 : k);
  }
  // Of the first scale of such a block, and of its first offset.
  int64_t scale_index(int64_t block) const { return block * (scales_ + power_cells_); }
  int64_t offset_index(int64_t block) const { return block * scales_; }

  void store_parameters(int64_t b, int64_t block, int64_t k, const Extremes& extremes) const {
    const int64_t index = block_index(b, block, k), size = head_block();
    for (int64_t c = 0; c < scales_; ++c) {
      float low = std::numeric_limits<float>::infinity(), high = -low, finite = 0.0f;
      for (int64_t h = c * size; h < std::min(call_.H, (c + 1) * size); ++h) {
        low = std::min(low, extremes.min()[h]);
        high = std::max(high, extremes.max()[h]);
        finite += extremes.probe()[h];
      }
      if (finite != 0.0f) low = high = finite;  // NaN
      if (low > high) low = high = 0.0f;        // no tokens
      store_parameters_of(index, c, low, high);
    }
  }

  int64_t head_block() const { return call_.head_block == 0 ? call_.H : call_.head_block; }

  // Of the c-th scale of a block.
  void store_parameters_of(int64_t block, int64_t c, float low, float high) const {
    const float levels = highest_ - lowest_;
    float scale, minimum = 0.0f;
    if (call_.symmetric) {
      scale = std::max(-low, high) / highest_;
    } else if (call_.float_minimum) {
      minimum = call_.offset.dtype == DType::kBF16 ? -round_up_to_bf16(-low) : low;
      scale = high / levels - minimum / levels;
    } else {
      low = std::min(low, 0.0f);
      high = std::max(high, 0.0f);
      scale = high / levels - low / levels;
    }
    // std::min and max may drop a NaN.
    if (high != high) scale = high;
    if (call_.scale.dtype == DType::kBF16) {
      // Rounded down, the ends of a block lose at most 2^-9 of its steps: little of 15, half of one
      // of 255.
      scale = call_.bits == 4 ? float_from_bf16(bf16_from_float(scale)) : round_up_to_bf16(scale);
    }
    if (scale < kMinScale) scale = 0.0f;
    store_float(call_.scale, scale_index(block) + c, scale);
    const int64_t index = offset_index(block) + c;
    if (call_.float_minimum) {
      store_float(call_.offset, index, minimum);
    } else if (!call_.symmetric) {
      const float zero = std::nearbyint(lowest_ - low / scale);
      static_cast<int8_t*>(call_.offset.data)[index] =
          static_cast<int8_t>(scale > 0.0f ? std::min(std::max(zero, lowest_), highest_) : 0.0f);
    }
  }

  static void store_float(const Result& out, int64_t index, float x) {
    if (out.dtype == DType::kBF16) {
      static_cast<uint16_t*>(out.data)[index] = bf16_from_float(x);
    } else {
      static_cast<float*>(out.data)[index] = x;
    }
  }

  // What was stored for a block, spread over the elements of a row.
  void load_parameters(int64_t b, int64_t block, int64_t k, Scratch& s) const {
    const int64_t index = block_index(b, block, k), size = head_block();
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    std::fill(s.divisor, s.divisor + width_, kInfinity);
    std::fill(s.offset, s.offset + width_, 0.0f);
    for (int64_t c = 0; c < scales_; ++c) {
      const int64_t begin = c * size, end = std::min(call_.H, begin + size);
      const float scale = float_at(call_.scale.data, call_.scale.dtype, scale_index(index) + c);
      // Codes of a block without a usable scale are 0.
      std::fill(s.divisor + begin, s.divisor + end, scale > 0.0f ? scale : kInfinity);
      if (call_.symmetric) continue;
      const float offset = float_at(call_.offset.data, call_.offset.dtype, offset_index(index) + c);
      std::fill(s.offset + begin, s.offset + end, offset);
    }
  }

  enum class Mode : uint8_t { kSymmetric, kZeroPoint, kMinimum };

  void store_codes(int64_t b, int64_t i, int64_t k, Scratch& s) const {
    if (call_.symmetric) return store_codes_of<Mode::kSymmetric>(b, i, k, s);
    if (call_.float_minimum) return store_codes_of<Mode::kMinimum>(b, i, k, s);
    store_codes_of<Mode::kZeroPoint>(b, i, k, s);
  }

  template <Mode kMode>
  void store_codes_of(int64_t b, int64_t i, int64_t k, Scratch& s) const {
    const int64_t index = (b * call_.S + i) * call_.K + k, H = call_.H;
    if (call_.bits == 8) {
      int8_t* out = static_cast<int8_t*>(call_.data.data) + index * H;
      int64_t h = 0;
      for (; h + W <= H; h += W) Isa::store_s8(out + h, Isa::to_int(code_of<kMode>(s, h)));
      if (h == H) return;
      Isa::store_s8(s.codes.get(), Isa::to_int(code_of<kMode>(s, h)));
      std::memcpy(out + h, s.codes.get(), static_cast<size_t>(H - h));
      return;
    }
    // Two codes, each larger by 8, in a byte: the even one is the low nibble.
    uint8_t* out = static_cast<uint8_t*>(call_.data.data) + index * (H / 2);
    const F sixteen = Isa::set1(16.0f), bias = Isa::set1(8.0f + 16.0f * 8.0f);
    for (int64_t h = 0; h < H; h += 2 * W) {
      F codes[2];
      const F second = h + W < width_ ? code_of<kMode>(s, h + W) : Isa::zero();
      Isa::deinterleave(code_of<kMode>(s, h), second, codes);
      const auto bytes = Isa::to_int(Isa::add(Isa::fma(codes[1], sixteen, codes[0]), bias));
      if (h + 2 * W <= H) {
        Isa::store_u8(out + h / 2, bytes);
      } else {
        uint8_t last[W];
        Isa::store_u8(last, bytes);
        std::memcpy(out + h / 2, last, static_cast<size_t>((H - h) / 2));
      }
    }
  }

  // Codes of elements h.. of the row at hand, as floats.
  template <Mode kMode>
  F code_of(const Scratch& s, int64_t h) const {
    const F zero = Isa::zero(), lowest = Isa::set1(lowest_), highest = Isa::set1(highest_);
    const F half = Isa::set1(0.5f), largest = Isa::set1(1e30f);
    const F x = Isa::load(s.row + h), divisor = Isa::load(s.divisor + h);
    F code;
    if constexpr (kMode == Mode::kMinimum) {
      // Halves: the difference of two floats may be more than the largest.
      const F distance = Isa::sub(Isa::mul(x, half), Isa::mul(Isa::load(s.offset + h), half));
      code = Isa::div(distance, Isa::mul(divisor, half));
    } else {
      code = Isa::div(x, divisor);
    }
    // What is not finite has no scale either.
    code = Isa::where_less(Isa::abs(code), largest, code, zero);
    code = Isa::to_float(Isa::to_int(code));
    if constexpr (kMode == Mode::kMinimum) code = Isa::add(code, lowest);
    if constexpr (kMode == Mode::kZeroPoint) code = Isa::add(code, Isa::load(s.offset + h));
    code = Isa::max(code, lowest);
    return Isa::where_less(code, highest, code, highest);
  }

  const QuantizeCall& call_;
  Parallel& parallel_;
  const int64_t width_, scales_, power_cells_;
  const float highest_, lowest_;
  Rotation rotation_;
  Buffer<float> ordinary_norm_;  // squared, of each head
};

}  // namespace
}  // namespace jax_gluon::cpu
