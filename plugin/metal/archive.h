// Compiled pipelines on disk, so that a new process need not compile them again.
#pragma once

#import <Metal/Metal.h>

#include <string>

namespace jax_gluon::metal {

// A binary archive of Metal's, in the folder JAX_GLUON_CACHE_DIR, else in the user's cache folder.
// Whatever goes wrong with it (no folder, no room, another program's bytes) costs the time of
// compiling, and nothing else. Not for several threads at once.
class Archive {
 public:
  Archive(id<MTLDevice> device, const std::string& name);

  // A pipeline of `descriptor`, from the archive where it is there, else compiled and added.
  id<MTLComputePipelineState> pipeline(MTLComputePipelineDescriptor* descriptor, NSError** error);

 private:
  void open();
  void store();

  id<MTLDevice> device_;
  id<MTLBinaryArchive> archive_ = nil;
  NSURL* url_ = nil;
};

}  // namespace jax_gluon::metal
