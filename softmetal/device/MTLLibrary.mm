#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "softmetal/compiler.h"
#include "softmetal/device/device.h"
#include "softmetal/device/faults.h"
#include "softmetal/device/settings.h"

using softmetal::FunctionConstantValue;
using softmetal::misuse;
using softmetal::set_error;
using softmetal::to_nsstring;
using softmetal::to_string;

NSErrorDomain const MTLLibraryErrorDomain = @"MTLLibraryErrorDomain";

@implementation MTLCompileOptions

- (instancetype)init {
  self = [super init];
  _fastMathEnabled = YES;
  _mathMode = MTLMathModeFast;
  _languageVersion = MTLLanguageVersion3_2;
  return self;
}
// The older switch and the newer mode are one setting.
- (void)setFastMathEnabled:(BOOL)enabled {
  _fastMathEnabled = enabled;
  _mathMode = enabled ? MTLMathModeFast : MTLMathModeSafe;
}
- (void)setMathMode:(MTLMathMode)mode {
  _mathMode = mode;
  _fastMathEnabled = mode == MTLMathModeFast;
}
- (id)copyWithZone:(NSZone*)zone {
  MTLCompileOptions* copy = [[MTLCompileOptions alloc] init];
  copy.preprocessorMacros = _preprocessorMacros;
  copy.mathMode = _mathMode;
  copy.mathFloatingPointFunctions = _mathFloatingPointFunctions;
  copy.languageVersion = _languageVersion;
  copy.libraryType = _libraryType;
  copy.installName = _installName;
  copy.preserveInvariance = _preserveInvariance;
  copy.optimizationLevel = _optimizationLevel;
  copy.allowReferencingUndefinedSymbols = _allowReferencingUndefinedSymbols;
  copy.maxTotalThreadsPerThreadgroup = _maxTotalThreadsPerThreadgroup;
  copy.enableLogging = _enableLogging;
  return copy;
}

@end

namespace softmetal {

SoftmetalLibrary* library_from_source(SoftmetalDevice* device, NSString* source,
                                      MTLCompileOptions* options, NSError** error) {
  if (!options) options = [[MTLCompileOptions alloc] init];
  if (options.libraryType == MTLLibraryTypeDynamic) {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorUnsupported,
              "dynamic libraries are not supported by this device");
    return nil;
  }
  if (fault(Fault::kCompileFailure)) {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure,
              "program_source:1:1: error: injected compile failure");
    return nil;
  }
  CompileOptions own;
  own.fast_math = options.mathMode != MTLMathModeSafe;
  own.language_version = static_cast<uint32_t>(
      fault(Fault::kOldLanguage) ? MTLLanguageVersion3_0 : options.languageVersion);
  own.instrumentation = instrumentation();
  for (NSString* name in options.preprocessorMacros) {
    own.macros.emplace_back(to_string(name),
                            to_string([options.preprocessorMacros[name] description]));
  }
  std::sort(own.macros.begin(), own.macros.end());
  const CompileResult result = compile(to_string(source), own);
  if (!result.ok) {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure, result.diagnostics);
    return nil;
  }
  return [[SoftmetalLibrary alloc] initWithDevice:device
                                             path:to_nsstring(result.image_path)
                                            error:error];
}

// The bytes go to a file, which is what can be opened.
SoftmetalLibrary* library_from_data(SoftmetalDevice* device, dispatch_data_t data,
                                    NSError** error) {
  const void* bytes = nullptr;
  size_t size = 0;
  dispatch_data_t map = dispatch_data_create_map(data, &bytes, &size);
  std::string path = std::string(NSTemporaryDirectory().UTF8String) + "/softmetal-library-XXXXXX";
  const int file = mkstemp(path.data());
  const bool is_written =
      file >= 0 && map && write(file, bytes, size) == static_cast<ssize_t>(size);
  if (file >= 0) close(file);
  SoftmetalLibrary* library = nil;
  if (is_written) {
    library = [[SoftmetalLibrary alloc] initWithDevice:device path:to_nsstring(path) error:error];
    library.softmetal_isTemporary = YES;
  } else {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorInternal, "cannot write " + path);
  }
  if (!library && file >= 0) unlink(path.c_str());
  return library;
}

}  // namespace softmetal

@implementation SoftmetalLibrary {
  SoftmetalDevice* _device;
  NSString* _path;
  std::shared_ptr<softmetal::Image> _image;  // without constants, for what it declares
  NSArray<NSString*>* _functionNames;
  NSDictionary<NSString*, MTLFunctionConstant*>* _constants;
}
@synthesize label = _label;
@synthesize softmetal_isTemporary = _softmetal_isTemporary;

- (instancetype)initWithDevice:(SoftmetalDevice*)device
                          path:(NSString*)path
                         error:(NSError**)error {
  self = [super init];
  _device = device;
  _path = [path copy];
  FILE* file = fopen(path.fileSystemRepresentation, "rb");
  if (!file) {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorFileNotFound,
              "library not found: " + to_string(path));
    return nil;
  }
  char magic[4] = {};
  const bool is_image = fread(magic, 1, 4, file) == 4 && memcmp(magic, "\177ELF", 4) == 0;
  fclose(file);
  std::string problem = "not compiled for this device (softmetal compile makes libraries for it)";
  if (is_image) _image = softmetal::Image::open(to_string(path), {}, &problem);
  if (!_image) {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorInternal,
              "Invalid library file " + to_string(path) + ": " + problem);
    return nil;
  }
  NSMutableArray<NSString*>* names = [NSMutableArray array];
  for (const softmetal::Kernel* kernel : _image->kernels()) {
    [names addObject:to_nsstring(kernel->name)];
  }
  _functionNames = names;
  NSMutableDictionary<NSString*, MTLFunctionConstant*>* constants =
      [NSMutableDictionary dictionary];
  for (const softmetal::FunctionConstant& each : _image->function_constants()) {
    MTLFunctionConstant* constant = [[MTLFunctionConstant alloc] initWithConstant:each];
    constants[constant.name] = constant;
  }
  _constants = constants;
  return self;
}
- (void)dealloc {
  if (_softmetal_isTemporary) unlink(_path.fileSystemRepresentation);
}

- (std::shared_ptr<softmetal::Image>)softmetal_image {
  return _image;
}
- (NSString*)softmetal_path {
  return _path;
}
- (id<MTLDevice>)device {
  return _device;
}
- (NSArray<NSString*>*)functionNames {
  return _functionNames;
}
- (MTLLibraryType)type {
  return MTLLibraryTypeExecutable;
}
- (NSString*)installName {
  return nil;
}

- (id<MTLFunction>)newFunctionWithName:(NSString*)name {
  if (!name) misuse("-[MTLDebugLibrary newFunctionWithName:]", "functionName must not be nil.");
  if (![_functionNames containsObject:name]) return nil;
  return [[SoftmetalFunction alloc] initWithLibrary:self
                                               name:name
                                          constants:{}
                                         dictionary:_constants];
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)constantValues
                                 error:(NSError**)error {
  if (![_functionNames containsObject:name]) {
    set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorFunctionNotFound,
              "Function " + to_string(name) + " was not found in the library");
    return nil;
  }
  std::vector<FunctionConstantValue> values;
  for (const softmetal::ConstantValue& given : constantValues.softmetal_values) {
    for (MTLFunctionConstant* constant in _constants.allValues) {
      const bool is_it = given.value.by_name ? to_string(constant.name) == given.value.name
                                             : constant.index == given.value.index;
      if (!is_it) continue;
      if (constant.type != given.type) {
        set_error(error, MTLLibraryErrorDomain, MTLLibraryErrorCompileFailure,
                  "function constant " + to_string(constant.name) + " of " + to_string(name) +
                      " has MTLDataType " + std::to_string(constant.type) +
                      "; the value given has MTLDataType " + std::to_string(given.type));
        return nil;
      }
      values.push_back(given.value);
      values.back().by_name = false;
      values.back().index = static_cast<uint32_t>(constant.index);
    }
  }
  return [[SoftmetalFunction alloc] initWithLibrary:self
                                               name:name
                                          constants:std::move(values)
                                         dictionary:_constants];
}
- (void)newFunctionWithName:(NSString*)name
             constantValues:(MTLFunctionConstantValues*)constantValues
          completionHandler:(void (^)(id<MTLFunction>, NSError*))handler {
  MTLFunctionConstantValues* own = [constantValues copy];
  dispatch_async(dispatch_get_global_queue(QOS_CLASS_DEFAULT, 0), ^{
    NSError* error = nil;
    id<MTLFunction> function = [self newFunctionWithName:name constantValues:own error:&error];
    handler(function, error);
  });
}
- (id<MTLFunction>)newFunctionWithDescriptor:(MTLFunctionDescriptor*)descriptor
                                       error:(NSError**)error {
  MTLFunctionConstantValues* values = descriptor.constantValues;
  if (!values) values = [[MTLFunctionConstantValues alloc] init];
  SoftmetalFunction* function = [self newFunctionWithName:descriptor.name
                                           constantValues:values
                                                    error:error];
  function.softmetal_specializedName = descriptor.specializedName;
  return function;
}

@end

@implementation SoftmetalFunction {
  SoftmetalLibrary* _library;
  NSString* _name;
  std::vector<FunctionConstantValue> _constants;
  NSDictionary<NSString*, MTLFunctionConstant*>* _dictionary;
}
@synthesize label = _label;
@synthesize softmetal_specializedName = _softmetal_specializedName;

- (instancetype)initWithLibrary:(SoftmetalLibrary*)library
                           name:(NSString*)name
                      constants:(std::vector<FunctionConstantValue>)constants
                     dictionary:(NSDictionary<NSString*, MTLFunctionConstant*>*)dictionary {
  self = [super init];
  _library = library;
  _name = [name copy];
  _constants = std::move(constants);
  _dictionary = dictionary;
  return self;
}
- (id<MTLDevice>)device {
  return _library.device;
}
- (MTLFunctionType)functionType {
  return MTLFunctionTypeKernel;
}
- (NSString*)name {
  return _softmetal_specializedName ? _softmetal_specializedName : _name;
}
- (NSString*)softmetal_kernelName {
  return _name;
}
- (NSDictionary<NSString*, MTLFunctionConstant*>*)functionConstantsDictionary {
  return _dictionary;
}
- (SoftmetalLibrary*)softmetal_library {
  return _library;
}
- (const std::vector<FunctionConstantValue>&)softmetal_constants {
  return _constants;
}
// Images are named by a hash of what they are made of.
- (NSString*)softmetal_key {
  std::string key = to_string(_library.softmetal_path.lastPathComponent) + " " + to_string(_name);
  for (const FunctionConstantValue& each : _constants) {
    key += " " + std::to_string(each.index) + "=";
    char hex[3];
    for (const unsigned char byte : each.bytes) {
      snprintf(hex, sizeof hex, "%02x", byte);
      key += hex;
    }
  }
  return to_nsstring(key);
}

@end
