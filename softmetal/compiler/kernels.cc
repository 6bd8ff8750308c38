#include "compiler/kernels.h"

#include <cctype>

namespace softmetal {
namespace {

// What a kernel's name gets for the function that gives its thread limit.
constexpr const char* kLimit = "_softmetal_thread_limit";

}  // namespace

bool Kernels::is_kernel(Index begin, Index end, const std::vector<Attribute>& all) const {
  if (Syntax::find(all, "kernel")) return true;
  for (Index i = begin; i < end; i = syntax_.next(i)) {
    if (syntax_.at(i, "kernel")) return true;
    if (syntax_.partner(i) != kNone && syntax_.partner(i) > i) i = syntax_.partner(i);
  }
  return false;
}

// The name before a parameter list or a semicolon: [first, last) with its template arguments.
bool Kernels::declarator(Index begin, Index end, Index* first, Index* last, Index* open) const {
  Index i = begin;
  while (i < end) {
    if (syntax_.token(i).blank()) {
      ++i;
    } else if (syntax_.opens_attribute(i)) {
      i = syntax_.partner(i) + 1;
    } else if (syntax_.at(i, "template") && syntax_.at(syntax_.next(i), "<")) {
      const Index close = syntax_.closing_angle(syntax_.next(i), end);
      if (close == kNone) return false;
      i = close + 1;
    } else if (syntax_.at(i, "decltype")) {
      i = syntax_.skip_parentheses(i) + 1;
    } else if (syntax_.identifier(i)) {
      Index stop = syntax_.next(i);
      if (syntax_.at(stop, "::")) {
        i = syntax_.next(stop);
        continue;
      }
      Index after = stop;
      if (syntax_.at(stop, "<")) {
        const Index close = syntax_.closing_angle(stop, end);
        if (close == kNone) return false;
        after = syntax_.next(close);
      }
      const Index name_end = after;
      while (syntax_.at(after, "[") && syntax_.partner(after) != kNone) {
        after = syntax_.next(syntax_.partner(after));
      }
      if (syntax_.at(after, "(") || syntax_.at(after, ";")) {
        *first = i;
        *last = syntax_.at(stop, "<") ? name_end : stop;
        *open = after;
        return true;
      }
      i = after;
    } else {
      ++i;
    }
  }
  return false;
}

std::string Kernels::declare(Index begin, Index end, Index body, bool is_function,
                             const std::string& scope, const std::vector<Attribute>& all) {
  Index first = 0, last = 0, open = 0;
  // `kernel` may be an identifier: out of the way first.
  for (Index i = begin; i < (is_function ? body : end); i = syntax_.next(i)) {
    if (syntax_.at(i, "kernel") && !syntax_.at(syntax_.previous(i), "[") &&
        !syntax_.at(syntax_.previous(i), ",")) {
      syntax_.erase(i, i + 1);
    }
    if (i < syntax_.size() && syntax_.partner(i) != kNone && syntax_.partner(i) > i) {
      i = syntax_.partner(i);
    }
  }
  if (!declarator(begin, end, &first, &last, &open) || (is_function && !syntax_.at(open, "("))) {
    syntax_.error(begin, "a kernel without a name");
    return "";
  }
  const std::string function = scope + syntax_.text(first, last);
  const std::string definition = scope + syntax_.token(first).text;
  const std::string limit_function =
      definition + kLimit + syntax_.text(first, last).substr(syntax_.token(first).text.size());
  const Attribute* host = Syntax::find(all, "host_name");
  std::string host_name = syntax_.token(first).text;
  if (host) {
    host_name.clear();
    for (char c : host->argument) {
      if (c != '"' && !std::isspace(static_cast<unsigned char>(c))) host_name += c;
    }
  }
  if (!is_function) {
    if (syntax_.at(begin, "template")) {
      registrations_.push_back({host_name, function, definition, limit_function});
      if (!strict_) syntax_.erase(begin, end);
    }
    return "";  // else a declaration
  }
  Kernel kernel;
  const bool is_template = syntax_.at(begin, "template") && syntax_.at(syntax_.next(begin), "<");
  if (const Attribute* limit = Syntax::find(all, "max_total_threads_per_threadgroup");
      limit && !strict_) {
    kernel.has_thread_limit = true;
    // Beside the kernel, where its template parameters mean what they mean to the kernel.
    std::string head;
    if (is_template) {
      head = syntax_.text(begin, syntax_.closing_angle(syntax_.next(begin), end) + 1) + " ";
    }
    syntax_.token(begin).text = head + "constexpr unsigned " + syntax_.token(first).text + kLimit +
                                "() { return " + limit->argument + "; } " +
                                syntax_.token(begin).text;
  }
  kernel.parameters = read_kernel_parameters(syntax_, open);
  kernels_[definition] = kernel;
  // The instantiations of a template are what is registered.
  if (!is_template) registrations_.push_back({host_name, function, definition, limit_function});
  return "&" + syntax_.token(first).text +
         (is_template ? template_arguments(syntax_.next(begin)) : "");
}

// "<T, N>" of the parameters between the angles at `open`.
std::string Kernels::template_arguments(Index open) const {
  const Index close = syntax_.closing_angle(open, syntax_.size());
  std::string out, name;
  bool is_pack = false, has_default = false;
  for (Index i = syntax_.next(open); i <= close; i = syntax_.next(i)) {
    if (i == close || syntax_.at(i, ",")) {
      out += (out.empty() ? "" : ", ") + name + (is_pack ? "..." : "");
      is_pack = has_default = false;
      continue;
    }
    if (syntax_.at(i, "=")) has_default = true;
    if (has_default) {
    } else if (syntax_.at(i, "...")) {
      is_pack = true;
    } else if (syntax_.at(i, "(") && syntax_.at(syntax_.next(i), "*")) {  // a pointer to a function
      name = syntax_.token(syntax_.previous(syntax_.partner(i))).text;
      i = syntax_.partner(syntax_.next(syntax_.partner(i)));
      continue;
    } else if (syntax_.identifier(i)) {
      name = syntax_.token(i).text;
    }
    if (syntax_.at(i, "<") && syntax_.closing_angle(i, close) != kNone) {
      i = syntax_.closing_angle(i, close);
    } else if (syntax_.partner(i) != kNone && syntax_.partner(i) > i) {
      i = syntax_.partner(i);
    }
  }
  return "<" + out + ">";
}

std::string Kernels::registrations() const {
  std::string out = "\n# 1 \"registration\"\n";
  int number = 0;
  for (const Registration& each : registrations_) {
    const auto found = kernels_.find(each.definition);
    if (found == kernels_.end()) continue;
    const Kernel& kernel = found->second;
    const std::string id = "softmetal_kernel_" + std::to_string(number++);
    out += "namespace { using " + id + "_type = decltype(&" + each.function + ");\n";
    out += "const softmetal::Argument " + id + "_arguments[] = {";
    int position = 0;
    for (const KernelParameter& p : kernel.parameters) {
      out += "softmetal::argument<softmetal::Parameter<" + id + "_type, " +
             std::to_string(position++) + ">>(" + quoted(p.name) + ", " + quoted(p.type) +
             ", softmetal::ArgumentKind::" + p.kind +
             ", softmetal::AddressSpace::" + p.address_space + ", (" + p.index + "), " +
             (p.is_writable ? "true" : "false") + ", " +
             (p.condition.empty() ? "nullptr" : "[] { return bool(" + p.condition + "); }") + "), ";
    }
    out += "{}};\n";  // a last one, so that there is an array without parameters too
    out += "const softmetal::Registration " + id + "{{" + quoted(each.host_name) +
           ", &softmetal::entry<&" + each.function + ", " + id + "_arguments>, " + id +
           "_arguments, " + std::to_string(kernel.parameters.size()) + ", " +
           (kernel.has_thread_limit ? each.limit_function + "()" : "0") +
           ", &softmetal::static_threadgroup_bytes<&" + each.function + ">}}; }\n";
  }
  return out;
}

}  // namespace softmetal
