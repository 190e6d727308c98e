#include "core/status.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

namespace moec {
namespace {
thread_local char message[512] = "";
}

int32_t fail(int32_t code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return code;
}

int32_t check_buffer(const char* name, const void* data, uint64_t bytes, int64_t rows, int64_t columns, int64_t size) {
  uint64_t wanted = 0;
  if (!checked_product(rows, columns, size, &wanted)) {
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " x %" PRId64 " is not a possible shape", name, rows, columns);
  }
  if (bytes != wanted) {
    return fail(MOEC_WRONG_SIZE, "%s: %" PRIu64 " bytes given, %" PRIu64 " needed (%" PRId64 " x %" PRId64 " x %" PRId64 ")",
                name, bytes, wanted, rows, columns, size);
  }
  if (wanted && !data) return fail(MOEC_INVALID_ARGUMENT, "%s: the pointer is null", name);
  if (reinterpret_cast<uintptr_t>(data) % uint64_t(size)) {
    return fail(MOEC_INVALID_ARGUMENT, "%s: the pointer is not aligned to %" PRId64 " bytes", name, size);
  }
  return MOEC_OK;
}

}  // namespace moec

const char* moec_last_error(void) { return moec::message; }

int32_t moec_abi_version(void) { return MOEC_ABI_VERSION; }
