#include "compiler/rewriter.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <optional>
#include <set>
#include <string_view>

#include "compiler/methods.h"
#include "compiler/passes.h"
#include "compiler/syntax.h"

namespace softmetal {
namespace {

// What a kernel's name gets for the function that gives its thread limit.
constexpr const char* kLimit = "_softmetal_thread_limit";

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

struct Parameter {
  std::string name, type;  // type: as the source spells it
  std::string kind;        // an enumerator of ArgumentKind
  std::string address_space = "kThread";
  std::string index = "0";  // an expression
  std::string condition;    // of [[function_constant(c)]]; empty: none
  bool is_writable = false;
};

struct Kernel {
  std::vector<Parameter> parameters;
  bool has_thread_limit = false;
};

struct Registration {
  std::string host_name, function;  // function: with template arguments
  std::string definition;           // qualified name, key of the kernels
  std::string limit_function;       // gives the thread limit, where there is one
};

class Rewriter : private Syntax {
 public:
  Rewriter(const std::string& text, const std::string& name, Purpose purpose)
      : Syntax(text, name, purpose == Purpose::kAddressSpaces),
        strict_(purpose == Purpose::kAddressSpaces),
        methods_(*this) {}

  Rewritten run() {
    drop_pragmas(*this);
    if (errors_.empty()) {
      find_function_constants();
      declarations(0, tokens_.size(), "", "");
      if (strict_) {
        methods_.qualify();
        refer_to_functions(*this);
      } else {
        erase_qualifiers();
      }
      drop_attributes(*this);
      replace_literals(*this, strict_);
      refuse_words(*this);
    }
    Rewritten out;
    for (const Token& token : tokens_) out.text += token.text;
    if (!strict_) out.text += registrations();
    out.errors = std::move(errors_);
    return out;
  }

 private:
  // --- Declarations ---

  // Past the declaration that begins at i. `body` is its last { at the outermost level, or kNone.
  Index declaration_end(Index i, Index end, Index* body, bool* is_function) const {
    *body = kNone;
    *is_function = false;
    bool closed = false, defined = false, initialisers = false, is_class = false;
    for (Index j = i; j < end; ++j) {
      const Token& token = tokens_[j];
      if (token.blank()) continue;
      if (token.is(";")) return j + 1;
      if (token.is("template") && at(next(j), "<")) {
        const Index close = closing_angle(next(j), end);
        if (close != kNone) {
          j = close;
          continue;
        }
      }
      if (token.is("(") || token.is("[")) {
        closed |= token.is("(") && !opens_attribute(j);
        j = partner_[j];
      } else if (token.is("=") && !at(previous(j), "operator")) {
        defined = true;
      } else if (token.is(":") && closed) {
        initialisers = true;
      } else if (one_of(token, {"struct", "class", "union", "enum"}) && !closed) {
        is_class = true;
      } else if (token.is("{")) {
        const Index before = previous(j);
        if (initialisers && (identifier(before) || at(before, ">")) &&
            !is_address_space(tokens_[before])) {
          j = partner_[j];  // member{value}
          continue;
        }
        *body = j;
        *is_function = closed && !defined && !(is_class && !closed);
        j = partner_[j];
        if (*is_function) return j + 1;
      }
    }
    return end;
  }

  // `in_class`: the name of the class whose members these are, or nothing.
  void declarations(Index begin, Index end, const std::string& scope, const std::string& in_class) {
    std::set<std::string> seen;
    for (Index i = next(begin - 1); i < end;) {
      if (at(i, ";") || at(i, "}")) {
        i = next(i);
        continue;
      }
      if (!in_class.empty() && one_of(tokens_[i], {"public", "private", "protected"}) &&
          at(next(i), ":")) {
        i = next(next(i));
        continue;
      }
      const Index space = at(i, "inline") ? next(i) : i;
      if (at(space, "namespace") ||
          (at(i, "extern") && tokens_[next(i)].kind == TokenKind::kString)) {
        Index open = space;
        std::string name;
        while (open < end && !at(open, "{") && !at(open, ";")) {
          if (identifier(open) && !at(open, "namespace")) name += tokens_[open].text + "::";
          open = next(open);
        }
        if (at(space, "namespace") && at(open, "{")) {
          declarations(open + 1, partner_[open], scope + name, "");
          i = next(partner_[open]);
          continue;
        }
        if (at(open, "{")) {
          declarations(open + 1, partner_[open], scope, "");
          i = next(partner_[open]);
          continue;
        }
      }
      Index body = kNone;
      bool is_function = false;
      const Index last = declaration_end(i, end, &body, &is_function);
      declaration(i, last, body, is_function, scope, in_class, &seen);
      i = next(last - 1);
    }
  }

  void declaration(Index begin, Index end, Index body, bool is_function, const std::string& scope,
                   const std::string& in_class, std::set<std::string>* seen) {
    if (!strict_ && drop_if_known(begin, end, body, is_function, seen)) return;
    const std::vector<Attribute> all = attributes(begin, is_function ? body : end);
    if (is_kernel(begin, is_function ? body : end, all)) {
      kernel(begin, end, body, is_function, scope, all);
    } else if (const Attribute* constant = find(all, "function_constant");
               constant && !is_function) {
      function_constant(begin, end, *constant);
      return;
    } else if (!is_function && body != kNone && has_class_body(begin, body)) {
      declarations(body + 1, partner_[body], scope, methods_.class_name(begin, body));
    } else if (strict_) {
      methods_.find(begin, is_function ? body : end, in_class);
    }
    if (is_function) threadgroup_variables(body, partner_[body]);
    kernel_.clear();
    if (!is_function && in_class.empty()) derived_constant(begin, end);
  }

  bool has_class_body(Index begin, Index body) const {
    for (Index i = begin; i < body; i = next(i)) {
      if (at(i, "template") && at(next(i), "<")) {
        const Index close = closing_angle(next(i), body);
        if (close != kNone) i = close;
      }
      if (at(i, "=")) return false;
      if (one_of(tokens_[i], {"struct", "class", "union"})) return true;
    }
    return false;
  }

  // Functions and specialisations that differ in address spaces alone are one in C++: the first
  // stays.
  bool drop_if_known(Index begin, Index end, Index body, bool is_function,
                     std::set<std::string>* seen) {
    const bool specialises = body != kNone && !is_function && has_class_body(begin, body);
    const bool declares =
        body == kNone && end > begin && at(end - 1, ";") && has_parentheses(begin, end);
    if (!is_function && !specialises && !declares) return false;
    std::string key = is_function ? "f:" : specialises ? "c:" : "d:";
    bool qualified = false;
    std::string last;
    for (Index i = begin; i < (body == kNone ? end : body); ++i) {
      const Token& token = tokens_[i];
      if (token.blank()) continue;
      std::string part = token.text;
      if (is_address_space(token)) {
        qualified = true;
        // As a method's qualifier it is nothing, else `constant` is const.
        if (part != "constant" || at(previous(i), ")")) continue;
        part = "const";
      }
      if (part == "const" && last == "const") continue;
      key += part + " ";
      last = part;
    }
    if (seen->insert(key).second || !qualified) return false;
    erase(begin, end);
    return true;
  }
  bool has_parentheses(Index begin, Index end) const {
    for (Index i = begin; i < end; ++i) {
      if (at(i, "=")) return false;
      if (at(i, "(")) return true;
    }
    return false;
  }

  // --- Kernels ---

  bool is_kernel(Index begin, Index end, const std::vector<Attribute>& all) const {
    if (find(all, "kernel")) return true;
    for (Index i = begin; i < end; i = next(i)) {
      if (at(i, "kernel")) return true;
      if (partner_[i] != kNone && partner_[i] > i) i = partner_[i];
    }
    return false;
  }

  // The name before a parameter list or a semicolon: [first, last) with its template arguments.
  bool declarator(Index begin, Index end, Index* first, Index* last, Index* open) const {
    Index i = begin;
    while (i < end) {
      if (tokens_[i].blank()) {
        ++i;
      } else if (opens_attribute(i)) {
        i = partner_[i] + 1;
      } else if (at(i, "template") && at(next(i), "<")) {
        const Index close = closing_angle(next(i), end);
        if (close == kNone) return false;
        i = close + 1;
      } else if (at(i, "decltype")) {
        i = partner_[next(i)] + 1;
      } else if (identifier(i)) {
        Index stop = next(i);
        if (at(stop, "::")) {
          i = next(stop);
          continue;
        }
        Index after = stop;
        if (at(stop, "<")) {
          const Index close = closing_angle(stop, end);
          if (close == kNone) return false;
          after = next(close);
        }
        const Index name_end = after;
        while (at(after, "[") && partner_[after] != kNone) after = next(partner_[after]);
        if (at(after, "(") || at(after, ";")) {
          *first = i;
          *last = at(stop, "<") ? name_end : stop;
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

  void kernel(Index begin, Index end, Index body, bool is_function, const std::string& scope,
              const std::vector<Attribute>& all) {
    Index first = 0, last = 0, open = 0;
    // `kernel` may be an identifier: out of the way first.
    for (Index i = begin; i < (is_function ? body : end); i = next(i)) {
      if (at(i, "kernel") && !at(previous(i), "[") && !at(previous(i), ",")) erase(i, i + 1);
      if (i < tokens_.size() && partner_[i] != kNone && partner_[i] > i) i = partner_[i];
    }
    if (!declarator(begin, end, &first, &last, &open)) {
      error(begin, "a kernel without a name");
      return;
    }
    const std::string function = scope + text(first, last);
    const std::string definition = scope + tokens_[first].text;
    const std::string limit_function =
        definition + kLimit + text(first, last).substr(tokens_[first].text.size());
    const Attribute* host = find(all, "host_name");
    std::string host_name = tokens_[first].text;
    if (host) {
      host_name.clear();
      for (char c : host->argument) {
        if (c != '"' && !std::isspace(static_cast<unsigned char>(c))) host_name += c;
      }
    }
    if (!is_function) {
      if (at(begin, "template")) {
        registrations_.push_back({host_name, function, definition, limit_function});
        if (!strict_) erase(begin, end);
      }
      return;  // else a declaration
    }
    Kernel kernel;
    const bool is_template = at(begin, "template");
    if (const Attribute* limit = find(all, "max_total_threads_per_threadgroup");
        limit && !strict_) {
      kernel.has_thread_limit = true;
      // Beside the kernel, where its template parameters mean what they mean to the kernel.
      std::string head;
      if (is_template) head = text(begin, closing_angle(next(begin), end) + 1) + " ";
      tokens_[begin].text = head + "constexpr unsigned " + tokens_[first].text + kLimit +
                            "() { return " + limit->argument + "; } " + tokens_[begin].text;
    }
    read_parameters(open, &kernel);
    kernels_[definition] = kernel;
    kernel_ = "&" + tokens_[first].text + (is_template ? template_arguments(next(begin)) : "");
    if (is_template) return;  // its instantiations are registered
    registrations_.push_back({host_name, function, definition, limit_function});
  }

  // "<T, N>" of the parameters between the angles at `open`.
  std::string template_arguments(Index open) const {
    const Index close = closing_angle(open, tokens_.size());
    std::string out, name;
    bool is_pack = false, has_default = false;
    for (Index i = next(open); i <= close; i = next(i)) {
      if (i == close || at(i, ",")) {
        out += (out.empty() ? "" : ", ") + name + (is_pack ? "..." : "");
        is_pack = has_default = false;
        continue;
      }
      if (at(i, "=")) has_default = true;
      if (has_default) {
      } else if (at(i, "...")) {
        is_pack = true;
      } else if (at(i, "(") && at(next(i), "*")) {  // a pointer to a function
        name = tokens_[previous(partner_[i])].text;
        i = partner_[next(partner_[i])];
        continue;
      } else if (identifier(i)) {
        name = tokens_[i].text;
      }
      if (at(i, "<") && closing_angle(i, close) != kNone) {
        i = closing_angle(i, close);
      } else if (partner_[i] != kNone && partner_[i] > i) {
        i = partner_[i];
      }
    }
    return "<" + out + ">";
  }

  void read_parameters(Index open, Kernel* kernel) {
    const Index close = partner_[open];
    std::string next_buffer = "0", next_threadgroup = "0";
    for (Index begin = open + 1; begin < close;) {
      Index end = begin;
      int angles = 0;
      for (; end < close; ++end) {
        if (tokens_[end].blank()) continue;
        if (partner_[end] != kNone && partner_[end] > end) {
          end = partner_[end];
        } else if (at(end, "<")) {
          ++angles;
        } else if (at(end, ">")) {
          --angles;
        } else if (at(end, ",") && angles == 0) {
          break;
        }
      }
      if (!text(begin, end).empty() && text(begin, end) != "void") {
        kernel->parameters.push_back(read_parameter(begin, end, &next_buffer, &next_threadgroup));
      }
      begin = end + 1;
    }
  }

  Parameter read_parameter(Index begin, Index end, std::string* next_buffer,
                           std::string* next_threadgroup) {
    Parameter out;
    const std::vector<Attribute> all = attributes(begin, end);
    bool is_const = false;
    std::string type;
    Index name = kNone;
    for (Index i = begin; i < end; ++i) {
      const Token& token = tokens_[i];
      if (token.blank()) continue;
      if (opens_attribute(i)) {
        i = partner_[i];
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
        i = partner_[i];
        continue;
      }
      if (identifier(i)) name = i;
      type += (type.empty() || !identifier(i) ? "" : " ") + token.text;
    }
    if (name != kNone) out.name = tokens_[name].text;
    const size_t cut = type.rfind(out.name);
    out.type = type.substr(0, cut);
    while (!out.type.empty() &&
           std::string_view(" *&()").find(out.type.back()) != std::string_view::npos) {
      out.type.pop_back();
    }
    out.is_writable = out.address_space == "kDevice" && !is_const;
    if (const Attribute* condition = find(all, "function_constant")) {
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
      error(next(begin - 1),
            "argument '" + out.name + "' of a kernel has no attribute and no address space");
      out.kind = "kBuffer";
      return out;
    }
    const bool threadgroup = out.address_space == "kThreadgroup";
    out.kind = threadgroup ? "kThreadgroup" : "kBuffer";
    if (find(all, threadgroup ? "buffer" : "threadgroup")) {
      error(next(begin - 1),
            "argument '" + out.name + "' of a kernel has an attribute of another address space");
    }
    std::string* counter = threadgroup ? next_threadgroup : next_buffer;
    const Attribute* index = find(all, threadgroup ? "threadgroup" : "buffer");
    out.index = index ? index->argument : *counter;
    const bool plain = std::all_of(out.index.begin(), out.index.end(),
                                   [](unsigned char c) { return std::isdigit(c); });
    *counter = plain && !out.index.empty() ? std::to_string(std::stoul(out.index) + 1)
                                           : "(" + out.index + ") + 1";
    return out;
  }

  static std::string quoted(const std::string& x) {
    std::string out = "\"";
    for (char c : x) {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
    return out + "\"";
  }

  std::string registrations() const {
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
      for (const Parameter& p : kernel.parameters) {
        out += "softmetal::argument<softmetal::Parameter<" + id + "_type, " +
               std::to_string(position++) + ">>(" + quoted(p.name) + ", " + quoted(p.type) +
               ", softmetal::ArgumentKind::" + p.kind +
               ", softmetal::AddressSpace::" + p.address_space + ", (" + p.index + "), " +
               (p.is_writable ? "true" : "false") + ", " +
               (p.condition.empty() ? "nullptr" : "[] { return bool(" + p.condition + "); }") +
               "), ";
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

  // --- Function constants ---

  // Their names have to be known before the first use.
  void find_function_constants() {
    for (Index i = 0; i < tokens_.size(); ++i) {
      if (tokens_[i].blank() || !opens_attribute(i)) continue;
      std::vector<Attribute> all;
      read_attributes(next(i) + 1, partner_[next(i)], &all);
      const Index end = partner_[i];
      if (find(all, "function_constant") && at(next(end), ";") && identifier(previous(i))) {
        constants_.insert(tokens_[previous(i)].text);
      }
      i = end;
    }
    for (Index i = 0; i < tokens_.size(); ++i) {
      if (!at(i, "is_function_constant_defined") || !at(next(i), "(")) continue;
      const Index close = partner_[next(i)];
      tokens_[previous(close)].text += "_softmetal_defined";
      tokens_[i].text = "bool";
    }
  }

  // constant T name [[function_constant(i)]];
  void function_constant(Index begin, Index end, const Attribute& attribute) {
    Index attributes_begin = begin;
    while (!opens_attribute(attributes_begin)) attributes_begin = next(attributes_begin);
    const Index name = previous(attributes_begin);
    std::string type;
    for (Index i = begin; i < name; i = next(i)) {
      if (one_of(tokens_[i], {"constant", "constexpr", "static", "const", "inline"})) continue;
      type += (type.empty() ? "" : " ") + tokens_[i].text;
    }
    const std::string n = tokens_[name].text;
    bool is_constant = false;
    for (Index i = begin; i < name; i = next(i)) is_constant |= at(i, "constant");
    if (!is_constant)
      error(begin, "function constant '" + n + "' must be in constant address space");
    erase(begin, end);
    if (strict_) {
      tokens_[begin].text = "extern constant bool " + n + "_softmetal_defined; extern constant " +
                            type + " " + n + ";";
      return;
    }
    tokens_[begin].text = "static bool " + n + "_softmetal_defined = false; static const " + type +
                          " " + n + " = softmetal::function_constant<" + type + ">(" +
                          attribute.argument + ", " + quoted(n) + ", " + quoted(type) + ", &" + n +
                          "_softmetal_defined);";
  }

  // A constant made from function constants is not known to the compiler.
  void derived_constant(Index begin, Index end) {
    bool is_constant = false, derives = false;
    Index name = kNone, keyword = kNone;
    for (Index i = begin; i < end; i = next(i)) {
      if (at(i, "constant")) is_constant = true;
      if (at(i, "constexpr")) keyword = i;
      if (at(i, "=") && name == kNone) name = previous(i);
      if (name != kNone && identifier(i) &&
          (constants_.count(tokens_[i].text) != 0 ||
           tokens_[i].text.find("_softmetal_defined") != std::string::npos)) {
        derives = true;
      }
    }
    if (!is_constant || !derives) return;
    constants_.insert(tokens_[name].text);
    if (keyword != kNone) erase(keyword, keyword + 1);
  }

  // --- Threadgroup variables ---

  // `threadgroup T x[N], y;` in a function: storage of the threadgroup.
  void threadgroup_variables(Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      if (!at(i, "threadgroup")) continue;
      Index first = i;
      std::string alignment;
      Index before = previous(i);
      if (at(before, ")") && at(previous(partner_[before]), "alignas")) {
        alignment = text(partner_[before] + 1, before);
        first = previous(partner_[before]);
        before = previous(first);
      }
      if (!at(before, ";") && !at(before, "{") && !at(before, "}") && !at(before, ":")) continue;
      const std::optional<Index> semicolon = variable(first, i, end, alignment);
      if (semicolon) i = *semicolon;
    }
  }

  std::optional<Index> variable(Index first, Index qualifier, Index end, std::string alignment) {
    Index i = next(qualifier);
    const Index type_begin = i;
    if (at(i, "alignas")) {
      alignment = text(next(i) + 1, partner_[next(i)]);
      i = next(partner_[next(i)]);
      erase(type_begin, i);
    }
    // The type: names, template arguments; the declarator follows without * or &.
    Index type_end = kNone;
    while (i < end) {
      if (at(i, "const") || at(i, "volatile") || at(i, "typename") || at(i, "struct")) {
        i = next(i);
        continue;
      }
      if (!identifier(i)) return std::nullopt;
      const bool part = one_of(tokens_[i], {"unsigned", "signed", "long", "short"});
      i = next(i);
      if (at(i, "<")) {
        const Index close = closing_angle(i, end);
        if (close == kNone) return std::nullopt;
        i = next(close);
      }
      if (at(i, "::")) {
        i = next(i);
        if (at(i, "template")) i = next(i);
        continue;
      }
      if (part && one_of(tokens_[i], {"int", "char", "short", "long", "unsigned"})) continue;
      type_end = i;
      break;
    }
    if (type_end == kNone || !identifier(i)) return std::nullopt;
    const std::string type = text(type_begin, type_end);
    std::string out;
    while (true) {
      if (!identifier(i)) return std::nullopt;
      const std::string name = tokens_[i].text;
      Index after = next(i);
      const Index extents = after;
      while (at(after, "[")) after = next(partner_[after]);
      if (!at(after, ",") && !at(after, ";")) {
        if (!at(after, "=") && !at(after, "{")) return std::nullopt;
        error(i, "threadgroup variable '" + name + "' cannot be initialized");
        return std::nullopt;
      }
      const std::string t = name + "_softmetal_type";
      if (strict_) {
        out += "using " + t + " = " + type + " " + text(extents, after) + "; threadgroup " + t +
               "& " + name + " = softmetal::threadgroup_variable<" + t + ">(); ";
        i = next(after);
        if (!at(after, ";")) continue;
        erase(first, after + 1);
        tokens_[first].text = out;
        return after;
      }
      out += "using " + t + " = " + type + " " + text(extents, after) + "; static char " + name +
             "_softmetal_id; " + t + "& " + name + " = softmetal::threadgroup_variable<" + t +
             ">(&" + name + "_softmetal_id, \"" + name + "\"" +
             (alignment.empty() ? "" : ", (" + alignment + ")") + "); ";
      if (!kernel_.empty()) {
        out += "static_cast<void>(&softmetal::StaticVariable<" + kernel_ + ", &" + name +
               "_softmetal_id, sizeof(" + t + ")>::is_declared); ";
      }
      i = next(after);
      if (at(after, ";")) {
        erase(first, after + 1);
        tokens_[first].text = out;
        return after;
      }
    }
  }

  // --- Address spaces ---

  void erase_qualifiers() {
    for (Index i = 0; i < tokens_.size(); ++i) {
      Token& token = tokens_[i];
      if (!is_address_space(token)) continue;
      const Index before = previous(i);
      if (before != kNone && one_of(tokens_[before], {"::", ".", "->"})) continue;
      const bool method =
          at(before, ")") && (at(next(i), "{") || at(next(i), ";") || at(next(i), ":") ||
                              at(next(i), "const") || at(next(i), "noexcept"));
      const bool after_const = at(before, "const") && at(previous(before), ")");
      token.text = token.is("constant") && !method && !after_const ? "const" : "";
    }
  }

  const bool strict_;
  std::set<std::string> constants_;
  Methods methods_;
  std::map<std::string, Kernel> kernels_;
  std::string kernel_;  // the one whose body is next, as a template argument
  std::vector<Registration> registrations_;
};

}  // namespace

Rewritten rewrite(const std::string& preprocessed, const std::string& source_name,
                  Purpose purpose) {
  return Rewriter(preprocessed, source_name, purpose).run();
}

}  // namespace softmetal
