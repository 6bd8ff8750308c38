#include "compiler/count_products.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string_view>

#include "softmetal/image.h"

namespace softmetal {
namespace {

bool begins(std::string_view text, std::string_view with) {
  return text.substr(0, with.size()) == with;
}
bool contains(std::string_view text, std::string_view what) {
  return text.find(what) != std::string_view::npos;
}

// The name after the first @ of a line.
std::string_view function_of(std::string_view line) {
  const size_t at = line.find('@');
  if (at == std::string_view::npos) return {};
  line.remove_prefix(at + 1);
  return line.substr(0, line.find('('));
}

// Functions of metal and softmetal, with those that are local to them.
bool is_of_library(std::string_view name) {
  name.remove_prefix(std::min(name.size(), name.find_first_not_of("_Z")));
  return begins(name, "N5metal") || begins(name, "NK5metal") || begins(name, "N9softmetal") ||
         begins(name, "NK9softmetal");
}

unsigned number(std::string_view text) {
  return static_cast<unsigned>(std::strtoul(std::string(text.substr(0, 4)).c_str(), nullptr, 10));
}

// The width of the floating-point vectors that an operator of metal works on; 0 where it is none.
unsigned vector_width(std::string_view name) {
  static constexpr std::string_view kVector = "vecI";
  const size_t at = name.find(kVector);
  if (at == std::string_view::npos) return 0;
  name.remove_prefix(at + kVector.size());
  for (const std::string_view element : {"fLi", "DF16_Li", "DF16bLi"}) {
    if (begins(name, element)) return number(name.substr(element.size()));
  }
  return 0;
}

// The width of "@llvm.fmuladd.f32", or of "@llvm.fmuladd.v4f32"; 0 for double.
unsigned fused_width(std::string_view name) {
  static constexpr std::string_view kFused = "llvm.fmuladd.";
  if (!begins(name, kFused) || contains(name, "f64")) return 0;
  name.remove_prefix(kFused.size());
  return begins(name, "v") ? number(name.substr(1)) : 1;
}

// The temporary that is named first in a line: "%ref.tmp12", or "%coerce3" of a swizzle's operand.
std::string_view temporary_of(std::string_view line) {
  for (size_t at; (at = line.find('%')) != std::string_view::npos;) {
    line.remove_prefix(at);
    const std::string_view name = line.substr(0, line.find_first_of(",) ="));
    for (const std::string_view known : {"%ref.tmp", "%coerce"}) {
      if (begins(name, known) &&
          name.find_first_not_of("0123456789", known.size()) == std::string_view::npos) {
        return name;
      }
    }
    line.remove_prefix(name.size());
  }
  return {};
}

class Counting {
 public:
  std::string run(std::string_view ir) {
    bool is_program = false;
    while (!ir.empty()) {
      const size_t end = std::min(ir.find('\n'), ir.size() - 1) + 1;
      const std::string_view line = ir.substr(0, end);
      ir.remove_prefix(end);
      out_ += line;
      if (begins(line, "define ")) {
        is_program = !is_of_library(function_of(line));
        products_.clear();
        pending_ = 0;
      } else if (begins(line, "declare ") && function_of(line) == "softmetal_count") {
        is_declared_ = true;
      } else if (is_program) {
        instruction(line);
      }
    }
    if (is_used_ && !is_declared_) {
      out_ += "declare void @softmetal_count(i8 noundef zeroext, i64 noundef)\n";
    }
    return std::move(out_);
  }

 private:
  void instruction(std::string_view line) {
    if (!contains(line, "call ")) {
      // What follows a call stores its result where it belongs.
      if (pending_ != 0 && contains(line, "getelementptr")) {
        const std::string_view temporary = temporary_of(line);
        if (!temporary.empty()) products_[std::string(temporary)] = pending_;
        pending_ = 0;
      }
      return;
    }
    pending_ = 0;
    const std::string_view name = function_of(line);
    count(fused_width(name));
    if (begins(name, "_ZN5metalmlI")) {
      const std::string_view arguments = line.substr(line.find('('));
      if (contains(arguments, "sret")) {
        products_[std::string(temporary_of(arguments))] = vector_width(name);
      } else {
        pending_ = vector_width(name);
      }
      return;
    }
    for (const std::string_view sum :
         {"_ZN5metalplI", "_ZN5metalmiI", "_ZN5metalpLI", "_ZN5metalmII"}) {
      if (begins(name, sum)) count(width_of_products(line));
    }
  }

  // Both operands may be products: one of them is what a multiply-accumulate computes.
  unsigned width_of_products(std::string_view line) const {
    unsigned width = 0;
    for (std::string_view name; !(name = temporary_of(line)).empty();) {
      const auto found = products_.find(std::string(name));
      if (found != products_.end()) width = found->second;
      line.remove_prefix(static_cast<size_t>(name.data() - line.data()) + name.size());
    }
    return width;
  }

  void count(unsigned width) {
    if (width == 0) return;
    out_ += "  call void @softmetal_count(i8 noundef zeroext " +
            std::to_string(static_cast<int>(Work::kMultiplyAccumulate)) + ", i64 noundef " +
            std::to_string(width) + ")\n";
    is_used_ = true;
  }

  std::string out_;
  std::map<std::string, unsigned> products_;  // temporaries of this function that hold one
  unsigned pending_ = 0;                      // width of a product whose temporary is named next
  bool is_used_ = false, is_declared_ = false;
};

}  // namespace

std::string count_products(const std::string& ir) { return Counting().run(ir); }

}  // namespace softmetal
