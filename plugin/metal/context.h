// The GPU: libraries, pipelines and command buffers.
#pragma once

#import <Metal/Metal.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "metal/archive.h"

namespace jax_gluon::metal {

// What went wrong, in Metal's words and with a hint. Devices turn it into a Status.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Function constants by index: ints, and bools where `is_bool`.
struct Constant {
  uint32_t index;
  int value;
  bool is_bool;
  bool operator<(const Constant& other) const {
    return std::tie(index, value, is_bool) < std::tie(other.index, other.value, other.is_bool);
  }
};
using Constants = std::vector<Constant>;

class Context {
 public:
  // Throws Error where there is no GPU, or one without simdgroup matrices.
  Context();

  id<MTLDevice> device() const { return device_; }
  bool is_software() const { return is_software_; }

  // Of kernel `name` in shaders/`stem`.metal. Compiled once for each set of constants, by whichever
  // thread asks first.
  id<MTLComputePipelineState> pipeline(const std::string& stem, const std::string& name,
                                       const Constants& constants);

  // Runs a command buffer to its end.
  id<MTLCommandBuffer> command_buffer();
  void run(id<MTLCommandBuffer> commands);

  id<MTLBuffer> scratch(size_t bytes);

 private:
  id<MTLLibrary> library(const std::string& stem);

  id<MTLDevice> device_;
  id<MTLCommandQueue> queue_;
  bool is_software_ = false;
  std::mutex mutex_;
  std::unique_ptr<Archive> archive_;
  std::map<std::string, id<MTLLibrary>> libraries_;
  std::map<std::pair<std::string, Constants>, id<MTLComputePipelineState>> pipelines_;
};

}  // namespace jax_gluon::metal
