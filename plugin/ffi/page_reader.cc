#include "ffi/page_reader.h"

#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMinPageTokens = 16, kMaxPageTokens = 256;
constexpr int64_t kMaxPages = int64_t{1} << 31;

int shift_of(int64_t tokens) {
  int shift = 0;
  while (int64_t{1} << shift < tokens) ++shift;
  return shift;
}

// Where the pages of each entry start in an operand, of which `batch_offset` has where each page
// that is stored does.
void find_pages(const Pages& pages, const std::vector<int64_t>& numbers, Operand& x) {
  if (!x) return;
  const std::vector<int64_t> stored = std::move(x.batch_offset);
  x.batch_offset.clear();
  x.batch_offset.reserve(numbers.size());
  for (const int64_t number : numbers) {
    x.batch_offset.push_back(stored[static_cast<size_t>(number)]);
  }
  x.pages = pages.count;
  x.page_shift = shift_of(pages.tokens);
}

}  // namespace

Pages read_pages(BufferReader& reader, const std::vector<Format>& formats, bool is_forward) {
  Pages pages;
  pages.tokens = reader.integer("page_tokens", 0, kMaxPageTokens);
  pages.count = reader.integer("table_pages", 0, kMaxPages);
  if (!pages) return pages;
  const auto fail = [&](const std::string& expected) {
    reader.fail("attribute page_tokens is " + std::to_string(pages.tokens) + ", expected " +
                expected);
  };
  if (!is_forward) fail("0 but in a forward call");
  if (pages.tokens < kMinPageTokens || (pages.tokens & (pages.tokens - 1)) != 0) {
    fail("0 or a power of two from " + std::to_string(kMinPageTokens) + " to " +
         std::to_string(kMaxPageTokens));
  }
  if (pages.count == 0) reader.fail("attribute table_pages is 0, expected at least 1");
  for (size_t i = 1; i < formats.size(); ++i) {
    const Format& format = formats[i];
    if (format.is_float()) {
      fail("0 where keys or values are not codes");
    } else if (format.token_block == 0 || pages.tokens % format.token_block != 0) {
      fail("a multiple of blocks of tokens, here " + std::to_string(format.token_block));
    }
  }
  return pages;
}

void check_pages(BufferReader& reader, const Pages& pages, const Shape& key) {
  if (pages && !reader.failed() && key[1] != pages.tokens) {
    reader.fail("operand key has pages of " + std::to_string(key[1]) + " tokens, expected " +
                std::to_string(pages.tokens));
  }
}

void read_page_table(BufferReader& reader, const Pages& pages, int64_t stored, int64_t batch,
                     AttentionCall& call) {
  TokenIntegers table;
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  table.data = static_cast<const int32_t*>(reader.operand("page_table", {batch, pages.count}, false,
                                                          {ffi::DataType::S32}, &dtype,
                                                          &table.batch_offset, &strides));
  if (reader.failed()) return;
  std::vector<int64_t> numbers;
  numbers.reserve(static_cast<size_t>(call.B * pages.count));
  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t first = b / batch * stored;  // of the entry's vmap axes
    for (int64_t i = 0; i < pages.count; ++i) {
      const int64_t page = table.data[table.batch_offset[static_cast<size_t>(b)] + i];
      if (page < 0 || page >= stored) {
        return reader.fail("operand page_table has page " + std::to_string(page) + " at " +
                           to_string({b, i}) + ", expected 0 to " + std::to_string(stored - 1));
      }
      numbers.push_back(first + page);
    }
  }
  call.page_tokens = pages.tokens;
  for (QuantizableOperand* x : {&call.key, &call.value}) {
    find_pages(pages, numbers, *x);
    find_pages(pages, numbers, x->quantization.scale);
    find_pages(pages, numbers, x->quantization.offset);
  }
}

}  // namespace jax_gluon
