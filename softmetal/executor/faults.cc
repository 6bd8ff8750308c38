#include "executor/faults.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "executor/sanitizers.h"
#include "executor/worker.h"

namespace softmetal {
namespace {

constexpr size_t kSignalStackBytes = size_t{64} << 10;
// Ignored where no one handles it, so that one that comes late does nothing.
constexpr int kInterrupt = SIGURG;
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, kInterrupt};
// How often a thread is interrupted, and a flag of cancellation looked at.
constexpr auto kTick = std::chrono::milliseconds(5);

struct sigaction previous[NSIG];

bool have_own_handlers() { return !sanitizer::address() && !sanitizer::thread(); }

uintptr_t program_counter(void* context) {
  const auto* of = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__)
  return static_cast<uintptr_t>(of->uc_mcontext.gregs[REG_RIP]);
#else
  return static_cast<uintptr_t>(of->uc_mcontext.pc);
#endif
}

// The handler that was there before; where there was none, what happens without one.
void pass_on(int signal, siginfo_t* info, void* context) {
  const struct sigaction& handler = previous[signal];
  if (handler.sa_flags & SA_SIGINFO) {
    handler.sa_sigaction(signal, info, context);
  } else if (handler.sa_handler == SIG_DFL && signal != kInterrupt) {
    ::signal(signal, SIG_DFL);  // the instruction faults once more
    if (info->si_code <= 0) raise(signal);
  } else if (handler.sa_handler != SIG_DFL && handler.sa_handler != SIG_IGN) {
    handler.sa_handler(signal);
  }
}

// Leaves the fiber, and with it the handler, where a kernel is at fault.
void handle(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  Worker* worker = Worker::current();
  if (worker && worker->runs_fiber()) {
    if (signal == kInterrupt) {
      worker->interrupt(program_counter(context));
    } else if (info->si_code > 0) {  // by an instruction, not from a process
      worker->fault(signal, info->si_addr);
    }
  }
  pass_on(signal, info, context);
  errno = error;
}

// Other libraries set handlers too, whenever they are loaded. So ours are set while kernels run, on
// top of what is there, which comes back after the last.
class Handlers {
 public:
  void enter() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (users_++ > 0) return;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    // A handler that is left by a switch to another stack does not unblock its signal.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
    sigemptyset(&action.sa_mask);
    for (const int signal : kSignals) {
      struct sigaction found = {};
      sigaction(signal, &action, &found);
      if (!is_ours(found)) previous[signal] = found;
    }
  }

  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--users_ > 0) return;
    for (const int signal : kSignals) {
      struct sigaction found = {};
      sigaction(signal, nullptr, &found);
      if (is_ours(found)) sigaction(signal, &previous[signal], nullptr);
    }
  }

 private:
  static bool is_ours(const struct sigaction& x) {
    return (x.sa_flags & SA_SIGINFO) && x.sa_sigaction == handle;
  }

  std::mutex mutex_;
  int users_ = 0;
};

Handlers& handlers() {
  static Handlers all;
  return all;
}

}  // namespace

SignalStack::SignalStack() {
  if (!have_own_handlers()) return;
  handlers().enter();
  void* memory = mmap(nullptr, kSignalStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;  // faults then end the process, as they do without handlers
  memory_ = memory;
  stack_t stack = {};
  stack.ss_sp = memory;
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &before_);
}

SignalStack::~SignalStack() {
  if (!have_own_handlers()) return;
  handlers().leave();
  if (!memory_) return;
  sigaltstack(&before_, nullptr);
  munmap(memory_, kSignalStackBytes);
}

CodeRange code_around(const void* function) {
  struct Request {
    uintptr_t address;
    CodeRange found;
  } request{reinterpret_cast<uintptr_t>(function), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* wanted = static_cast<Request*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD || !(segment.p_flags & PF_X)) continue;
          const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
          const CodeRange range{begin, begin + segment.p_memsz};
          if (!range.contains(wanted->address)) continue;
          wanted->found = range;
          return 1;
        }
        return 0;
      },
      &request);
  return request.found;
}

Watchdog::Watchdog(const Dispatch& dispatch) : dispatch_(dispatch) {
  if (!have_own_handlers() || (dispatch.time_limit <= 0 && !dispatch.cancelled)) return;
  deadline_ = std::chrono::steady_clock::now() +
              std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                  std::chrono::duration<double>(dispatch.time_limit));
  thread_ = std::thread(&Watchdog::watch, this);
}

Watchdog::~Watchdog() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Watchdog::enter() {
  const std::lock_guard<std::mutex> lock(mutex_);
  threads_.push_back(pthread_self());
}

void Watchdog::leave() {
  const std::lock_guard<std::mutex> lock(mutex_);
  threads_.erase(std::find_if(threads_.begin(), threads_.end(), [](pthread_t each) {
    return pthread_equal(each, pthread_self()) != 0;
  }));
}

bool Watchdog::is_over() const {
  return (dispatch_.cancelled && dispatch_.cancelled->load(std::memory_order_relaxed)) ||
         (dispatch_.time_limit > 0 && std::chrono::steady_clock::now() > deadline_);
}

void Watchdog::watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!ends_) {
    if (is_over()) {
      for (const pthread_t thread : threads_) pthread_kill(thread, kInterrupt);
    }
    if (dispatch_.cancelled || is_over()) {
      wake_.wait_for(lock, kTick);
    } else {
      wake_.wait_until(lock, deadline_);
    }
  }
}

}  // namespace softmetal
