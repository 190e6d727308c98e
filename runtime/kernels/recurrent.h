// C API of the layers that carry a state of fixed size: short convolutions, the gated delta rule, selective scans. The rules
// of moec_kernel.h hold, the last ones too: results do not depend on threads, on the instruction set, or on how a sequence
// is cut into calls. Work grows with the tokens of a call and not with the position.
//
// Where start_pos is 0 a state counts as zero, whatever it holds; the call updates it. A call that fails has written nothing.
#ifndef MOEC_RECURRENT_H_
#define MOEC_RECURRENT_H_

#include "moec_kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

// out[t, c] = bias[c] + sum over j < K of weight[j, c] * z[t + j, c], z the rows of state and then x; with `silu` times its
// own sigmoid. The state becomes the last K-1 rows of z.
typedef struct moec_short_conv_args {
  int64_t tokens;     // T, may be 0
  int64_t channels;   // C
  int64_t taps;       // K, at least 2
  int64_t start_pos;  // 0 begins a sequence
  int32_t silu;       // 0 or 1
  moec_in x;          // f32 [T, C]
  moec_in weight;     // f32 [K, C]
  moec_in bias;       // f32 [C], or absent
  moec_out state;     // f32 [K-1, C]
  moec_out out;       // f32 [T, C]
} moec_short_conv_args;

MOEC_API int32_t moec_short_conv(const moec_short_conv_args* args);

// For value head h and key head g = h / (H/G), token after token:
//   S = exp(decay) S;  S += k (beta (v - k^T S))^T;  out = scale q^T S
// With eps >= 0 every q and k is first divided by sqrt(sum of its squares + eps).
typedef struct moec_gated_delta_args {
  int64_t tokens;     // T, may be 0
  int64_t key_heads;  // G
  int64_t heads;      // H, a multiple of G
  int64_t key_dim;    // d
  int64_t value_dim;  // e
  int64_t start_pos;
  float scale;
  float eps;       // negative: q and k are taken as they are
  moec_in q;       // f32 [T, G, d]
  moec_in k;       // f32 [T, G, d]
  moec_in v;       // f32 [T, H, e]
  moec_in decay;   // f32 [T, H], logarithms
  moec_in beta;    // f32 [T, H]
  moec_out state;  // f32 [H, d, e]
  moec_out out;    // f32 [T, H, e]
} moec_gated_delta_args;

MOEC_API int32_t moec_gated_delta(const moec_gated_delta_args* args);

// For head h and group g = h / (H/G), token after token:
//   S = exp(dt a) S + (dt x) b^T;  out = S c + d x
typedef struct moec_selective_scan_args {
  int64_t tokens;      // T, may be 0
  int64_t heads;       // H, a multiple of G
  int64_t groups;      // G
  int64_t head_dim;    // p
  int64_t state_dim;   // n
  int64_t a_columns;   // 1 or n
  int64_t start_pos;
  moec_in x;       // f32 [T, H, p]
  moec_in dt;      // f32 [T, H]
  moec_in a;       // f32 [H, a_columns]
  moec_in b;       // f32 [T, G, n]
  moec_in c;       // f32 [T, G, n]
  moec_in d;       // f32 [H], or absent
  moec_out state;  // f32 [H, p, n]
  moec_out out;    // f32 [T, H, p]
} moec_selective_scan_args;

MOEC_API int32_t moec_selective_scan(const moec_selective_scan_args* args);

#ifdef __cplusplus
}
#endif

#endif  // MOEC_RECURRENT_H_
