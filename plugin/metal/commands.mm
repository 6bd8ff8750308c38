#include "metal/commands.h"

#include <algorithm>

namespace jax_gluon::metal {
namespace {

// What setBytes takes at most.
constexpr size_t kMaxBytes = 4096;
static_assert(sizeof(AttentionParameters) <= kMaxBytes && sizeof(QuantizeParameters) <= kMaxBytes,
              "parameters are bytes of the command buffer");

}  // namespace

Bindings::Bindings(Context& context, Buffers& buffers, int slots)
    : context_(context), buffers_(buffers), slots_(static_cast<size_t>(slots)) {
  const Buffers::Range nothing = {context.scratch(256), 0};
  for (Slot& slot : slots_) slot.range = nothing;
}

void Bindings::read(int slot, const void* address, size_t bytes) {
  if (bytes != 0) slots_[static_cast<size_t>(slot)].range = buffers_.read(address, bytes);
}

void Bindings::write(int slot, void* address, size_t bytes) {
  if (bytes != 0) slots_[static_cast<size_t>(slot)].range = buffers_.write(address, bytes);
}

void Bindings::scratch(int slot, size_t bytes) {
  slots_[static_cast<size_t>(slot)].range = {context_.scratch(bytes), 0};
}

void Bindings::copy(int slot, const void* address, size_t bytes) {
  Slot& to = slots_[static_cast<size_t>(slot)];
  if (bytes > kMaxBytes) {
    to.range = buffers_.copy(address, bytes);
    return;
  }
  const auto* from = static_cast<const unsigned char*>(address);
  to.bytes.assign(from, from + bytes);
}

void Bindings::encode(id<MTLComputeCommandEncoder> encoder) const {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (!slot.bytes.empty()) {
      [encoder setBytes:slot.bytes.data() length:slot.bytes.size() atIndex:i];
    } else {
      [encoder setBuffer:slot.range.buffer offset:slot.range.offset atIndex:i];
    }
  }
}

void Commands::dispatch(id<MTLComputePipelineState> pipeline, Bindings& bindings,
                        AttentionParameters parameters, MTLSize grid, int64_t products) {
  const auto x = static_cast<int64_t>(grid.width), y = static_cast<int64_t>(grid.height),
             z = static_cast<int64_t>(grid.depth);
  const int64_t share = std::max<int64_t>(1, products / (x * y * z));
  // The threadgroups that a part may have: whole planes of the grid, or rows of one plane, or some
  // of one row.
  const int64_t max_groups = std::max<int64_t>(1, context_.products_of_a_command_buffer() / share);
  const int64_t step_z = std::clamp<int64_t>(max_groups / (x * y), 1, z);
  const int64_t step_y = max_groups >= x * y ? y : std::clamp<int64_t>(max_groups / x, 1, y);
  const int64_t step_x = std::min(max_groups, x);
  for (int64_t k = 0; k < z; k += step_z) {
    for (int64_t j = 0; j < y; j += step_y) {
      for (int64_t i = 0; i < x; i += step_x) {
        const int64_t sizes[] = {std::min(step_x, x - i), std::min(step_y, y - j),
                                 std::min(step_z, z - k)};
        parameters.first_group = {static_cast<int>(i), static_cast<int>(j), static_cast<int>(k)};
        bindings.copy(kParameters, &parameters, sizeof parameters);
        encode(pipeline, bindings,
               MTLSizeMake(static_cast<NSUInteger>(sizes[0]), static_cast<NSUInteger>(sizes[1]),
                           static_cast<NSUInteger>(sizes[2])),
               share * sizes[0] * sizes[1] * sizes[2]);
      }
    }
  }
}

void Commands::dispatch(id<MTLComputePipelineState> pipeline, const Bindings& bindings,
                        MTLSize grid) {
  encode(pipeline, bindings, grid, 0);
}

void Commands::encode(id<MTLComputePipelineState> pipeline, const Bindings& bindings, MTLSize grid,
                      int64_t products) {
  if (products_ + products > context_.products_of_a_command_buffer()) commit();
  if (!current_) {
    current_ = context_.command_buffer();
  }
  products_ += products;
  id<MTLComputeCommandEncoder> encoder = [current_ computeCommandEncoder];
  if (!encoder) throw Error("the Metal device made no command encoder");
  [encoder setComputePipelineState:pipeline];
  bindings.encode(encoder);
  [encoder dispatchThreadgroups:grid threadsPerThreadgroup:MTLSizeMake(kThreads, 1, 1)];
  [encoder endEncoding];
}

void Commands::commit() {
  if (!current_) return;
  [current_ commit];
  committed_.push_back(current_);
  current_ = nil;
  products_ = 0;
}

Commands::~Commands() {
  for (id<MTLCommandBuffer> each : committed_) [each waitUntilCompleted];
}

void Commands::run() {
  commit();
  for (id<MTLCommandBuffer> each : committed_) [each waitUntilCompleted];
  for (id<MTLCommandBuffer> each : committed_) context_.check(each);
  committed_.clear();
}

}  // namespace jax_gluon::metal
