// Layers with a state: checks and the division into tasks. A task owns a part of the state for all tokens of the call, so
// that threads never share one and every token is taken in its order.
#include "recurrent.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"
#include "isa/isa.h"
#include "isa/recurrent_tasks.h"

namespace moec {
namespace {

constexpr int64_t kLargest = int64_t{1} << 24;       // of a width or a number of heads
constexpr int64_t kParallelWork = int64_t{1} << 15;  // multiply-adds; waking threads costs more than fewer are worth
constexpr int64_t kBlockFloats = 4096;               // of state in a task: 16 KB stay in the first cache
constexpr int64_t kChannels = 64, kColumns = 32;     // of a task

int32_t check_sizes(const char* op, int64_t tokens, int64_t start, std::initializer_list<int64_t> sizes) {
  if (tokens < 0 || start < 0)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " tokens at position %" PRId64, op, tokens, start);
  for (const int64_t size : sizes)
    if (size < 1 || size > kLargest) return fail(MOEC_INVALID_ARGUMENT, "%s: impossible size %" PRId64, op, size);
  return MOEC_OK;
}

// f32 [a, b, c]
int32_t check_floats(const char* name, const void* data, uint64_t bytes, int64_t a, int64_t b, int64_t c) {
  uint64_t rows = 0;
  if (!checked_product(a, b, 1, &rows) || rows > INT64_MAX)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " x %" PRId64 " is not a possible shape", name, a, b);
  return check_buffer(name, data, bytes, int64_t(rows), c, sizeof(float));
}
int32_t check(const char* name, const moec_in& x, int64_t a, int64_t b, int64_t c) {
  return check_floats(name, x.data, x.bytes, a, b, c);
}
int32_t check(const char* name, const moec_out& x, int64_t a, int64_t b, int64_t c) {
  return check_floats(name, x.data, x.bytes, a, b, c);
}

const float* floats(const moec_in& x) { return static_cast<const float*>(x.data); }
float* floats(const moec_out& x) { return static_cast<float*>(x.data); }

// Threads for so many multiply-adds, given as factors whose product may be too large for an integer.
int32_t threads_for(double a, double b, double c) { return a * b * c < double(kParallelWork) ? 1 : workers(); }

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// to[r] = from[r] * (normalize: 1 / sqrt(sum of squares + eps)) * scale, rows of `width`
void normalized(const float* from, int64_t rows, int64_t width, float eps, float scale, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += width, to += width) {
    float factor = scale;
    if (eps >= 0.0f) {
      double sum = 0.0;
      for (int64_t i = 0; i < width; ++i) sum += double(from[i]) * double(from[i]);
      factor = float(double(scale) / std::sqrt(sum + double(eps)));
    }
    for (int64_t i = 0; i < width; ++i) to[i] = from[i] * factor;
  }
}

}  // namespace
}  // namespace moec

using namespace moec;

int32_t moec_short_conv(const moec_short_conv_args* args) {
  MOEC_RETURN_IF_ERROR(select_isa());
  const moec_short_conv_args& a = *args;
  MOEC_RETURN_IF_ERROR(check_sizes("short_conv", a.tokens, a.start_pos, {a.channels, a.taps}));
  if (a.taps < 2 || (a.silu != 0 && a.silu != 1))
    return fail(MOEC_INVALID_ARGUMENT, "short_conv: %" PRId64 " taps, silu %d", a.taps, a.silu);
  MOEC_RETURN_IF_ERROR(check("short_conv: x", a.x, a.tokens, 1, a.channels));
  MOEC_RETURN_IF_ERROR(check("short_conv: weight", a.weight, a.taps, 1, a.channels));
  if (a.bias.data || a.bias.bytes) MOEC_RETURN_IF_ERROR(check("short_conv: bias", a.bias, 1, 1, a.channels));
  MOEC_RETURN_IF_ERROR(check("short_conv: state", a.state, a.taps - 1, 1, a.channels));
  MOEC_RETURN_IF_ERROR(check("short_conv: out", a.out, a.tokens, 1, a.channels));
  if (a.tokens == 0) return MOEC_OK;
  ConvTask task{a.tokens, a.channels, a.taps, 0, 0, a.start_pos == 0, a.silu != 0, floats(a.x), floats(a.weight),
                floats(a.bias), floats(a.state), floats(a.out)};
  for_each_unit(threads_for(a.tokens, a.channels, a.taps), blocks(a.channels, kChannels), [&](int32_t, int64_t unit) {
    ConvTask own = task;
    own.begin = unit * kChannels;
    own.end = std::min(own.begin + kChannels, own.channels);
    kernels().short_conv(own);
  });
  return MOEC_OK;
}

int32_t moec_gated_delta(const moec_gated_delta_args* args) {
  MOEC_RETURN_IF_ERROR(select_isa());
  const moec_gated_delta_args& a = *args;
  const char* const op = "gated_delta";
  MOEC_RETURN_IF_ERROR(check_sizes(op, a.tokens, a.start_pos, {a.key_heads, a.heads, a.key_dim, a.value_dim}));
  if (a.heads % a.key_heads)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " heads are not a multiple of %" PRId64 " key heads", op, a.heads,
                a.key_heads);
  MOEC_RETURN_IF_ERROR(check("gated_delta: q", a.q, a.tokens, a.key_heads, a.key_dim));
  MOEC_RETURN_IF_ERROR(check("gated_delta: k", a.k, a.tokens, a.key_heads, a.key_dim));
  MOEC_RETURN_IF_ERROR(check("gated_delta: v", a.v, a.tokens, a.heads, a.value_dim));
  MOEC_RETURN_IF_ERROR(check("gated_delta: decay", a.decay, a.tokens, 1, a.heads));
  MOEC_RETURN_IF_ERROR(check("gated_delta: beta", a.beta, a.tokens, 1, a.heads));
  MOEC_RETURN_IF_ERROR(check("gated_delta: state", a.state, a.heads, a.key_dim, a.value_dim));
  MOEC_RETURN_IF_ERROR(check("gated_delta: out", a.out, a.tokens, a.heads, a.value_dim));
  if (a.tokens == 0) return MOEC_OK;
  const int64_t keys = a.key_heads * a.key_dim;
  ScratchPlan plan;
  const size_t q_at = plan.add<float>(a.tokens * keys), k_at = plan.add<float>(a.tokens * keys);
  const size_t decay_at = plan.add<float>(a.tokens * a.heads);
  uint8_t* const memory = scratch(plan.total());
  if (!memory) return fail(MOEC_OUT_OF_MEMORY, "%s: no memory for scratch", op);
  float* const q = reinterpret_cast<float*>(memory + q_at);
  float* const k = reinterpret_cast<float*>(memory + k_at);
  float* const decay = reinterpret_cast<float*>(memory + decay_at);
  const int32_t threads = threads_for(double(a.tokens) * double(a.heads), a.key_dim, a.value_dim);
  for_each_unit(threads, a.tokens, [&](int32_t, int64_t t) {
    normalized(floats(a.q) + t * keys, a.key_heads, a.key_dim, a.eps, a.scale, q + t * keys);
    normalized(floats(a.k) + t * keys, a.key_heads, a.key_dim, a.eps, 1.0f, k + t * keys);
    kernels().exponential(floats(a.decay) + t * a.heads, a.heads, decay + t * a.heads);
  });
  DeltaTask task{a.tokens, a.key_heads, a.heads, a.key_dim, a.value_dim, 0, 0, 0, a.start_pos == 0, q, k, floats(a.v),
                 decay, floats(a.beta), floats(a.state), floats(a.out)};
  const int64_t parts = blocks(a.value_dim, kColumns);
  for_each_unit(threads, a.heads * parts, [&](int32_t, int64_t unit) {
    DeltaTask own = task;
    own.head = unit / parts;
    own.begin = unit % parts * kColumns;
    own.end = std::min(own.begin + kColumns, own.value_dim);
    kernels().gated_delta(own);
  });
  return MOEC_OK;
}

int32_t moec_selective_scan(const moec_selective_scan_args* args) {
  MOEC_RETURN_IF_ERROR(select_isa());
  const moec_selective_scan_args& a = *args;
  const char* const op = "selective_scan";
  MOEC_RETURN_IF_ERROR(check_sizes(op, a.tokens, a.start_pos, {a.heads, a.groups, a.head_dim, a.state_dim}));
  if (a.heads % a.groups)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " heads are not a multiple of %" PRId64 " groups", op, a.heads, a.groups);
  if (a.a_columns != 1 && a.a_columns != a.state_dim)
    return fail(MOEC_INVALID_ARGUMENT, "%s: a has %" PRId64 " columns, not 1 or %" PRId64, op, a.a_columns, a.state_dim);
  MOEC_RETURN_IF_ERROR(check("selective_scan: x", a.x, a.tokens, a.heads, a.head_dim));
  MOEC_RETURN_IF_ERROR(check("selective_scan: dt", a.dt, a.tokens, 1, a.heads));
  MOEC_RETURN_IF_ERROR(check("selective_scan: a", a.a, a.heads, 1, a.a_columns));
  MOEC_RETURN_IF_ERROR(check("selective_scan: b", a.b, a.tokens, a.groups, a.state_dim));
  MOEC_RETURN_IF_ERROR(check("selective_scan: c", a.c, a.tokens, a.groups, a.state_dim));
  if (a.d.data || a.d.bytes) MOEC_RETURN_IF_ERROR(check("selective_scan: d", a.d, 1, 1, a.heads));
  MOEC_RETURN_IF_ERROR(check("selective_scan: state", a.state, a.heads, a.head_dim, a.state_dim));
  MOEC_RETURN_IF_ERROR(check("selective_scan: out", a.out, a.tokens, a.heads, a.head_dim));
  if (a.tokens == 0) return MOEC_OK;
  ScanTask task{a.tokens, a.heads, a.groups, a.head_dim, a.state_dim, a.a_columns, 0, 0, a.start_pos == 0, floats(a.x),
                floats(a.dt), floats(a.a), floats(a.b), floats(a.c), floats(a.d), floats(a.state), floats(a.out)};
  const int64_t rows = a.heads * a.head_dim, each = std::max(int64_t{1}, kBlockFloats / a.state_dim);
  for_each_unit(threads_for(a.tokens, rows, a.state_dim), blocks(rows, each), [&](int32_t, int64_t unit) {
    ScanTask own = task;
    own.begin = unit * each;
    own.end = std::min(own.begin + each, rows);
    kernels().selective_scan(own);
  });
  return MOEC_OK;
}
