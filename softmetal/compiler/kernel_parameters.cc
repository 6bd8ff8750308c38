#include "compiler/kernel_parameters.h"

#include <map>
#include <string_view>

namespace softmetal {
namespace {

// Attributes whose argument gets its value from the executor.
const std::map<std::string_view, std::string_view>& argument_kinds() {
  static const std::map<std::string_view, std::string_view> kinds = {
      {"thread_position_in_grid", "kThreadPositionInGrid"},
      {"thread_position_in_threadgroup", "kThreadPositionInThreadgroup"},
      {"thread_index_in_threadgroup", "kThreadIndexInThreadgroup"},
      {"threadgroup_position_in_grid", "kThreadgroupPositionInGrid"},
      {"threads_per_threadgroup", "kThreadsPerThreadgroup"},
      {"dispatch_threads_per_threadgroup", "kDispatchThreadsPerThreadgroup"},
      {"threadgroups_per_grid", "kThreadgroupsPerGrid"},
      {"threads_per_grid", "kThreadsPerGrid"},
      {"grid_origin", "kGridOrigin"},
      {"grid_size", "kGridSize"},
      {"thread_index_in_simdgroup", "kThreadIndexInSimdgroup"},
      {"simdgroup_index_in_threadgroup", "kSimdgroupIndexInThreadgroup"},
      {"simdgroups_per_threadgroup", "kSimdgroupsPerThreadgroup"},
      {"dispatch_simdgroups_per_threadgroup", "kDispatchSimdgroupsPerThreadgroup"},
      {"threads_per_simdgroup", "kThreadsPerSimdgroup"},
      {"thread_execution_width", "kThreadsPerSimdgroup"},
      {"thread_index_in_quadgroup", "kThreadIndexInQuadgroup"},
      {"quadgroup_index_in_threadgroup", "kQuadgroupIndexInThreadgroup"},
      {"quadgroups_per_threadgroup", "kQuadgroupsPerThreadgroup"},
      {"dispatch_quadgroups_per_threadgroup", "kDispatchQuadgroupsPerThreadgroup"},
  };
  return kinds;
}

class KernelParameters {
 public:
  explicit KernelParameters(Syntax& syntax) : syntax_(syntax) {}

  std::vector<KernelParameter> read(Index open) {
    std::vector<KernelParameter> out;
    const Index close = syntax_.partner(open);
    for (Index begin = open + 1; begin < close;) {
      Index end = begin;
      int angles = 0;
      for (; end < close; ++end) {
        if (syntax_.token(end).blank()) continue;
        if (syntax_.partner(end) != kNone && syntax_.partner(end) > end) {
          end = syntax_.partner(end);
        } else if (syntax_.at(end, "<")) {
          ++angles;
        } else if (syntax_.at(end, ">")) {
          --angles;
        } else if (syntax_.at(end, ",") && angles == 0) {
          break;
        }
      }
      if (!syntax_.text(begin, end).empty() && syntax_.text(begin, end) != "void") {
        out.push_back(read_one(begin, end));
      }
      begin = end + 1;
    }
    return out;
  }

 private:
  KernelParameter read_one(Index begin, Index end) {
    KernelParameter out;
    const std::vector<Attribute> all = syntax_.attributes(begin, end);
    bool is_const = false;
    std::string type;
    Index name = kNone;
    for (Index i = begin; i < end; ++i) {
      const Token& token = syntax_.token(i);
      if (token.blank()) continue;
      if (syntax_.opens_attribute(i)) {
        i = syntax_.partner(i);
        continue;
      }
      if (is_address_space(token) && out.address_space == "kThread" && !token.is("thread")) {
        out.address_space = token.is("device")     ? "kDevice"
                            : token.is("constant") ? "kConstant"
                                                   : "kThreadgroup";
        continue;
      }
      if (token.is("const")) is_const = true;
      if (token.is("[")) {
        i = syntax_.partner(i);
        continue;
      }
      if (syntax_.identifier(i)) name = i;
      type += (type.empty() || !syntax_.identifier(i) ? "" : " ") + token.text;
    }
    if (name != kNone) out.name = syntax_.token(name).text;
    const size_t cut = type.rfind(out.name);
    out.type = type.substr(0, cut);
    while (!out.type.empty() &&
           std::string_view(" *&()").find(out.type.back()) != std::string_view::npos) {
      out.type.pop_back();
    }
    out.is_writable = out.address_space == "kDevice" && !is_const;
    if (const Attribute* condition = Syntax::find(all, "function_constant")) {
      out.condition = condition->argument;
    }
    for (const Attribute& each : all) {
      const auto kind = argument_kinds().find(each.name);
      if (kind != argument_kinds().end()) {
        out.kind = kind->second;
        return out;
      }
    }
    if (out.address_space == "kThread") {
      syntax_.error(
          syntax_.next(begin - 1),
          "argument '" + out.name + "' of a kernel has no attribute and no address space");
      out.kind = "kBuffer";
      return out;
    }
    const bool threadgroup = out.address_space == "kThreadgroup";
    out.kind = threadgroup ? "kThreadgroup" : "kBuffer";
    if (Syntax::find(all, threadgroup ? "buffer" : "threadgroup")) {
      syntax_.error(
          syntax_.next(begin - 1),
          "argument '" + out.name + "' of a kernel has an attribute of another address space");
    }
    std::string& counter = threadgroup ? next_threadgroup_ : next_buffer_;
    const Attribute* index = Syntax::find(all, threadgroup ? "threadgroup" : "buffer");
    out.index = index ? index->argument : counter;
    counter = "(" + out.index + ") + 1";
    return out;
  }

  Syntax& syntax_;
  // Indices of the next ones without an attribute, expressions too.
  std::string next_buffer_ = "0", next_threadgroup_ = "0";
};

}  // namespace

std::vector<KernelParameter> read_kernel_parameters(Syntax& syntax, Index open) {
  return KernelParameters(syntax).read(open);
}

}  // namespace softmetal
