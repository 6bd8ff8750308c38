// Binds a call to the slots of shaders/bindings.h.
#pragma once

#import <Metal/Metal.h>

#include <string>
#include <vector>

#include "attention_call.h"
#include "bindings.h"
#include "metal/buffers.h"
#include "metal/commands.h"
#include "metal/context.h"

namespace jax_gluon::metal {

bool has_only(const AttentionCall& call, DType dtype);
// The type of the matrices that kernels of shaders/`stem`.metal multiply for a call.
DType forward_matrices(Context& context, const AttentionCall& call, const std::string& stem);
DType backward_matrices(const AttentionCall& call);

// The part of an attention call that its kernels share.
class AttentionEncoder {
 public:
  // Throws Error for what the kernels do not take.
  AttentionEncoder(Context& context, Buffers& buffers, const AttentionCall& call);

  void bind_results(const AttentionForwardCall& call);
  template <class Call>
  void bind_cotangents(const Call& call);
  void bind_gradients(const AttentionBackwardCall& call);
  // Before `bind_bias_gradient`: the run of the bias kernel that finds the statistics of the rows.
  void bind_bias_statistics();
  void bind_bias_gradient(const AttentionBackwardBiasCall& call);
  void bind_tangents(const AttentionTangentCall& call);
  void bind_decode(int64_t splits);

  // Kernel `name` of shaders/`stem`.metal, whose grid makes as many multiply-accumulates as
  // `passes` times QK^T and PV of the whole problem.
  void dispatch(Commands& commands, const std::string& stem, const std::string& name, MTLSize grid,
                int passes);

  // "half_64" and the like: the type of the matrices that are multiplied, and the class of the head
  // dims.
  std::string suffix(DType matrices) const;
  int head_dim() const { return head_dim_; }

 private:
  void bind_entries();
  // Numbers of heads behind the tables: sinks, then their tangents.
  void add_heads(const Operand& x);
  void bind_row_statistics();
  void bind_operand(int slot, int table, const Operand& x, const std::vector<int64_t>& extents);
  void bind_rows(int slot, int table, const QuantizableOperand& x, int64_t tokens, int64_t heads,
                 int64_t columns, RowStrides* strides, QuantizationParameters* quantization);
  void bind_result(int slot, int table, const Result& x, int64_t per_entry);
  void bind_table(int table, const std::vector<int64_t>& offsets);

  Context& context_;
  const AttentionCall& call_;
  Bindings bindings_;
  AttentionParameters parameters_ = {};
  std::vector<Int64> tables_;
  int head_dim_ = 0;
};

}  // namespace jax_gluon::metal
