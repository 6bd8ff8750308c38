// Binds a call to the slots of shaders/bindings.h.
#pragma once

#import <Metal/Metal.h>

#include <string>
#include <vector>

#include "attention_call.h"
#include "bindings.h"
#include "metal/buffers.h"
#include "metal/context.h"

namespace jax_gluon::metal {

// Consecutive entries of the flat batch.
struct BatchRange {
  int64_t begin, end;
};

// Slots with what is bound to them, whatever the kernel; a slot without is bound to memory that no
// kernel uses.
class Bindings {
 public:
  Bindings(Context& context, Buffers& buffers, int slots);

  void read(int slot, const void* address, size_t bytes);
  void write(int slot, void* address, size_t bytes);
  void scratch(int slot, size_t bytes);

  void dispatch(id<MTLCommandBuffer> commands, id<MTLComputePipelineState> pipeline, MTLSize grid);

 private:
  Context& context_;
  Buffers& buffers_;
  std::vector<Buffers::Range> ranges_;
};

// The part of an attention call that its kernels share.
class AttentionEncoder {
 public:
  // Throws Error for what the kernels do not take.
  AttentionEncoder(Context& context, Buffers& buffers, const AttentionCall& call, BatchRange batch);

  void bind_results(const AttentionForwardCall& call);
  template <class Call>
  void bind_cotangents(const Call& call);
  void bind_gradients(const AttentionBackwardCall& call);
  void bind_bias_gradient(const AttentionBackwardBiasCall& call);
  void bind_decode(int64_t splits);

  // Kernel `name` of shaders/`stem`.metal on threadgroups of 128 threads.
  void dispatch(id<MTLCommandBuffer> commands, const std::string& stem, const std::string& name,
                MTLSize grid);

  // "half_64" and the like: the type of the matrices that are multiplied, and the class of the head
  // dims.
  std::string forward_suffix() const { return forward_type() + "_" + std::to_string(head_dim_); }
  std::string backward_suffix() const;
  int head_dim() const { return head_dim_; }
  int64_t entries() const { return batch_.end - batch_.begin; }

 private:
  std::string forward_type() const;
  bool is_quantized() const;
  void bind_operand(int slot, int table, const Operand& x, const std::vector<int64_t>& extents);
  void bind_rows(int slot, int table, const QuantizableOperand& x, int64_t tokens, int64_t heads,
                 int64_t columns, RowStrides* strides, QuantizationParameters* quantization);
  void bind_result(int slot, int table, const Result& x, int64_t per_entry);
  void bind_table(int table, const std::vector<int64_t>& offsets);

  Context& context_;
  const AttentionCall& call_;
  const BatchRange batch_;
  Bindings bindings_;
  AttentionParameters parameters_ = {};
  std::vector<Int64> tables_;
  int head_dim_ = 0;
};

}  // namespace jax_gluon::metal
