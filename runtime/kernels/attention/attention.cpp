// Attention over a KV cache, RMS norm and rotary embedding: checks, the division into items, and the C API.
//
// How work is divided depends on the sizes only, never on the number of threads, and partial results are combined in a
// fixed order: the same call gives the same bits on one thread and on eight.
#include "attention.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include <algorithm>

#include "attention_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"
#include "isa/isa.h"

namespace moec {
namespace {

constexpr int64_t kMaxCapacity = int64_t{1} << 24;  // positions are compared as floats
constexpr int64_t kTileRows = 96;     // (token, head) rows that share one pass over the keys of a KV head
constexpr int64_t kEnoughItems = 16;  // below this, long key ranges are split: eight threads stay busy
constexpr int64_t kShortestSplit = 8 * kKeyBlock;
constexpr int64_t kLongestChunk = 8 * kKeyBlock;
constexpr int64_t kRowBlock = 16;         // rows of a norm, or tokens of a cache write, per item
constexpr int64_t kParallelElements = 1 << 15;  // smaller norms and rotations are done by the caller: waking costs more

float* scratch_floats(int64_t count) { return reinterpret_cast<float*>(scratch(static_cast<size_t>(count) * sizeof(float))); }

int32_t no_memory() { return fail(MOEC_OUT_OF_MEMORY, "cached_attention: no memory for scratch"); }

// [a, b, c] elements of `size` bytes
int32_t check_shape(const char* name, const void* data, uint64_t bytes, int64_t a, int64_t b, int64_t c, int64_t size) {
  uint64_t rows = 0;
  if (!checked_product(a, b, 1, &rows) || rows > INT64_MAX)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " x %" PRId64 " is not a possible shape", name, a, b);
  return check_buffer(name, data, bytes, static_cast<int64_t>(rows), c, size);
}

int32_t check_in(const char* name, const moec_in& x, int64_t a, int64_t b, int64_t c) {
  return check_shape(name, x.data, x.bytes, a, b, c, sizeof(float));
}

int32_t check_out(const char* name, const moec_out& x, int64_t a, int64_t b, int64_t c, int64_t size = sizeof(float)) {
  return check_shape(name, x.data, x.bytes, a, b, c, size);
}

int32_t check(const moec_attention_args& a) {
  constexpr int64_t large = int64_t{1} << 20;
  if (a.tokens < 0 || a.heads < 1 || a.heads > large || a.kv_heads < 1 || a.head_dim < 1 || a.head_dim > large ||
      a.value_dim < 1 || a.value_dim > large)
    return fail(MOEC_INVALID_ARGUMENT,
                "cached_attention: impossible sizes: %" PRId64 " tokens, %" PRId64 " heads, %" PRId64
                " key/value heads, head size %" PRId64 ", value size %" PRId64,
                a.tokens, a.heads, a.kv_heads, a.head_dim, a.value_dim);
  if (a.heads % a.kv_heads != 0)
    return fail(MOEC_INVALID_ARGUMENT,
                "cached_attention: %" PRId64 " heads are not a multiple of %" PRId64 " key/value heads", a.heads, a.kv_heads);
  if (a.capacity < 0 || a.capacity > kMaxCapacity)
    return fail(MOEC_INVALID_ARGUMENT, "cached_attention: a cache of %" PRId64 " positions, the limit is %" PRId64,
                a.capacity, kMaxCapacity);
  if (a.window < 0) return fail(MOEC_INVALID_ARGUMENT, "cached_attention: window %" PRId64 " is negative", a.window);
  if (a.start_pos < 0 || a.tokens > a.capacity || a.start_pos > a.capacity - a.tokens)
    return fail(MOEC_INVALID_ARGUMENT,
                "cached_attention: %" PRId64 " tokens at position %" PRId64 " do not fit a cache of %" PRId64, a.tokens,
                a.start_pos, a.capacity);
  const bool quantized = a.k_scale.data != nullptr || a.v_scale.data != nullptr;
  const int64_t size = quantized ? sizeof(int8_t) : sizeof(float);
  MOEC_RETURN_IF_ERROR(check_in("cached_attention: q", a.q, a.tokens, a.heads, a.head_dim));
  MOEC_RETURN_IF_ERROR(check_in("cached_attention: k", a.k, a.tokens, a.kv_heads, a.head_dim));
  MOEC_RETURN_IF_ERROR(check_in("cached_attention: v", a.v, a.tokens, a.kv_heads, a.value_dim));
  MOEC_RETURN_IF_ERROR(check_out("cached_attention: k_cache", a.k_cache, a.capacity, a.kv_heads, a.head_dim, size));
  MOEC_RETURN_IF_ERROR(check_out("cached_attention: v_cache", a.v_cache, a.capacity, a.kv_heads, a.value_dim, size));
  if (quantized) {
    MOEC_RETURN_IF_ERROR(check_out("cached_attention: k_scale", a.k_scale, a.capacity, a.kv_heads, 1));
    MOEC_RETURN_IF_ERROR(check_out("cached_attention: v_scale", a.v_scale, a.capacity, a.kv_heads, 1));
  }
  return check_out("cached_attention: out", a.out, a.tokens, a.heads, a.value_dim);
}

void write_rows(const AttentionKernels& isa, const moec_in& from, const moec_out& cache, const moec_out& scales, int64_t kv,
                int64_t width, int64_t start, int64_t begin, int64_t end) {
  const float* x = static_cast<const float*>(from.data) + begin * kv * width;
  const int64_t row = (start + begin) * kv, rows = (end - begin) * kv;
  if (!scales.data) {
    memcpy(static_cast<float*>(cache.data) + row * width, x, static_cast<size_t>(rows * width) * sizeof(float));
    return;
  }
  int8_t* codes = static_cast<int8_t*>(cache.data) + row * width;
  float* scale = static_cast<float*>(scales.data) + row;
  for (int64_t i = 0; i < rows; ++i) isa.quantize_row(x + i * width, width, codes + i * width, scale + i);
}

void write_caches(const AttentionKernels& isa, const moec_attention_args& a) {
  const int64_t blocks = (a.tokens + kRowBlock - 1) / kRowBlock;
  for_each_unit(workers(), blocks, [&](int32_t, int64_t block) {
    const int64_t begin = block * kRowBlock, end = std::min(begin + kRowBlock, a.tokens);
    write_rows(isa, a.k, a.k_cache, a.k_scale, a.kv_heads, a.head_dim, a.start_pos, begin, end);
    write_rows(isa, a.v, a.v_cache, a.v_scale, a.kv_heads, a.value_dim, a.start_pos, begin, end);
  });
}

// out = sum_i w_i acc_i / sum_i w_i sum_i with w_i = e^(max_i - max); parts `stride` floats apart, in their order.
void combine(int64_t parts, const float* acc, int64_t acc_stride, const float* top, const float* sum, int64_t stride,
             int64_t e, float* out) {
  float highest = top[0];
  for (int64_t i = 1; i < parts; ++i) highest = std::max(highest, top[i * stride]);
  float total = 0.0f;
  for (int64_t j = 0; j < e; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < parts; ++i) {
    const float weight = expf(top[i * stride] - highest);
    total += weight * sum[i * stride];
    for (int64_t j = 0; j < e; ++j) out[j] += weight * acc[i * acc_stride + j];
  }
  const float inverse = 1.0f / total;
  for (int64_t j = 0; j < e; ++j) out[j] *= inverse;
}

int32_t decode_one(const AttentionKernels& isa, const AttentionCall& call) {
  const int64_t h = call.heads, e = call.value_dim;
  const int64_t first = call.first_key(0), range = call.start + 1 - first;
  const int64_t chunk = std::clamp(padded(range / kEnoughItems, kKeyBlock), kKeyBlock, kLongestChunk);
  const int64_t items = (range + chunk - 1) / chunk;
  const int32_t threads = workers();
  const int64_t part = h * (e + 2), own = decode_scratch(isa.lanes, h, chunk);
  float* scratch = scratch_floats(items * part + threads * own);
  if (!scratch) return no_memory();
  for_each_unit(threads, items, [&](int32_t worker, int64_t i) {
    float* partial = scratch + i * part;
    const int64_t begin = first + i * chunk;
    const AttentionItem item = {0,       0, 1, begin, std::min(begin + chunk, call.start + 1), partial, partial + h * e,
                                partial + h * e + h};
    isa.decode(call, item, scratch + items * part + worker * own);
  });
  for (int64_t i = 0; i < h; ++i)
    combine(items, scratch + i * e, part, scratch + h * e + i, scratch + h * e + h + i, part, e, call.out + i * e);
  return MOEC_OK;
}

int32_t many_tokens(const AttentionKernels& isa, const AttentionCall& call) {
  const int64_t per = call.heads / call.kv_heads, e = call.value_dim;
  const int64_t tile = std::clamp(kTileRows / per, int64_t{1}, call.tokens);
  const int64_t tiles = (call.tokens + tile - 1) / tile, rows = tile * per;
  const int64_t longest = std::min(call.start + call.tokens, call.window > 0 ? call.window + tile : kMaxCapacity);
  const int64_t splits = std::clamp(kEnoughItems / (tiles * call.kv_heads), int64_t{1},
                                    std::max(longest / kShortestSplit, int64_t{1}));
  const int64_t groups = tiles * call.kv_heads, items = groups * splits;
  const int32_t threads = workers();
  const int64_t part = splits > 1 ? rows * (e + 2) : 0;
  const int64_t own = std::max(tile_scratch(isa.lanes, rows, call.head_dim, e), longest);
  float* scratch = scratch_floats(items * part + threads * own);
  if (!scratch) return no_memory();
  const auto tokens_of = [&](int64_t group, int64_t* begin, int64_t* end) {
    *begin = (tiles - 1 - group / call.kv_heads) * tile;  // the last tokens see most keys: start with them
    *end = std::min(*begin + tile, call.tokens);
  };
  for_each_unit(threads, items, [&](int32_t worker, int64_t i) {
    const int64_t group = i / splits, split = i % splits;
    AttentionItem item = {};
    item.kv_head = group % call.kv_heads;
    tokens_of(group, &item.token_begin, &item.token_end);
    const int64_t from = call.first_key(item.token_begin), to = call.start + item.token_end;
    const int64_t share = padded((to - from + splits - 1) / splits, kKeyBlock);
    item.key_begin = std::min(from + split * share, to);
    item.key_end = std::min(item.key_begin + share, to);
    if (splits > 1) {
      item.partial_acc = scratch + i * part;
      item.partial_max = item.partial_acc + rows * e;
      item.partial_sum = item.partial_max + rows;
    }
    isa.tile(call, item, scratch + items * part + worker * own);
  });
  if (splits == 1) return MOEC_OK;
  for (int64_t group = 0; group < groups; ++group) {
    int64_t begin, end;
    tokens_of(group, &begin, &end);
    const float* parts = scratch + group * splits * part;
    for (int64_t r = 0; r < (end - begin) * per; ++r) {
      float* out = call.out + ((begin + r / per) * call.heads + group % call.kv_heads * per + r % per) * e;
      combine(splits, parts + r * e, part, parts + rows * e + r, parts + rows * e + rows + r, part, e, out);
    }
  }
  return MOEC_OK;
}

int64_t rows_per_unit(int64_t rows, int64_t width) {
  return rows * width < kParallelElements ? std::max(rows, int64_t{1}) : std::max(kParallelElements / 4 / width, int64_t{1});
}

}  // namespace
}  // namespace moec

using namespace moec;

int32_t moec_cached_attention(const moec_attention_args* args) {
  if (!args) return fail(MOEC_INVALID_ARGUMENT, "cached_attention: no arguments");
  const moec_attention_args& a = *args;
  MOEC_RETURN_IF_ERROR(select_isa());
  const int32_t status = check(a);
  if (status != MOEC_OK || a.tokens == 0) return status;
  const AttentionKernels& chosen = isa().attention;
  write_caches(chosen, a);
  AttentionCall call = {};
  call.tokens = a.tokens;
  call.heads = a.heads;
  call.kv_heads = a.kv_heads;
  call.head_dim = a.head_dim;
  call.value_dim = a.value_dim;
  call.capacity = a.capacity;
  call.start = a.start_pos;
  call.window = a.window >= a.capacity ? 0 : a.window;  // sees everything; sums with it must not overflow
  call.scale = a.scale;
  call.q = static_cast<const float*>(a.q.data);
  call.k_cache = a.k_cache.data;
  call.v_cache = a.v_cache.data;
  call.k_scale = static_cast<const float*>(a.k_scale.data);
  call.v_scale = static_cast<const float*>(a.v_scale.data);
  call.out = static_cast<float*>(a.out.data);
  const bool whole = a.head_dim % chosen.lanes == 0 && a.value_dim % chosen.lanes == 0;
  return a.tokens == 1 && whole ? decode_one(chosen, call) : many_tokens(chosen, call);
}

int32_t moec_rms_norm(int64_t rows, int64_t n, float eps, moec_in x, moec_in weight, moec_out y) {
  MOEC_RETURN_IF_ERROR(select_isa());
  if (rows < 0 || n < 1)
    return fail(MOEC_INVALID_ARGUMENT, "rms_norm: impossible sizes: %" PRId64 " rows of %" PRId64, rows, n);
  MOEC_RETURN_IF_ERROR(check_in("rms_norm: x", x, rows, n, 1));
  MOEC_RETURN_IF_ERROR(check_out("rms_norm: y", y, rows, n, 1));
  if (weight.data || weight.bytes) MOEC_RETURN_IF_ERROR(check_in("rms_norm: weight", weight, n, 1, 1));
  const AttentionKernels& chosen = isa().attention;
  const float* from = static_cast<const float*>(x.data);
  const float* w = static_cast<const float*>(weight.data);
  float* to = static_cast<float*>(y.data);
  const int64_t block = rows_per_unit(rows, n);
  for_each_unit(workers(), (rows + block - 1) / block, [&](int32_t, int64_t unit) {
    for (int64_t r = unit * block; r < std::min((unit + 1) * block, rows); ++r)
      chosen.rms_norm_row(from + r * n, w, n, eps, to + r * n);
  });
  return MOEC_OK;
}

int32_t moec_rope(int64_t tokens, int64_t heads, int64_t d, int32_t interleaved, moec_in x, moec_in cos, moec_in sin,
                  moec_out y) {
  MOEC_RETURN_IF_ERROR(select_isa());
  if (tokens < 0 || heads < 1 || d < 2 || d % 2 != 0)
    return fail(MOEC_INVALID_ARGUMENT, "rope: impossible sizes: %" PRId64 " tokens, %" PRId64 " heads, head size %" PRId64,
                tokens, heads, d);
  MOEC_RETURN_IF_ERROR(check_in("rope: x", x, tokens, heads, d));
  MOEC_RETURN_IF_ERROR(check_in("rope: cos", cos, tokens, d / 2, 1));
  MOEC_RETURN_IF_ERROR(check_in("rope: sin", sin, tokens, d / 2, 1));
  MOEC_RETURN_IF_ERROR(check_out("rope: y", y, tokens, heads, d));
  if (tokens == 0) return MOEC_OK;  // heads and d may be any then, and their product no number
  const AttentionKernels& chosen = isa().attention;
  const float* from = static_cast<const float*>(x.data);
  const float* c = static_cast<const float*>(cos.data);
  const float* s = static_cast<const float*>(sin.data);
  float* to = static_cast<float*>(y.data);
  const int64_t block = rows_per_unit(tokens, heads * d);
  for_each_unit(workers(), (tokens + block - 1) / block, [&](int32_t, int64_t unit) {
    for (int64_t t = unit * block; t < std::min((unit + 1) * block, tokens); ++t)
      for (int64_t h = 0; h < heads; ++h)
        chosen.rope_row(from + (t * heads + h) * d, c + t * (d / 2), s + t * (d / 2), d, interleaved != 0,
                        to + (t * heads + h) * d);
  });
  return MOEC_OK;
}
