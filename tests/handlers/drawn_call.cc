#include "drawn_call.h"

#include <algorithm>
#include <utility>

#include "attention_call.h"
#include "numerics.h"

namespace jax_gluon::handlers {
namespace {

using Shape = std::vector<int64_t>;

constexpr int64_t kLengths[] = {1, 2, 3, 4, 5, 7, 8, 9, 0, 15, 16, 17, 24, 31, 33, 64, 65, 70};
constexpr int64_t kWidths[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 24, 32, 33, 34, 64, 66};
constexpr size_t kFew = 8;  // of them, which most calls have: they are fast
constexpr int64_t kBlocks[] = {0, 1, 2, 3, 5, 8, 16, 32, 33, 100};
constexpr XLA_FFI_DataType kFloats[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                        XLA_FFI_DataType_F16};
constexpr XLA_FFI_DataType kScales[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                        XLA_FFI_DataType_U16};
// What an attribute or an extent may be that it should not.
constexpr int64_t kOdd[] = {
    -1,        0,         1,         2,         3,         4,         8,
    255,       4096,      4097,      0xffff,    0x10000,   1ll << 20, (1ll << 31) - 1,
    1ll << 31, 1ll << 40, 1ll << 48, 1ll << 61, 1ll << 62, INT64_MAX, INT64_MIN,
    -2,        16,        17};

// Draws a call that the handlers take, then changes some of it.
class Draw {
 public:
  explicit Draw(Bytes bytes) : bytes_(bytes) {}

  DrawnCall run() {
    call_.handler = static_cast<Handler>(bytes_.below(5));
    call_.threads = 1 + static_cast<int64_t>(bytes_.below(4));
    call_.variant = bytes_.next();
    call_.seed = bytes_.next();
    const size_t changes = bytes_.is_in(128) ? 0 : 1 + bytes_.below(3);
    for (size_t axes = bytes_.is_in(64) ? bytes_.below(3) : 0; axes > 0; --axes) {
      leading_.push_back(1 + static_cast<int64_t>(bytes_.below(3)));
    }
    B_ = bytes_.is_in(8) ? 0 : 1 + static_cast<int64_t>(bytes_.below(2));
    if (call_.handler == Handler::kQuantize) {
      quantize();
    } else {
      attention();
    }
    call_.is_sound = changes == 0;
    for (size_t i = 0; i < changes; ++i) change();
    std::sort(call_.attributes.begin(), call_.attributes.end(),
              [](const Attribute& a, const Attribute& b) { return a.name < b.name; });
    return std::move(call_);
  }

 private:
  struct Format {
    int64_t bits = 0, token_block = 0, head_block = 0, offset = 0;
    bool center = false, powers = false, made = false, per_tensor = false;
  };

  template <size_t kCount>
  int64_t extent(const int64_t (&values)[kCount]) {
    return values[bytes_.below(bytes_.is_in(64) ? kCount : kFew)];
  }

  int64_t integer(const std::string& name, int64_t value) {
    Attribute x;
    x.name = name;
    x.integer = value;
    call_.attributes.push_back(x);
    return value;
  }
  bool flag(const std::string& name, int of_256) {
    return integer(name, bytes_.is_in(of_256)) != 0;
  }
  void number(const std::string& name, float value) {
    Attribute x;
    x.name = name;
    x.kind = Attribute::Kind::kFloat;
    x.number = value;
    call_.attributes.push_back(x);
  }
  void text(const std::string& name, const char* value) {
    Attribute x;
    x.name = name;
    x.kind = Attribute::Kind::kText;
    x.text = value;
    call_.attributes.push_back(x);
  }

  DrawnBuffer buffer(XLA_FFI_DataType dtype, const Shape& shape) {
    DrawnBuffer x;
    x.dtype = dtype;
    x.extents = leading_;
    x.extents.insert(x.extents.end(), shape.begin(), shape.end());
    const uint8_t how = bytes_.next();
    x.at_end = how % 2 == 0;
    constexpr Fill kFills[] = {Fill::kSmall, Fill::kSmall, Fill::kSmall, Fill::kSmall,
                               Fill::kBits,  Fill::kWide,  Fill::kWide,  Fill::kZero};
    x.fill = kFills[how / 2 % 8];
    return x;
  }
  void operand(XLA_FFI_DataType dtype, const Shape& shape, bool may_be_one = false) {
    DrawnBuffer x = buffer(dtype, shape);
    for (size_t i = 0; i < x.extents.size(); ++i) {
      if ((i < leading_.size() || may_be_one) && bytes_.is_in(64)) x.extents[i] = 1;
    }
    call_.operands.push_back(x);
  }
  void result(XLA_FFI_DataType dtype, const Shape& shape) {
    call_.results.push_back(buffer(dtype, shape));
  }
  // Float rows, and numbers of rows, may have heads before tokens.
  Shape rows(Shape shape) const {
    if (head_major_) std::swap(shape[1], shape[2]);
    return shape;
  }

  Format format(const std::string& name, bool may_be_made) {
    Format x;
    constexpr int64_t kBits[] = {0, 0, 8, 4};
    x.bits = bytes_.pick(kBits);
    if (x.bits != 0) {
      x.token_block = bytes_.pick(kBlocks);
      x.head_block = bytes_.pick(kBlocks);
      x.offset = static_cast<int64_t>(bytes_.below(3));
      x.center = bytes_.is_in(80);
      if (bytes_.is_in(50)) {
        x.token_block = std::max<int64_t>(x.token_block, 1);
        x.head_block = 1;
        x.powers = true;
      }
    }
    integer(name + "_bits", x.bits);
    integer(name + "_token_block", x.token_block);
    integer(name + "_head_block", x.head_block);
    integer(name + "_offset", x.offset);
    integer(name + "_has_center", x.center);
    integer(name + "_has_powers", x.powers);
    if (may_be_made) {
      x.made = x.bits != 0 && bytes_.is_in(128);
      x.per_tensor = x.token_block == 0 && x.head_block == 0 && bytes_.is_in(128);
      integer(name + "_is_made", x.made);
      integer(name + "_per_tensor", x.per_tensor);
    }
    return x;
  }
  static Shape scales(const Format& x, Shape blocked) {
    if (x.powers) blocked.back() += power_cells(x.token_block);
    return blocked;
  }
  // Rows of `shape`; where tokens are in pages, `batch` has centers.
  void operand_rows(const Format& x, const Shape& shape, int64_t batch) {
    if (x.bits == 0 || x.made) return operand(bytes_.pick(kFloats), rows(shape));
    Shape stored = shape;
    if (x.bits == 4) stored.back() /= 2;
    operand(x.bits == 4 ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_S8, stored);
    const Shape blocked = {shape[0], blocks_of(shape[1], x.token_block), shape[2],
                           blocks_of(shape[3], whole_head_block(x.head_block, shape[3]))};
    operand(x.powers ? XLA_FFI_DataType_BF16 : bytes_.pick(kScales), scales(x, blocked), true);
    if (x.offset == 1) operand(XLA_FFI_DataType_S8, blocked, true);
    if (x.offset == 2) operand(bytes_.pick(kScales), blocked, true);
    if (x.center) operand(XLA_FFI_DataType_F32, {batch, 1, shape[2], shape[3]});
  }
  // Results of the quantizer.
  void result_codes(const Format& x, const Shape& shape) {
    Shape stored = shape;
    if (x.bits == 4) stored.back() /= 2;
    result(x.bits == 4 ? XLA_FFI_DataType_U8 : XLA_FFI_DataType_S8, stored);
    const Shape blocked = {shape[0], blocks_of(shape[1], x.token_block),
                           x.per_tensor ? 1 : shape[2], blocks_of(shape[3], x.head_block)};
    const auto dtype = x.powers            ? XLA_FFI_DataType_BF16
                       : bytes_.is_in(128) ? XLA_FFI_DataType_F32
                                           : XLA_FFI_DataType_BF16;
    result(dtype, scales(x, blocked));
    if (x.offset == 2) result(XLA_FFI_DataType_F32, blocked);
    if (x.offset == 1) result(XLA_FFI_DataType_S8, blocked);
    if (x.center) result(XLA_FFI_DataType_F32, {shape[0], 1, shape[2], shape[3]});
  }

  void quantize() {
    integer("device", bytes_.is_in(8) ? 1 : 0);
    Format x;
    x.bits = integer("bits", bytes_.is_in(128) ? 4 : 8);
    const bool is_symmetric = flag("symmetric", 128);
    x.offset = is_symmetric ? 0 : 1 + static_cast<int64_t>(bytes_.below(2));
    integer("float_minimum", x.offset == 2);
    x.token_block = bytes_.pick(kBlocks);
    x.head_block = bytes_.pick(kBlocks);
    x.center = bytes_.is_in(100);
    x.powers = x.center && bytes_.is_in(100);
    if (x.powers) {
      x.token_block = std::max<int64_t>(x.token_block, 1);
      x.head_block = 1;
    }
    x.per_tensor = x.token_block == 0 && x.head_block == 0 && bytes_.is_in(128);
    integer("token_block", x.token_block);
    integer("head_block", x.head_block);
    integer("per_tensor", x.per_tensor);
    integer("center", x.center);
    integer("token_powers", x.powers);
    flag("rotate", 60);
    head_major_ = flag("head_major", 60);
    const bool has_visible = flag("has_visible", 60);
    Shape shape = {B_, extent(kLengths), 1 + static_cast<int64_t>(bytes_.below(3)),
                   extent(kWidths)};
    if (x.bits == 4) shape[3] += shape[3] % 2;
    operand(bytes_.pick(kFloats), rows(shape));
    if (has_visible) operand(XLA_FFI_DataType_PRED, {shape[0], shape[1]});
    result_codes(x, shape);
  }

  void kernel() {
    constexpr const char* kKernels[] = {"baseline", "gluon", "baseline",
                                        "gluon",    "small", "decode"};
    text("cpu_kernel", bytes_.pick(kKernels));
    constexpr int64_t kSizes[] = {0, 0, 1, 16, 32, 64, 100, 128, 4096};
    integer("cpu_block_k", bytes_.pick(kSizes));
    integer("cpu_subtile", bytes_.pick(kSizes));
    constexpr int64_t kStages[] = {0, 0, 1, 2, 3, 8};
    integer("cpu_stages", bytes_.pick(kStages));
    text("metal_kernel", "baseline");
    integer("metal_min_products", -1);
    integer("device", bytes_.is_in(8) ? 1 : bytes_.is_in(32) ? 2 : 0);
  }

  void attention() {
    const bool is_forward = call_.handler == Handler::kForward;
    const bool is_tangent = call_.handler == Handler::kTangent;
    const bool is_bias = call_.handler == Handler::kBackwardBias;
    kernel();
    constexpr float kNumbers[] = {1.0f, 0.1f, -0.5f, 0.0f, 1e-30f, 1e30f};
    number("scale", bytes_.pick(kNumbers));
    number("soft_cap", bytes_.is_in(200) ? 0.0f : bytes_.is_in(128) ? 2.0f : 1e-20f);
    head_major_ = flag("head_major", 60);
    flag("causal", 80);
    constexpr int64_t kWindows[] = {-1, -1, -1, 0, 1, 5, 40, INT64_MAX / 4};
    integer("window_left", bytes_.pick(kWindows));
    integer("window_right", bytes_.pick(kWindows));
    const bool has_bias = integer("has_bias", is_bias || bytes_.is_in(40)) != 0;
    const bool has_mask = flag("has_mask", 60);
    const int64_t mask_block = integer("mask_block", has_mask && bytes_.is_in(100) ? 16 : 0);
    const bool has_query_lengths = flag("has_query_seq_lengths", 40);
    const bool has_key_lengths = flag("has_key_value_seq_lengths", 40);
    const bool has_offset = flag("has_query_offset", 40);
    const bool has_sinks = flag("has_sinks", 40);
    const bool has_segments = flag("has_segment_ids", 40);
    const bool has_positions = flag("has_positions", 40);
    const int64_t threshold = integer("dropout_threshold", bytes_.is_in(30) ? 20000 : 0);
    number("dropout_scale", 1.4f);
    const Format query = format("query", is_forward);
    const Format key = format("key", is_forward);
    const Format value = format("value", is_forward);

    const int64_t T = extent(kLengths);
    int64_t S = extent(kLengths), H = extent(kWidths);
    const int64_t K = bytes_.is_in(4) ? 0 : 1 + static_cast<int64_t>(bytes_.below(2));
    const int64_t N = K * (1 + static_cast<int64_t>(bytes_.below(3)));
    int64_t V = bytes_.is_in(180) ? H : extent(kWidths);
    if (query.bits == 4 || key.bits == 4) H += H % 2;
    if (value.bits == 4) V += V % 2;
    const auto may_page = [](const Format& x) {
      return x.bits != 0 && !x.made && x.token_block != 0 && 16 % x.token_block == 0;
    };
    const bool has_pages = is_forward && may_page(key) && may_page(value) && bytes_.is_in(160);
    int64_t stored = B_, tokens = S;
    integer("page_tokens", has_pages ? 16 : 0);
    const int64_t table = has_pages ? 1 + static_cast<int64_t>(bytes_.below(3)) : 0;
    integer("table_pages", table);
    if (has_pages) {
      stored = 1 + static_cast<int64_t>(bytes_.below(4));
      tokens = 16;
      S = 16 * table;
    }
    operand_rows(query, {B_, T, N, H}, B_);
    operand_rows(key, {stored, tokens, K, H}, B_);
    operand_rows(value, {stored, tokens, K, V}, B_);
    const Shape logits = {B_, N, T, S};
    Shape bias(4, 1);
    if (has_bias) {
      operand(bytes_.pick(kFloats), logits, true);
      const Shape& found = call_.operands.back().extents;
      bias.assign(found.end() - 4, found.end());
    }
    if (has_mask && mask_block != 0) {
      const auto tiles = static_cast<int64_t>(bytes_.below(4));
      operand(XLA_FFI_DataType_S32, {bytes_.is_in(64) ? 1 : B_, bytes_.is_in(64) ? 1 : N,
                                     blocks_of(T, 16), blocks_of(S, 16)});
      call_.operands.back().numbers = MaskBlocks::kFirstTile + tiles;
      operand(XLA_FFI_DataType_U8, {bytes_.is_in(64) ? 1 : B_, tiles, 16, 2});
    } else if (has_mask) {
      operand(XLA_FFI_DataType_PRED, logits, true);
    }
    constexpr auto kInt = XLA_FFI_DataType_S32;
    if (has_query_lengths) operand(kInt, {B_});
    if (has_key_lengths) operand(kInt, {B_});
    if (has_offset) operand(kInt, {B_});
    if (has_sinks) operand(XLA_FFI_DataType_F32, {B_, N}, true);
    if (has_segments) {
      operand(kInt, {B_, T});
      operand(kInt, {B_, S});
    }
    if (has_positions) {
      operand(kInt, {B_, T});
      operand(kInt, {B_, S});
    }
    if (threshold != 0) operand(kInt, {B_, 7});
    if (has_pages) {
      operand(kInt, {B_, table});
      call_.operands.back().numbers = stored;
    }

    const Shape out = rows({B_, T, N, V}), numbers = rows({B_, T, N});
    const auto forward_results = [&] {
      result(bytes_.pick(kFloats), out);
      result(XLA_FFI_DataType_F32, numbers);
      result(XLA_FFI_DataType_F32, numbers);
    };
    if (is_forward) {
      forward_results();
      if (flag("has_query_visible", 30)) operand(XLA_FFI_DataType_PRED, {B_, T});
      if (flag("has_key_value_visible", 30)) operand(XLA_FFI_DataType_PRED, {B_, S});
      if (query.made) result_codes(query, {B_, T, N, H});
      if (key.made) result_codes(key, {B_, S, K, H});
      if (value.made) result_codes(value, {B_, S, K, V});
    } else if (is_tangent) {
      if (flag("has_query_tangent", 128)) operand(bytes_.pick(kFloats), rows({B_, T, N, H}));
      if (flag("has_key_tangent", 128)) operand(bytes_.pick(kFloats), rows({B_, S, K, H}));
      if (flag("has_value_tangent", 128)) operand(bytes_.pick(kFloats), rows({B_, S, K, V}));
      const bool of_bias = has_bias && bytes_.is_in(128), of_sinks = has_sinks && bytes_.is_in(128);
      integer("has_bias_tangent", of_bias);
      integer("has_sinks_tangent", of_sinks);
      if (of_bias) operand(bytes_.pick(kFloats), logits, true);
      if (of_sinks) operand(XLA_FFI_DataType_F32, {B_, N}, true);
      forward_results();
      result(bytes_.pick(kFloats), out);
      result(XLA_FFI_DataType_F32, numbers);
    } else {
      const bool has_d_log_sum_exp = flag("has_d_log_sum_exp", 128);
      integer("is_partial", has_d_log_sum_exp && bytes_.is_in(80));
      operand(bytes_.pick(kFloats), out);
      operand(XLA_FFI_DataType_F32, numbers);
      operand(XLA_FFI_DataType_F32, numbers);
      operand(bytes_.pick(kFloats), out);
      if (has_d_log_sum_exp) operand(XLA_FFI_DataType_F32, numbers);
      if (is_bias) {
        result(bytes_.pick(kFloats), bias);
      } else {
        result(bytes_.pick(kFloats), rows({B_, T, N, H}));
        result(bytes_.pick(kFloats), rows({B_, S, K, H}));
        result(bytes_.pick(kFloats), rows({B_, S, K, V}));
      }
    }
  }

  // One thing that the rest of the call does not know of.
  void change() {
    auto& buffers = bytes_.is_in(160) ? call_.operands : call_.results;
    auto& attributes = call_.attributes;
    const size_t at = bytes_.next();
    const bool of_attribute = bytes_.is_in(100);
    if (attributes.empty() || (!of_attribute && buffers.empty())) return;
    if (of_attribute) {
      Attribute& x = attributes[at % attributes.size()];
      switch (bytes_.below(8)) {
        case 0:
          attributes.erase(attributes.begin() +
                           static_cast<std::ptrdiff_t>(at % attributes.size()));
          break;
        case 1:
          x.kind = static_cast<Attribute::Kind>(bytes_.below(4));
          break;
        case 2:
          x.name += bytes_.is_in(128) ? "s" : "";
          x.number = bytes_.is_in(128) ? 1.0f / 0.0f : -3e38f;
          x.text = "decoded";
          break;
        default:
          x.integer = bytes_.pick(kOdd);
      }
      return;
    }
    const auto place = buffers.begin() + static_cast<std::ptrdiff_t>(at % buffers.size());
    Shape& extents = place->extents;
    switch (bytes_.below(9)) {
      case 0:
        buffers.erase(place);
        break;
      case 1:
        buffers.push_back(DrawnBuffer(*place));
        break;
      case 2:
        place->dtype = static_cast<XLA_FFI_DataType>(bytes_.below(36));
        break;
      case 3:
        extents.insert(extents.begin(), bytes_.pick(kOdd));
        break;
      case 4:
        if (!extents.empty()) extents.pop_back();
        break;
      case 5:
        std::swap(*place, buffers[bytes_.below(buffers.size())]);
        break;
      default:
        if (!extents.empty()) extents[bytes_.below(extents.size())] = bytes_.pick(kOdd);
    }
  }

  Bytes bytes_;
  DrawnCall call_;
  Shape leading_;
  int64_t B_ = 1;
  bool head_major_ = false;
};

}  // namespace

size_t size_of(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8:
      return 1;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
    case XLA_FFI_DataType_U16:
      return 2;
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_S64:
      return 8;
    default:
      return 4;
  }
}

DrawnCall draw(Bytes bytes) { return Draw(bytes).run(); }

bool fits(const DrawnCall& call, size_t largest) {
  if (call.operands.size() + call.results.size() > 60) return false;
  for (const auto* buffers : {&call.operands, &call.results}) {
    for (const DrawnBuffer& x : *buffers) {
      bool is_empty = false;
      int64_t count = 1;
      for (size_t i = 0; i < x.extents.size(); ++i) {
        const int64_t n = x.extents[i];
        is_empty = is_empty || n <= 0;
        // Saturated: no array has as many.
        count = n > 0 && count > INT64_MAX / n ? INT64_MAX : count * std::max<int64_t>(n, 1);
        // The reader keeps a number for each entry of the batch, which empty arrays may have too.
        const bool is_batch = i + 3 < x.extents.size();
        if (is_batch && count > (1 << 16) && count <= (int64_t{1} << 31)) return false;
      }
      constexpr int64_t kImpossible = int64_t{1} << 49;
      if (is_empty || count > kImpossible) continue;
      if (static_cast<size_t>(count) * size_of(x.dtype) > largest) return false;
    }
  }
  return true;
}

}  // namespace jax_gluon::handlers
