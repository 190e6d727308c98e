// moec_latent_attention: the checks, and the call that it is.
#include <inttypes.h>

#include "attention_run.h"
#include "core/status.h"
#include "isa/isa.h"

namespace moec {
namespace {

constexpr char kOp[] = "latent_attention";
constexpr int64_t kWidths = 16;  // of both parts of a key, a multiple: every row fills registers of any instruction set

int32_t check(const moec_latent_args& a) {
  if (a.tokens < 0 || a.heads < 1 || a.heads > kMostWidth || a.rank < 1 || a.rank > kMostWidth || a.rank % kWidths ||
      a.rope_dim < 1 || a.rope_dim > kMostWidth || a.rope_dim % kWidths)
    return fail(MOEC_INVALID_ARGUMENT,
                "%s: impossible sizes: %" PRId64 " tokens, %" PRId64 " heads, latents of %" PRId64 " beside %" PRId64
                " (both a multiple of %" PRId64 ")",
                kOp, a.tokens, a.heads, a.rank, a.rope_dim, kWidths);
  MOEC_RETURN_IF_ERROR(check_positions(kOp, a.tokens, a.start_pos, a.window, a.capacity));
  const bool quantized = a.latent_scale.data != nullptr || a.rope_scale.data != nullptr;
  const int64_t size = quantized ? sizeof(int8_t) : sizeof(float);
  MOEC_RETURN_IF_ERROR(check_in("latent_attention: q", a.q, a.tokens, a.heads, a.rank));
  MOEC_RETURN_IF_ERROR(check_in("latent_attention: q_rope", a.q_rope, a.tokens, a.heads, a.rope_dim));
  MOEC_RETURN_IF_ERROR(check_in("latent_attention: latents", a.latents, a.tokens, 1, a.rank));
  MOEC_RETURN_IF_ERROR(check_in("latent_attention: rope", a.rope, a.tokens, 1, a.rope_dim));
  MOEC_RETURN_IF_ERROR(check_out("latent_attention: latent_cache", a.latent_cache, a.capacity, 1, a.rank, size));
  MOEC_RETURN_IF_ERROR(check_out("latent_attention: rope_cache", a.rope_cache, a.capacity, 1, a.rope_dim, size));
  if (quantized) {
    MOEC_RETURN_IF_ERROR(check_out("latent_attention: latent_scale", a.latent_scale, a.capacity, 1, 1));
    MOEC_RETURN_IF_ERROR(check_out("latent_attention: rope_scale", a.rope_scale, a.capacity, 1, 1));
  }
  return check_out("latent_attention: out", a.out, a.tokens, a.heads, a.rank);
}

}  // namespace
}  // namespace moec

using namespace moec;

int32_t moec_latent_attention(const moec_latent_args* args) {
  if (!args) return fail(MOEC_INVALID_ARGUMENT, "%s: no arguments", kOp);
  const moec_latent_args& a = *args;
  MOEC_RETURN_IF_ERROR(select_isa());
  const int32_t status = check(a);
  if (status != MOEC_OK || a.tokens == 0) return status;
  const AttentionKernels& chosen = isa().attention;
  write_caches(chosen, {{a.latents, a.latent_cache, a.latent_scale, 1, a.rank}, {a.rope, a.rope_cache, a.rope_scale, 1, a.rope_dim}},
               a.tokens, a.start_pos);
  AttentionCall call = {};
  call.tokens = a.tokens;
  call.heads = a.heads;
  call.kv_heads = 1;
  call.head_dim = a.rank;
  call.value_dim = a.rank;
  call.rest_dim = a.rope_dim;
  call.capacity = a.capacity;
  call.start = a.start_pos;
  call.window = a.window >= a.capacity ? 0 : a.window;  // as in moec_cached_attention
  call.scale = a.scale;
  call.q = static_cast<const float*>(a.q.data);
  call.q_rest = static_cast<const float*>(a.q_rope.data);
  call.k_cache = call.v_cache = a.latent_cache.data;
  call.k_scale = call.v_scale = static_cast<const float*>(a.latent_scale.data);
  call.k_rest = a.rope_cache.data;
  call.k_rest_scale = static_cast<const float*>(a.rope_scale.data);
  call.out = static_cast<float*>(a.out.data);
  return attend(chosen, call, kOp);
}
