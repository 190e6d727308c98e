// C API of attention over a KV cache, RMS norm and rotary embedding: the rules of moec_kernel.h hold (error codes and
// moec_last_error, buffers with their lengths, aligned to their elements), with one difference: results depend neither on the
// number of threads nor on how a sequence is cut into calls, but the instruction set may change the last bits (sums are taken
// in vector order).
//
// Letters: T tokens, H query heads, KV key/value heads (H is a multiple), d head size, e value size, S cache capacity.
#ifndef MOEC_ATTENTION_H_
#define MOEC_ATTENTION_H_

#include "moec_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moec_attention_args {
  int64_t tokens;  // T, may be 0
  int64_t heads, kv_heads, head_dim, value_dim;
  int64_t capacity;   // S
  int64_t start_pos;  // position of the first token; 0 <= start_pos, start_pos + T <= S
  int64_t window;     // 0: every earlier position; else the last `window` positions, its own included
  float scale;        // of the scores
  float softcap;      // > 0: a score s becomes softcap * tanh(s / softcap); 0: as it is
  moec_in q;          // f32 [T, H, d]
  moec_in k;          // f32 [T, KV, d]
  moec_in v;          // f32 [T, KV, e]
  moec_out k_cache;   // f32 or int8 [S, KV, d]; rows start_pos .. start_pos+T-1 are written, then attended
  moec_out v_cache;   // f32 or int8 [S, KV, e]
  moec_out k_scale;   // f32 [S, KV] for int8 caches; absent for f32 caches
  moec_out v_scale;
  moec_out out;       // f32 [T, H, e]
  moec_in sinks;      // f32 [H], or absent: one more score of each head, without a value
} moec_attention_args;

// out[t, h] = softmax over j of (scale * q[t, h] . k_cache[j, h / (H/KV)]) applied to v_cache[j], for the positions j that
// position p = start_pos + t may see: j <= p and, with a window, j > p - window. A sink is one more score in the sum of the
// softmax, and is not capped. INT8 rows are rounded as in compiler/quant.py::quantize_rows, one scale per (position, KV head); a row with a value
// that is not finite becomes NaN.
MOEC_API int32_t moec_cached_attention(const moec_attention_args* args);

typedef struct moec_latent_args {
  int64_t tokens;  // T, may be 0
  int64_t heads;
  int64_t rank, rope_dim;  // R, P: multiples of 16
  int64_t capacity;        // S
  int64_t start_pos;       // as above
  int64_t window;
  float scale;
  moec_in q;               // f32 [T, H, R]
  moec_in q_rope;          // f32 [T, H, P]
  moec_in latents;         // f32 [T, R]
  moec_in rope;            // f32 [T, P]
  moec_out latent_cache;   // f32 or int8 [S, R]; rows start_pos .. start_pos+T-1 are written, then attended
  moec_out rope_cache;     // f32 or int8 [S, P]
  moec_out latent_scale;   // f32 [S] for int8 caches; absent for f32 caches
  moec_out rope_scale;
  moec_out out;            // f32 [T, H, R]
} moec_latent_args;

// Latent attention in its absorbed form (compiler/ops/latent_attention.py): as moec_cached_attention with one key/value head,
// whose key at j is latent_cache[j] beside rope_cache[j] and whose value is latent_cache[j].
MOEC_API int32_t moec_latent_attention(const moec_latent_args* args);

// y[i] = x[i] / sqrt(mean(x[i]^2) + eps) (* weight), rows of n values. weight f32 [n] or absent. y may be x.
MOEC_API int32_t moec_rms_norm(int64_t rows, int64_t n, float eps, moec_in x, moec_in weight, moec_out y);

// x, y f32 [T, H, d]; cos, sin f32 [T, d/2]. Pairs (2i, 2i+1) when interleaved, else (i, i + d/2):
// (a, b) -> (a cos - b sin, b cos + a sin). y may be x.
MOEC_API int32_t moec_rope(int64_t tokens, int64_t heads, int64_t d, int32_t interleaved, moec_in x, moec_in cos,
                           moec_in sin, moec_out y);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_ATTENTION_H_
