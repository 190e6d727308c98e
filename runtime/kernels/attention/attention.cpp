// Attention over a KV cache, RMS norm and rotary embedding: checks, the division into items, and the C API.
//
// What is summed together, and in which order, depends on a token's position only: keys lie in chunks at fixed positions,
// and a row folds the results of its chunks in their order. So a token gives the same bits on one thread and on eight, alone
// and among others.
#include "attention.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include <algorithm>

#include "attention_run.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/status.h"
#include "isa/isa.h"

namespace moec {
namespace {

constexpr int64_t kTileRows = 96;     // (token, head) rows that share one pass over the keys of a KV head
constexpr int64_t kEnoughItems = 16;  // below this, chunks are items of their own: eight threads stay busy
constexpr int64_t kAlign = 16;           // keys: a multiple of every instruction set's lanes
constexpr int64_t kRowBlock = 16;         // rows of a norm, or tokens of a cache write, per item
constexpr int64_t kParallelElements = 1 << 15;  // smaller norms and rotations are done by the caller: waking costs more

float* scratch_floats(int64_t count) { return reinterpret_cast<float*>(scratch(static_cast<size_t>(count) * sizeof(float))); }

int32_t no_memory(const char* op) { return fail(MOEC_OUT_OF_MEMORY, "%s: no memory for scratch", op); }

// [a, b, c] elements of `size` bytes
int32_t check_shape(const char* name, const void* data, uint64_t bytes, int64_t a, int64_t b, int64_t c, int64_t size) {
  uint64_t rows = 0;
  if (!checked_product(a, b, 1, &rows) || rows > INT64_MAX)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " x %" PRId64 " is not a possible shape", name, a, b);
  return check_buffer(name, data, bytes, static_cast<int64_t>(rows), c, size);
}

int32_t check(const moec_attention_args& a) {
  if (a.tokens < 0 || a.heads < 1 || a.heads > kMostWidth || a.kv_heads < 1 || a.head_dim < 1 || a.head_dim > kMostWidth ||
      a.value_dim < 1 || a.value_dim > kMostWidth)
    return fail(MOEC_INVALID_ARGUMENT,
                "cached_attention: impossible sizes: %" PRId64 " tokens, %" PRId64 " heads, %" PRId64
                " key/value heads, head size %" PRId64 ", value size %" PRId64,
                a.tokens, a.heads, a.kv_heads, a.head_dim, a.value_dim);
  if (a.heads % a.kv_heads != 0)
    return fail(MOEC_INVALID_ARGUMENT,
                "cached_attention: %" PRId64 " heads are not a multiple of %" PRId64 " key/value heads", a.heads, a.kv_heads);
  if (!(a.softcap >= 0.0f && a.softcap <= 3.402823466e38f))
    return fail(MOEC_INVALID_ARGUMENT, "cached_attention: softcap %g is negative or not finite", static_cast<double>(a.softcap));
  MOEC_RETURN_IF_ERROR(check_positions("cached_attention", a.tokens, a.start_pos, a.window, a.capacity));
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
  if (a.sinks.data || a.sinks.bytes) MOEC_RETURN_IF_ERROR(check_in("cached_attention: sinks", a.sinks, a.heads, 1, 1));
  return check_out("cached_attention: out", a.out, a.tokens, a.heads, a.value_dim);
}

void write_rows(const AttentionKernels& isa, const CacheRows& c, int64_t start, int64_t begin, int64_t end) {
  const int64_t width = c.width, row = (start + begin) * c.heads, rows = (end - begin) * c.heads;
  const float* x = static_cast<const float*>(c.rows.data) + begin * c.heads * width;
  if (!c.scales.data) {
    memcpy(static_cast<float*>(c.cache.data) + row * width, x, static_cast<size_t>(rows * width) * sizeof(float));
    return;
  }
  int8_t* codes = static_cast<int8_t*>(c.cache.data) + row * width;
  float* scale = static_cast<float*>(c.scales.data) + row;
  for (int64_t i = 0; i < rows; ++i) isa.quantize_row(x + i * width, width, codes + i * width, scale + i);
}

// Unnormalised results of some rows over the keys so far: acc [rows, e], max [rows], sum [rows], one after the other.
struct Partial {
  float *acc, *top, *sum;

  static int64_t floats(int64_t rows, int64_t e) { return rows * (e + 2); }
  static Partial at(float* base, int64_t rows, int64_t e) { return {base, base + rows * e, base + rows * (e + 1)}; }
};

// Adds row r of `chunk` to row r of `all`; `begins`: it is the first chunk.
void fold(const AttentionKernels& isa, const Partial& all, const Partial& chunk, int64_t r, int64_t e, bool begins) {
  if (!begins) return isa.fold_row(chunk.acc + r * e, chunk.top[r], chunk.sum[r], e, all.acc + r * e, all.top + r, all.sum + r);
  memcpy(all.acc + r * e, chunk.acc + r * e, static_cast<size_t>(e) * sizeof(float));
  all.top[r] = chunk.top[r];
  all.sum[r] = chunk.sum[r];
}

// The result of row r, a row of query head `head`. The head's sink is folded in after all keys, as a chunk with one score and
// no value; `kept` is the factor by which this reduces the values.
void normalize(const AttentionKernels& isa, const AttentionCall& call, const Partial& all, int64_t r, int64_t head, float* out) {
  const int64_t e = call.value_dim;
  float kept = 1.0f;
  if (call.sinks) {
    const float no_value = 0.0f;
    isa.fold_row(&no_value, call.sinks[head], 1.0f, 1, &kept, all.top + r, all.sum + r);
  }
  const float inverse = kept / all.sum[r];
  for (int64_t j = 0; j < e; ++j) out[j] = all.acc[r * e + j] * inverse;
}

// The keys of chunk `index` that tokens [begin, end) see, as an item.
AttentionItem chunk_item(const AttentionCall& call, int64_t begin, int64_t end, int64_t index, const Partial& partial) {
  const int64_t first = call.first_key(begin) / kAlign * kAlign, last = call.start + end;
  return {0,           1,           begin,      end, std::max(first, index * kKeyChunk), std::min(last, (index + 1) * kKeyChunk),
          partial.acc, partial.top, partial.sum};
}

int32_t decode_one(const AttentionKernels& isa, const AttentionCall& call, const char* op) {
  const int64_t h = call.heads, e = call.value_dim, kv = call.kv_heads;
  const int64_t first = call.first_key(0) / kKeyChunk, chunks = call.start / kKeyChunk + 1 - first;
  const int64_t groups = std::clamp((kEnoughItems / 2 + chunks - 1) / chunks, int64_t{1}, kv);  // of heads, in a short context
  const int32_t threads = workers();
  const int64_t part = Partial::floats(h, e), own = decode_scratch(isa.lanes, call, kKeyChunk);
  float* scratch = scratch_floats((chunks + 1) * part + threads * own);
  if (!scratch) return no_memory(op);
  for_each_unit(threads, chunks * groups, [&](int32_t worker, int64_t i) {
    const int64_t chunk = i / groups, group = i % groups;
    AttentionItem item = chunk_item(call, 0, 1, first + chunk, Partial::at(scratch + (1 + chunk) * part, h, e));
    item.kv_begin = kv * group / groups;
    item.kv_end = kv * (group + 1) / groups;
    isa.decode(call, item, scratch + (1 + chunks) * part + worker * own);
  });
  const Partial all = Partial::at(scratch, h, e);
  for (int64_t r = 0; r < h; ++r) {
    for (int64_t i = 0; i < chunks; ++i) fold(isa, all, Partial::at(scratch + (1 + i) * part, h, e), r, e, i == 0);
    normalize(isa, call, all, r, r, call.out + r * e);
  }
  return MOEC_OK;
}

// The tokens of one tile and the heads of one KV head, and the chunks of keys that they see.
struct Group {
  int64_t kv_head, begin, end, first_chunk, chunks;
};

Group group_of(const AttentionCall& call, int64_t tile, int64_t tiles, int64_t index) {
  Group g;
  g.kv_head = index % call.kv_heads;
  g.begin = (tiles - 1 - index / call.kv_heads) * tile;  // the last tokens see most keys: start with them
  g.end = std::min(g.begin + tile, call.tokens);
  g.first_chunk = call.first_key(g.begin) / kKeyChunk;
  g.chunks = (call.start + g.end - 1) / kKeyChunk + 1 - g.first_chunk;
  return g;
}

// Folds one chunk into the rows of a group that see a key of it.
void fold_rows(const AttentionKernels& isa, const AttentionCall& call, const Group& g, int64_t chunk, const Partial& all, const Partial& part) {
  const int64_t per = call.heads / call.kv_heads;
  for (int64_t r = 0; r < (g.end - g.begin) * per; ++r) {
    const int64_t token = g.begin + r / per, first = call.first_key(token) / kKeyChunk;
    if (chunk >= first && chunk <= (call.start + token) / kKeyChunk) fold(isa, all, part, r, call.value_dim, chunk == first);
  }
}

void write_rows_of(const AttentionKernels& isa, const AttentionCall& call, const Group& g, const Partial& all) {
  const int64_t per = call.heads / call.kv_heads;
  for (int64_t r = 0; r < (g.end - g.begin) * per; ++r) {
    const int64_t head = g.kv_head * per + r % per;
    normalize(isa, call, all, r, head, call.out + ((g.begin + r / per) * call.heads + head) * call.value_dim);
  }
}

int32_t many_tokens(const AttentionKernels& isa, const AttentionCall& call, const char* op) {
  const int64_t per = call.heads / call.kv_heads, e = call.value_dim;
  const int64_t most = std::max(kTileRows / per, int64_t{1}), parts = (call.tokens + most - 1) / most;
  const int64_t tile = (call.tokens + parts - 1) / parts, tiles = (call.tokens + tile - 1) / tile;  // of nearly equal size
  const int64_t rows = tile * per, groups = tiles * call.kv_heads;
  int64_t chunks = 0;
  for (int64_t i = 0; i < groups; i += call.kv_heads) chunks = std::max(chunks, group_of(call, tile, tiles, i).chunks);
  const int32_t threads = workers();
  const bool split = groups < kEnoughItems && chunks > 1;
  const int64_t wave = split ? std::min(chunks, kEnoughItems / groups) : 0;  // chunks of a group whose results wait
  const int64_t part = Partial::floats(rows, e), waiting = split ? groups * (1 + wave) * part : 0;
  const int64_t own = tile_scratch(isa.lanes, rows, call.width(), e) + (split ? 0 : 2 * part);
  float* scratch = scratch_floats(waiting + threads * own);
  if (!scratch) return no_memory(op);
  float* const workers_own = scratch + waiting;
  const auto run = [&](const Group& g, int64_t chunk, const Partial& to, float* space, bool first) {
    AttentionItem item = chunk_item(call, g.begin, g.end, chunk, to);
    item.kv_begin = g.kv_head;
    item.kv_end = g.kv_head + 1;
    if (first) isa.prepare(call, item, space);
    isa.tile(call, item, space);
  };
  if (!split) {
    for_each_unit(threads, groups, [&](int32_t worker, int64_t i) {
      const Group g = group_of(call, tile, tiles, i);
      float* const space = workers_own + worker * own;
      const Partial all = Partial::at(space, rows, e), one = Partial::at(space + part, rows, e);
      for (int64_t chunk = g.first_chunk; chunk < g.first_chunk + g.chunks; ++chunk) {
        run(g, chunk, one, space + 2 * part, chunk == g.first_chunk);
        fold_rows(isa, call, g, chunk, all, one);
      }
      write_rows_of(isa, call, g, all);
    });
    return MOEC_OK;
  }
  const auto place = [&](int64_t group, int64_t slot) {
    return Partial::at(scratch + (group * (1 + wave) + slot) * part, rows, e);
  };
  for (int64_t from = 0; from < chunks; from += wave) {
    for_each_unit(threads, groups * wave, [&](int32_t worker, int64_t i) {
      const Group g = group_of(call, tile, tiles, i / wave);
      const int64_t chunk = from + i % wave;
      if (chunk < g.chunks) run(g, g.first_chunk + chunk, place(i / wave, 1 + i % wave), workers_own + worker * own, true);
    });
    for_each_unit(threads, groups, [&](int32_t, int64_t i) {
      const Group g = group_of(call, tile, tiles, i);
      const Partial all = place(i, 0);
      for (int64_t slot = 0; slot < wave && from + slot < g.chunks; ++slot)
        fold_rows(isa, call, g, g.first_chunk + from + slot, all, place(i, 1 + slot));
      if (from + wave >= chunks) write_rows_of(isa, call, g, all);
    });
  }
  return MOEC_OK;
}

int64_t rows_per_unit(int64_t rows, int64_t width) {
  return rows * width < kParallelElements ? std::max(rows, int64_t{1}) : std::max(kParallelElements / 4 / width, int64_t{1});
}

}  // namespace

int32_t check_in(const char* name, const moec_in& x, int64_t a, int64_t b, int64_t c) {
  return check_shape(name, x.data, x.bytes, a, b, c, sizeof(float));
}

int32_t check_out(const char* name, const moec_out& x, int64_t a, int64_t b, int64_t c, int64_t size) {
  return check_shape(name, x.data, x.bytes, a, b, c, size);
}

int32_t check_positions(const char* op, int64_t tokens, int64_t start_pos, int64_t window, int64_t capacity) {
  if (capacity < 0 || capacity > kMaxCapacity)
    return fail(MOEC_INVALID_ARGUMENT, "%s: a cache of %" PRId64 " positions, the limit is %" PRId64, op, capacity, kMaxCapacity);
  if (window < 0) return fail(MOEC_INVALID_ARGUMENT, "%s: window %" PRId64 " is negative", op, window);
  if (start_pos < 0 || tokens > capacity || start_pos > capacity - tokens)
    return fail(MOEC_INVALID_ARGUMENT, "%s: %" PRId64 " tokens at position %" PRId64 " do not fit a cache of %" PRId64, op, tokens,
                start_pos, capacity);
  return MOEC_OK;
}

void write_caches(const AttentionKernels& isa, const CacheRows (&caches)[2], int64_t tokens, int64_t start) {
  const int64_t blocks = (tokens + kRowBlock - 1) / kRowBlock;
  for_each_unit(workers(), blocks, [&](int32_t, int64_t block) {
    const int64_t begin = block * kRowBlock, end = std::min(begin + kRowBlock, tokens);
    for (const CacheRows& cache : caches) write_rows(isa, cache, start, begin, end);
  });
}

int32_t attend(const AttentionKernels& isa, const AttentionCall& call, const char* op) {
  const int64_t multiple = call.k_scale ? isa.code_lanes : isa.lanes;
  const bool whole = call.head_dim % multiple == 0 && call.rest_dim % multiple == 0 && call.value_dim % isa.lanes == 0;
  const bool alone = call.tokens == 1 && whole && (call.k_scale || !call.rest_dim);
  return alone ? decode_one(isa, call, op) : many_tokens(isa, call, op);
}

}  // namespace moec

using namespace moec;

int32_t moec_cached_attention(const moec_attention_args* args) {
  if (!args) return fail(MOEC_INVALID_ARGUMENT, "cached_attention: no arguments");
  const moec_attention_args& a = *args;
  MOEC_RETURN_IF_ERROR(select_isa());
  const int32_t status = check(a);
  if (status != MOEC_OK || a.tokens == 0) return status;
  const AttentionKernels& chosen = isa().attention;
  write_caches(chosen, {{a.k, a.k_cache, a.k_scale, a.kv_heads, a.head_dim}, {a.v, a.v_cache, a.v_scale, a.kv_heads, a.value_dim}},
               a.tokens, a.start_pos);
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
  call.softcap = a.softcap;
  call.q = static_cast<const float*>(a.q.data);
  call.k_cache = a.k_cache.data;
  call.v_cache = a.v_cache.data;
  call.k_scale = static_cast<const float*>(a.k_scale.data);
  call.v_scale = static_cast<const float*>(a.v_scale.data);
  call.sinks = static_cast<const float*>(a.sinks.data);
  call.out = static_cast<float*>(a.out.data);
  return attend(chosen, call, "cached_attention");
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
