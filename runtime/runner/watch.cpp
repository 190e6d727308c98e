// Catches ExecuTorch's log messages and aborts inside calls of this library: see model.h.
#include <executorch/runtime/platform/log.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "model.h"

namespace moec_runtime {

std::atomic<int> delegated_models{0};
std::shared_mutex pools;

namespace {

thread_local std::string* reason = nullptr;
pal_emit_log_message_method usual_log = nullptr;
pal_abort_method usual_abort = nullptr;

struct Aborted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void on_log(et_timestamp_t time, et_pal_log_level_t level, const char* file, const char* function, size_t line,
            const char* message, size_t length) {
  static const bool verbose = std::getenv("MOEC_LOG") != nullptr;
  if (reason && reason->empty() && (level == kError || level == kFatal)) reason->assign(message, length);
  if ((!reason || verbose) && usual_log) usual_log(time, level, file, function, line, message, length);
}

void on_abort() {
  if (reason) throw Aborted(reason->empty() ? "ExecuTorch gave up" : *reason);
  usual_abort();
  std::abort();
}

}  // namespace

void watch_executorch() {
  static std::once_flag once;
  std::call_once(once, [] {
    executorch::runtime::runtime_init();
    usual_log = executorch::runtime::get_pal_impl()->emit_log_message;
    usual_abort = executorch::runtime::get_pal_impl()->abort;
    executorch::runtime::PalImpl impl = executorch::runtime::PalImpl::create(on_log, __FILE__);
    impl.abort = on_abort;
    executorch::runtime::register_pal(impl);
  });
}

Watch::Watch() : outer_(reason) {
  watch_executorch();
  reason = &text_;
}

Watch::~Watch() { reason = outer_; }

std::string text(const char* format, ...) {
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

std::string one_line(std::string text) {
  for (char& c : text) {
    if (c == '\n' || c == '\t') c = ' ';
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

}  // namespace moec_runtime
