// Error reporting of the kernel library: a code to return and a message kept for the calling thread.
#ifndef MOEC_STATUS_H_
#define MOEC_STATUS_H_

#include <cstddef>
#include <cstdint>

#include "moec_kernel.h"

namespace moec {

// Records the message and returns `code`.
int32_t fail(int32_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// a * b * c in *product; false on overflow or a negative factor.
inline bool checked_product(int64_t a, int64_t b, int64_t c, uint64_t* product) {
  if (a < 0 || b < 0 || c < 0) return false;
  uint64_t ab = 0;
  return !__builtin_mul_overflow(uint64_t(a), uint64_t(b), &ab) && !__builtin_mul_overflow(ab, uint64_t(c), product);
}

// The buffer holds exactly rows * columns * size bytes and is not NULL (unless it is empty).
int32_t check_buffer(const char* name, const void* data, uint64_t bytes, int64_t rows, int64_t columns, int64_t size);

#define MOEC_RETURN_IF_ERROR(expression)         \
  do {                                           \
    const int32_t moec_code_ = (expression);     \
    if (moec_code_ != MOEC_OK) return moec_code_; \
  } while (0)

}  // namespace moec

#endif  // MOEC_STATUS_H_
