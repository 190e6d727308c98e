// What the operators over a cache share: the checks of their buffers, writing rows, and the schedule. Internal to the library.
#ifndef MOEC_ATTENTION_RUN_H_
#define MOEC_ATTENTION_RUN_H_

#include "attention.h"
#include "attention_kernels.h"

namespace moec {

constexpr int64_t kMaxCapacity = int64_t{1} << 24;  // positions are compared as floats
constexpr int64_t kMostWidth = int64_t{1} << 20;    // of a head, and heads

// A buffer of [a, b, c] elements; a failure's message begins with `name`.
int32_t check_in(const char* name, const moec_in& x, int64_t a, int64_t b, int64_t c);
int32_t check_out(const char* name, const moec_out& x, int64_t a, int64_t b, int64_t c, int64_t size = sizeof(float));

// Tokens, position, window and capacity of a call.
int32_t check_positions(const char* op, int64_t tokens, int64_t start_pos, int64_t window, int64_t capacity);

// One cache that a call extends: f32 rows [T, heads * width], the cache [S, heads, width] and its scales [S, heads].
struct CacheRows {
  const moec_in& rows;
  const moec_out& cache;
  const moec_out& scales;  // absent for an f32 cache
  int64_t heads, width;
};

// Writes the rows of both caches at start, start + 1, ..
void write_caches(const AttentionKernels& isa, const CacheRows (&caches)[2], int64_t tokens, int64_t start);

// Attention of a checked call whose rows are written.
int32_t attend(const AttentionKernels& isa, const AttentionCall& call, const char* op);

}  // namespace moec

#endif  // MOEC_ATTENTION_RUN_H_
