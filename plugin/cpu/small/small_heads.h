// Heads of few keys: what they have in common, forward and backward. All keys of a head are
// computed with at once, from plain rows: packing queries into whole register tiles, an online
// softmax, and one task for each head would cost more than is left to the products.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/rows/logit_rules.h"
#include "cpu/small/head_rows.h"
#include "cpu/small/small_product.h"
#include "cpu/tiles/pack.h"
#include "device.h"

namespace jax_gluon::cpu {
namespace {

// Extents of a problem of small heads, and how it is split into tasks.
template <class Isa>
class SmallHeads {
  static constexpr int64_t W = Isa::kLanes;
  // Products of a task, at least, so that handing it out costs little.
  static constexpr int64_t kMinWork = int64_t{1} << 17;
  // What a head costs beside its products, in products.
  static constexpr int64_t kHeadWork = 2048;
  // Rows of a part of a head, at least: each loads all keys and values.
  static constexpr int64_t kMinPartRows = 96;
  // Bytes of rows that are brought into the cache at once, at most.
  static constexpr int64_t kMaxStreamed = int64_t{1} << 20;

 public:
  // Keys, at most.
  static constexpr int64_t kMaxKeys = 256;
  // Rows that are computed together, at most: as many tiles as keep their scores in the cache.
  static constexpr int64_t kMaxBlockRows = 72;
  using Rules = LogitRules<Isa, kMaxKeys>;
  using Product = SmallProduct<Isa>;

  static bool takes(const AttentionCall& call) {
    return !call.query.quantization && !call.key.quantization && !call.value.quantization &&
           call.S <= kMaxKeys && !call.dropout && call.page_tokens == 0;
  }

  explicit SmallHeads(const AttentionCall& call)
      : call_(call),
        group(call.N / std::max<int64_t>(call.K, 1)),
        columns(round_up(std::max<int64_t>(call.S, 1), W)),
        head_width(round_up(call.H, W)),
        value_width(round_up(call.V, W)),
        block_rows(block_rows_of(call.T)),
        panel_keys_(call.S % W <= kMaxDots ? call.S / W * W : columns) {}

  // Calls body(b, k, rows, scratch) for parts of the rows of every kv head, several in a task. Of
  // heads enough for all threads, or where rows are not `divisible`, all rows are one part.
  template <class Scratch, class Prepare, class Body>
  void run(Parallel& parallel, ScratchPool<Scratch>& scratch, bool divisible, Prepare prepare,
           Body body) const {
    const int64_t heads = call_.B * call_.K, wanted = 4 * std::max<int64_t>(parallel.threads(), 1);
    if (heads * group * call_.T == 0) return;
    const int64_t most_parts = divisible ? ceil_div(call_.T, kMinPartRows) : 1;
    const int64_t rows =
        round_up(ceil_div(call_.T, std::min(ceil_div(wanted, heads), most_parts)), block_rows);
    const int64_t head_parts = ceil_div(call_.T, rows), parts = heads * head_parts;
    const int64_t work =
        group * (std::min(rows, call_.T) * call_.S * (call_.H + call_.V) + kHeadWork);
    const int64_t run =
        std::min(ceil_div(kMinWork, work), std::max<int64_t>(ceil_div(parts, wanted), 1));
    parallel.run(ceil_div(parts, run), [&](int64_t task) {
      auto lease = scratch.acquire();
      prepare(*lease);
      const int64_t end = std::min(parts, (task + 1) * run);
      for (int64_t part = task * run; part < end; ++part) {
        const int64_t head = part / head_parts, first = part % head_parts * rows;
        body(head / call_.K, head % call_.K, Range{first, std::min(first + rows, call_.T)}, *lease);
      }
    });
  }

  // Brings rows of all heads of a batch entry into the cache, if there they stay until they are
  // used: those that a part with these rows of kv head k is the first to read.
  void stream(int64_t b, int64_t k, Range rows, const Operand* d_out = nullptr) const {
    const int64_t query =
        row_bytes(call_.query, call_.H) + (d_out ? row_bytes(*d_out, call_.V) : 0);
    const int64_t key_value = row_bytes(call_.key, call_.H) + row_bytes(call_.value, call_.V);
    const int64_t bytes = call_.T * call_.N * query + call_.S * call_.K * key_value;
    if (k != 0 || rows.end - rows.begin < call_.T || bytes > kMaxStreamed) return;
    stream_heads(call_.query, b, 0, call_.T, call_.N, call_.H);
    if (d_out) stream_heads(*d_out, b, 0, call_.T, call_.N, call_.V);
    stream_heads(call_.key, b, 0, call_.S, call_.K, call_.H);
    stream_heads(call_.value, b, 0, call_.S, call_.K, call_.V);
  }

  struct Piece {
    float** place;
    int64_t size;
  };
  // Makes room for the pieces of a scratch, zeros: what pads rows stays so.
  static void lay_out(Buffer<float>& memory, std::initializer_list<Piece> pieces) {
    int64_t total = 0;
    for (const Piece& piece : pieces) total += round_up(piece.size, W);
    memory.allocate(total + W);
    std::fill(memory.get(), memory.get() + total, 0.0f);
    float* at = memory.get();
    for (const Piece& piece : pieces) {
      *piece.place = at;
      at += round_up(piece.size, W);
    }
  }

  // Room for rows as right operand of scores().
  int64_t panels_size(int64_t width) const {
    return width * round_up(panel_keys_, Product::kPanel);
  }
  // Rows [columns][width], zeros beyond the last key, as panels of columns.
  void to_panels(const float* rows, int64_t width, float* out) const {
    constexpr int64_t P = Product::kPanel;
    for (int64_t j = 0; j < panel_keys_; j += W) {
      float* panel = out + j / P * P * width + j % P;
      for (int64_t h = 0; h < width; h += W) {
        typename Isa::F x[W];
        for (int64_t i = 0; i < W; ++i) x[i] = Isa::load(rows + (j + i) * width + h);
        transpose<Isa>(x);
        for (int64_t i = 0; i < W; ++i) Isa::store(panel + (h + i) * P, x[i]);
      }
    }
  }
  // The columns of scores, whole vectors, that have all of these keys.
  Range columns_of(Range keys) const {
    if (keys.empty()) return {0, 0};
    return {keys.begin / Product::kPanel * Product::kPanel, round_up(keys.end, W)};
  }

  // Rows of `width` elements: as they are, and what to_panels made of them.
  struct Right {
    const float *rows, *panels;
    int64_t width, elements;  // of which the rest is padding
  };
  // out[i][j] = row i of `left` . row j of `right` for some columns, of which those of no key may
  // have anything finite.
  void scores(const float* left, int64_t rows, const Right& right, Range some, float* out) const {
    constexpr int64_t P = Product::kPanel;
    const int64_t end = some.end == columns ? panel_keys_ : some.end;
    if (some.begin < end) {
      Product::run({left, rows, right.width, 1},
                   {right.panels + some.begin * right.width, right.elements, P, P * right.width},
                   end - some.begin, out + some.begin, columns);
    }
    for (int64_t j = end; j < std::min(some.end, call_.S); ++j) {
      const float* row = right.rows + j * right.width;
      for (int64_t i = 0; i < rows; ++i) {
        // Rows are padded with zeros.
        out[i * columns + j] = dot<Isa>(left + i * right.width, row, right.width);
      }
    }
  }

 private:
  // So few keys beyond whole vectors have dot products: a column of them would be padding for the
  // most part.
  static constexpr int64_t kMaxDots = 2;

  // Blocks as even as whole tiles make them: of a last block with a row or two, the loads would
  // cost more than the products.
  static int64_t block_rows_of(int64_t rows) {
    const int64_t even = ceil_div(rows, std::max<int64_t>(ceil_div(rows, kMaxBlockRows), 1));
    return std::max<int64_t>(round_up(even, Isa::kTileRows), Isa::kTileRows);
  }

  const AttentionCall& call_;

 public:
  const int64_t group;                             // query heads of a kv head
  const int64_t columns, head_width, value_width;  // whole vectors: of scores, of rows
  const int64_t block_rows;                        // rows of a block

 private:
  const int64_t panel_keys_;  // whose scores are products of panels
};

}  // namespace
}  // namespace jax_gluon::cpu
