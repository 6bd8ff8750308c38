// printf with %@, and NSLog.
#include <sys/time.h>

#include <cstdio>
#include <ctime>

#include "softmetal/foundation/internal.h"

#include <unistd.h>

namespace softmetal {
namespace {

template <typename T>
void append(std::string& text, const std::string& conversion, T value) {
  char buffer[64];
  const int length = snprintf(buffer, sizeof buffer, conversion.c_str(), value);
  if (length < 0) return;
  if (static_cast<size_t>(length) < sizeof buffer) {
    text.append(buffer, static_cast<size_t>(length));
    return;
  }
  const size_t start = text.size();
  text.resize(start + static_cast<size_t>(length) + 1);
  snprintf(text.data() + start, static_cast<size_t>(length) + 1, conversion.c_str(), value);
  text.resize(start + static_cast<size_t>(length));
}

// One conversion at a time goes to snprintf, with its argument taken by its C type.
class Formatter {
 public:
  Formatter(std::string_view format, va_list arguments) : rest_(format) {
    va_copy(arguments_, arguments);
  }
  ~Formatter() { va_end(arguments_); }

  std::string run() {
    while (!rest_.empty()) {
      const size_t percent = std::min(rest_.find('%'), rest_.size());
      text_ += rest_.substr(0, percent);
      rest_.remove_prefix(percent);
      if (!rest_.empty()) conversion();
    }
    return std::move(text_);
  }

 private:
  char take() {
    if (rest_.empty()) return 0;
    const char next = rest_.front();
    rest_.remove_prefix(1);
    return next;
  }

  void number() {
    if (!rest_.empty() && rest_.front() == '*') {
      take();
      specification_ += std::to_string(va_arg(arguments_, int));
      return;
    }
    while (!rest_.empty() && isdigit(static_cast<unsigned char>(rest_.front())))
      specification_ += take();
  }

  void conversion() {
    specification_ = take();
    while (!rest_.empty() &&
           std::string_view("-+ #0'").find(rest_.front()) != std::string_view::npos)
      specification_ += take();
    number();
    if (!rest_.empty() && rest_.front() == '.') {
      specification_ += take();
      number();
    }
    std::string length;
    while (!rest_.empty() &&
           std::string_view("hlqLzjt").find(rest_.front()) != std::string_view::npos)
      length += take();
    if (length == "q") length = "ll";
    const char kind = take();
    switch (kind) {
      case '%':
        text_ += '%';
        break;
      case '@': {
        const id object = va_arg(arguments_, id);
        append(text_, specification_ + "s",
               object ? to_string([object description]).c_str() : "(null)");
        break;
      }
      case 'd':
      case 'i':
      case 'u':
      case 'o':
      case 'x':
      case 'X':
      case 'D':
      case 'U':
        integer(length, kind == 'D' ? 'd' : kind == 'U' ? 'u' : kind);
        break;
      case 'c':
        append(text_, specification_ + "c", va_arg(arguments_, int));
        break;
      case 'C': {
        const auto unit = static_cast<char16_t>(va_arg(arguments_, int));
        text_ += to_utf8(&unit, 1);
        break;
      }
      case 's': {
        const char* string = va_arg(arguments_, const char*);
        append(text_, specification_ + "s", string ? string : "(null)");
        break;
      }
      case 'p':
        append(text_, specification_ + "p", va_arg(arguments_, void*));
        break;
      case 'f':
      case 'F':
      case 'e':
      case 'E':
      case 'g':
      case 'G':
      case 'a':
      case 'A':
        if (length == "L")
          append(text_, specification_ + "L" + kind, va_arg(arguments_, long double));
        else
          append(text_, specification_ + kind, va_arg(arguments_, double));
        break;
      default:
        text_ += specification_ + length;
        if (kind) text_ += kind;
    }
  }

  void integer(const std::string& length, char kind) {
    const std::string conversion = specification_ + length + kind;
    if (length == "l" || length == "z" || length == "t" || length == "j")
      append(text_, conversion, va_arg(arguments_, long));
    else if (length == "ll")
      append(text_, conversion, va_arg(arguments_, long long));
    else
      append(text_, conversion, va_arg(arguments_, int));
  }

  std::string_view rest_;
  va_list arguments_;
  std::string specification_;
  std::string text_;
};

}  // namespace

std::string format(NSString* format, va_list arguments) {
  return Formatter([format softmetal_utf8], arguments).run();
}

}  // namespace softmetal

void NSLogv(NSString* format, va_list arguments) {
  timeval now;
  gettimeofday(&now, nullptr);
  tm local;
  localtime_r(&now.tv_sec, &local);
  char stamp[64];
  strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", &local);
  const std::string text = softmetal::format(format, arguments);
  fprintf(stderr, "%s.%03d %s[%d:%d] %s\n", stamp, static_cast<int>(now.tv_usec / 1000),
          program_invocation_short_name, getpid(), gettid(), text.c_str());
}

void NSLog(NSString* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  NSLogv(format, arguments);
  va_end(arguments);
}
