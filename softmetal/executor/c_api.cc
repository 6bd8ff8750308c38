#include "softmetal/c_api.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "softmetal/compiler.h"
#include "softmetal/executor.h"

#define SOFTMETAL_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

void put(char* to, size_t capacity, const std::string& text) {
  if (capacity == 0) return;
  const size_t count = std::min(text.size(), capacity - 1);
  std::memcpy(to, text.data(), count);
  to[count] = '\0';
}

std::vector<std::string> lines(const char* text) {
  std::vector<std::string> out;
  std::istringstream in(text ? text : "");
  for (std::string line; std::getline(in, line);) {
    if (!line.empty()) out.push_back(line);
  }
  return out;
}

softmetal::CompileOptions options_of(const softmetal_compile_request& request) {
  softmetal::CompileOptions options;
  if (request.name) options.source_name = request.name;
  if (request.output) options.output = request.output;
  if (request.target) options.target = request.target;
  options.fast_math = request.safe_math == 0;
  options.language_version = request.language_version;
  for (const std::string& line : lines(request.macros)) {
    const size_t equals = line.find('=');
    const std::string value = equals == std::string::npos ? "1" : line.substr(equals + 1);
    options.macros.emplace_back(line.substr(0, equals), value);
  }
  options.include_directories = lines(request.include_directories);
  return options;
}

}  // namespace

SOFTMETAL_EXPORT int softmetal_compile(const softmetal_compile_request* request, char* text,
                                       size_t capacity) {
  softmetal::CompileOptions options = options_of(*request);
  options.instrumentation = static_cast<softmetal::Instrumentation>(request->instrumentation);
  const softmetal::CompileResult result = softmetal::compile(request->source, options);
  put(text, capacity, result.ok ? result.image_path : result.diagnostics);
  return result.ok ? 0 : 1;
}

SOFTMETAL_EXPORT int softmetal_check(const softmetal_compile_request* request, char* text,
                                     size_t capacity) {
  const softmetal::CheckResult result =
      softmetal::strict_check(request->source, options_of(*request));
  put(text, capacity, result.diagnostics);
  return result.ok ? 0 : 1;
}

SOFTMETAL_EXPORT void* softmetal_image_open(const char* path, const softmetal_constant* constants,
                                            uint32_t count, char* text, size_t capacity) {
  std::vector<softmetal::FunctionConstantValue> values;
  for (uint32_t i = 0; i < count; ++i) {
    softmetal::FunctionConstantValue value;
    value.index = constants[i].index;
    value.by_name = constants[i].name != nullptr;
    if (value.by_name) value.name = constants[i].name;
    const auto* bytes = static_cast<const unsigned char*>(constants[i].value);
    value.bytes.assign(bytes, bytes + constants[i].size);
    values.push_back(std::move(value));
  }
  std::string error;
  auto image = softmetal::Image::open(path, values, &error);
  if (!image) {
    put(text, capacity, error);
    return nullptr;
  }
  return new std::shared_ptr<softmetal::Image>(std::move(image));
}

SOFTMETAL_EXPORT void softmetal_image_close(void* image) {
  delete static_cast<std::shared_ptr<softmetal::Image>*>(image);
}

SOFTMETAL_EXPORT size_t softmetal_image_json(void* image, char* text, size_t capacity) {
  const softmetal::Image& from = **static_cast<std::shared_ptr<softmetal::Image>*>(image);
  const auto quoted = [](const char* x) {
    std::string out = "\"";
    for (; *x; ++x) {
      if (*x == '"' || *x == '\\') out += '\\';
      out += *x;
    }
    return out + "\"";
  };
  static constexpr const char* kSpaces[] = {"thread", "threadgroup", "device", "constant"};
  std::string out = "{\"kernels\": [";
  for (const softmetal::Kernel* kernel : from.kernels()) {
    if (out.back() != '[') out += ", ";
    out += "{\"name\": " + quoted(kernel->name) + ", \"max_total_threads_per_threadgroup\": " +
           std::to_string(kernel->max_total_threads_per_threadgroup) +
           ", \"static_threadgroup_memory\": " + std::to_string(*kernel->static_threadgroup_bytes) +
           ", \"arguments\": [";
    for (uint32_t i = 0; i < kernel->argument_count; ++i) {
      const softmetal::Argument& a = kernel->arguments[i];
      const bool enabled = !a.is_enabled || a.is_enabled();
      if (i != 0) out += ", ";
      out += "{\"name\": " + quoted(a.name) + ", \"type\": " + quoted(a.type_name) +
             ", \"kind\": " + std::to_string(static_cast<int>(a.kind)) + ", \"address_space\": \"" +
             kSpaces[static_cast<int>(a.address_space)] +
             "\", \"index\": " + std::to_string(a.index) +
             ", \"reference\": " + (a.is_reference ? "true" : "false") +
             ", \"writable\": " + (a.is_writable ? "true" : "false") +
             ", \"size\": " + std::to_string(a.element_size) +
             ", \"alignment\": " + std::to_string(a.element_alignment) +
             ", \"enabled\": " + (enabled ? "true" : "false") + "}";
    }
    out += "]}";
  }
  out += "], \"function_constants\": [";
  for (const softmetal::FunctionConstant& constant : from.function_constants()) {
    if (out.back() != '[') out += ", ";
    out += "{\"name\": " + quoted(constant.name.c_str()) +
           ", \"index\": " + std::to_string(constant.index) +
           ", \"type\": " + quoted(constant.type.c_str()) +
           ", \"size\": " + std::to_string(constant.size) +
           ", \"defined\": " + (constant.is_defined ? "true" : "false") + "}";
  }
  out += "]}";
  put(text, capacity, out);
  return out.size() + 1;
}

SOFTMETAL_EXPORT int softmetal_dispatch(void* image, const softmetal_dispatch_request* request,
                                        softmetal::Counters* counters, char* text,
                                        size_t capacity) {
  const softmetal::Image& from = **static_cast<std::shared_ptr<softmetal::Image>*>(image);
  softmetal::Dispatch dispatch;
  dispatch.kernel = from.find(request->kernel);
  if (!dispatch.kernel) {
    put(text, capacity, std::string("no kernel ") + request->kernel);
    return 1;
  }
  softmetal::record_pipeline(from.pipeline(request->kernel));
  for (uint32_t i = 0; i < softmetal::kBufferSlots; ++i) {
    dispatch.buffers[i] = {request->buffers[i], request->lengths[i]};
  }
  for (uint32_t i = 0; i < softmetal::kThreadgroupSlots; ++i) {
    dispatch.threadgroup_bytes[i] = request->threadgroup[i];
  }
  for (int d = 0; d < 3; ++d) {
    dispatch.grid[d] = request->grid[d];
    dispatch.threads_per_threadgroup[d] = request->threads_per_threadgroup[d];
  }
  dispatch.grid_in_threads = request->grid_in_threads != 0;
  dispatch.workers = request->workers;
  dispatch.seed = request->seed;
  dispatch.time_limit = request->time_limit;
  const softmetal::DispatchResult result = softmetal::run(dispatch);
  *counters = result.counters;
  put(text, capacity, result.message);
  return result.ok ? 0 : result.timed_out ? 2 : 1;
}
