#include "metal/archive.h"

#import <Foundation/Foundation.h>

#include <unistd.h>

#include <cstdio>

#include "cache_folder.h"

namespace jax_gluon::metal {
Archive::Archive(id<MTLDevice> device, const std::string& name) : device_(device) {
  const std::string folder = cache_folder();
  if (folder.empty()) return;
  NSString* path = @(folder.c_str());
  if (![[NSFileManager defaultManager] createDirectoryAtPath:path
                                 withIntermediateDirectories:YES
                                                  attributes:nil
                                                       error:nil]) {
    return;
  }
  url_ = [NSURL fileURLWithPath:[path stringByAppendingPathComponent:@(name.c_str())]];
  open();
}

void Archive::open() {
  MTLBinaryArchiveDescriptor* descriptor = [[MTLBinaryArchiveDescriptor alloc] init];
  descriptor.url = url_;
  archive_ = [device_ newBinaryArchiveWithDescriptor:descriptor error:nil];
  if (archive_) return;
  // None yet, or not one of this device and system: begin anew.
  descriptor.url = nil;
  archive_ = [device_ newBinaryArchiveWithDescriptor:descriptor error:nil];
}

id<MTLComputePipelineState> Archive::pipeline(MTLComputePipelineDescriptor* descriptor,
                                              NSError** error) {
  if (archive_) {
    descriptor.binaryArchives = @[ archive_ ];
    id<MTLComputePipelineState> found =
        [device_ newComputePipelineStateWithDescriptor:descriptor
                                               options:MTLPipelineOptionFailOnBinaryArchiveMiss
                                            reflection:nil
                                                 error:nil];
    if (found) return found;
  }
  id<MTLComputePipelineState> made =
      [device_ newComputePipelineStateWithDescriptor:descriptor
                                             options:MTLPipelineOptionNone
                                          reflection:nil
                                               error:error];
  if (made && archive_ &&
      [archive_ addComputePipelineFunctionsWithDescriptor:descriptor error:nil]) {
    store();
  }
  return made;
}

// The file appears whole: another process may read it at any time.
void Archive::store() {
  NSString* partial =
      [url_.path stringByAppendingString:[NSString stringWithFormat:@".%d", getpid()]];
  const char* const written = partial.fileSystemRepresentation;
  if (![archive_ serializeToURL:[NSURL fileURLWithPath:partial] error:nil] ||
      std::rename(written, url_.path.fileSystemRepresentation) != 0) {
    std::remove(written);
  }
}

}  // namespace jax_gluon::metal
