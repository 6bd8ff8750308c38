// Keys and values in pages, and the table that says which pages an entry of the batch has.
#pragma once

#include <vector>

#include "attention_call.h"
#include "ffi/buffer_reader.h"
#include "ffi/codes_reader.h"

namespace jax_gluon {

// The attributes: tokens of a page, a power of two, and how many pages an entry has.
struct Pages {
  int64_t tokens = 0, count = 0;

  explicit operator bool() const { return tokens != 0; }
};

// Only forward calls take pages, and only of codes.
Pages read_pages(BufferReader& reader, const std::vector<Format>& formats, bool is_forward);

// Fails where keys of this shape are not pages, whose number stands in place of the batch.
void check_pages(BufferReader& reader, const Pages& pages, const Shape& key);

// Reads the table, int32 [batch, pages of an entry], and has tokens of keys and values found by it:
// every number is checked against the `stored` pages that there are.
void read_page_table(BufferReader& reader, const Pages& pages, int64_t stored, int64_t batch,
                     AttentionCall& call);

}  // namespace jax_gluon
