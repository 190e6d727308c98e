// What one instruction set gives to attention, norms and RoPE. Internal to the library; the C API is attention.h.
//
// Letters: T tokens, H query heads, KV key/value heads, d head size, e value size (mostly d), S cache capacity.
#ifndef MOEC_ATTENTION_KERNELS_H_
#define MOEC_ATTENTION_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

namespace moec {

// One call of cached attention, already checked. Strides follow from the sizes: everything is contiguous.
struct AttentionCall {
  int64_t tokens, heads, kv_heads, head_dim, value_dim, capacity, start;
  int64_t rest_dim;  // of the second part of every key and query, 0: they have one. Multiples of 16 then, as is head_dim
  int64_t window;  // 0 or >= capacity: every earlier position; else the last `window` positions, its own included
  float scale;
  float softcap;        // 0: scores are not capped
  const float* q;       // [T, H, d]
  const void* k_cache;  // f32 or int8 [S, KV, d], the new rows already written
  const void* v_cache;  // [S, KV, e]
  const float* k_scale;  // [S, KV], null for an f32 cache
  const float* v_scale;
  const float* q_rest;  // [T, H, rest_dim], and so on; all null without a second part
  const void* k_rest;
  const float* k_rest_scale;
  const float* sinks;  // [H], or null
  float* out;          // [T, H, e]

  int64_t width() const { return head_dim + rest_dim; }  // of a whole key

  int64_t first_key(int64_t token) const {
    const int64_t position = start + token;
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
  }
};

// A share of the work: queries against the keys of one chunk that lie in [key_begin, key_end). `tile` takes the tokens
// [token_begin, token_end) and the heads of KV head kv_begin; `decode` takes one token and the heads of KV heads [kv_begin,
// kv_end). key_begin is a multiple of every instruction set's lanes: keys before a row's first are masked.
struct AttentionItem {
  int64_t kv_begin, kv_end;
  int64_t token_begin, token_end;
  int64_t key_begin, key_end;
  // Unnormalised results: acc f32 [rows, e], max [rows], sum [rows]. Rows are ordered (token, head of the item); those of
  // `decode` are all H heads, of which it writes its own.
  float* partial_acc;
  float* partial_max;
  float* partial_sum;
};

// The keys of a sequence are cut into chunks at multiples of this, whatever calls they came in and whatever a window hides.
// A row's result is that of its chunks, folded in their order: so that a token gives the same bits alone and among others.
constexpr int64_t kKeyChunk = 256;
// Keys scored at a time. Keys, values, scores and accumulators of one item then fit a 512 KB second-level cache.
constexpr int64_t kKeyBlock = 64;
// The largest code of a query or of a weight over an INT8 cache: two signed bytes of it are within [-127, 127] and [-128, 127].
constexpr int32_t kMostCode = 127 * 256;

struct AttentionKernels {
  int64_t lanes;       // floats of one vector register
  int64_t code_lanes;  // codes of a key in one
  // One token: reads the caches once, in order. value_dim must be a multiple of `lanes`, head_dim too, or of `code_lanes` where
  // the caches hold codes. A second part of the keys is taken in codes only, and of the same multiple.
  void (*decode)(const AttentionCall&, const AttentionItem&, float* scratch);
  // What all `tile`s of the same tokens and KV head find in their scratch: the queries, as they want them.
  void (*prepare)(const AttentionCall&, const AttentionItem&, float* scratch);
  // Many tokens of one KV head. Any sizes.
  void (*tile)(const AttentionCall&, const AttentionItem&, float* scratch);
  // A row's next chunk into what it has: acc = e^(row_max - m) acc + e^(part_max - m) part with m the larger, sums likewise.
  void (*fold_row)(const float* part, float part_max, float part_sum, int64_t n, float* acc, float* row_max, float* row_sum);
  // q = clamp(rint(x * (127 / max|x|)), -127, 127), scale = max|x| / 127; n values
  void (*quantize_row)(const float* x, int64_t n, int8_t* q, float* scale);
  void (*rms_norm_row)(const float* x, const float* weight, int64_t n, float eps, float* y);
  // cos, sin: n/2 values. x may equal y.
  void (*rope_row)(const float* x, const float* cos, const float* sin, int64_t n, bool interleaved, float* y);
};

// Floats of scratch that one `tile` (head_dim: of a whole key) or `decode` needs.
inline int64_t padded(int64_t n, int64_t lanes) { return (n + lanes - 1) / lanes * lanes; }
inline int64_t tile_scratch(int64_t lanes, int64_t rows, int64_t head_dim, int64_t value_dim) {
  const int64_t r = padded(rows, lanes), d = padded(head_dim, lanes), e = padded(value_dim, lanes);
  return r * (d + kKeyChunk + e + 3) + kKeyBlock * (d + e) + 2 * kKeyChunk;
}
inline int64_t decode_scratch(int64_t lanes, const AttentionCall& call, int64_t keys) {
  const int64_t second = call.rest_dim ? (call.heads + 1) * padded(keys, lanes) + call.width() : 0;
  return (call.heads + 2) * padded(keys, lanes) + call.heads + (call.heads + 1) * call.width() + second;
}

}  // namespace moec

#endif  // MOEC_ATTENTION_KERNELS_H_
