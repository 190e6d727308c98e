// Latent attention as ExecuTorch operators, as ops_executorch.cpp has the others. Caches are mutated arguments declared
// `const Tensor&`.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include "attention.h"
#include "registration/check.h"

namespace {

Tensor& head_linear_packed_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& w, int64_t heads, int64_t n,
                               int64_t k, int64_t format, Tensor& out) {
  Check check(context, "head_linear_packed");
  const int32_t code = static_cast<int32_t>(format);
  if (!check.tensor("x", x, ScalarType::Float, 4) || !check.tensor("w", w, ScalarType::Byte, 1) ||
      !check.same("format and its low 32 bits", format, code) || !check.same("heads of x and of w", x.size(2), heads) ||
      !check.same("last dimension of x and k", x.size(3), k) || !check.same("batch size and 1", x.size(0), 1) ||
      !check.same("n and itself as a size", n, static_cast<SizesType>(n)))
    return out;
  const SizesType sizes[] = {1, static_cast<SizesType>(x.size(1)), static_cast<SizesType>(heads), static_cast<SizesType>(n)};
  if (!check.resize(out, sizes, 4)) return out;
  check.done(moec_head_linear(x.size(1), heads, n, k, code, in(x), in(w), out_of(out)));
  return out;
}

Tensor& latent_attention_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& q_rope, const Tensor& latents,
                             const Tensor& rope, const Tensor& latent_cache, const Tensor& rope_cache, const Tensor& start_pos,
                             double scale, int64_t window, const OptionalTensor& latent_scale, const OptionalTensor& rope_scale,
                             Tensor& out) {
  Check check(context, "latent_attention");
  const ScalarType stored = latent_scale.has_value() ? ScalarType::Char : ScalarType::Float;
  if (!check.tensor("q", q, ScalarType::Float, 4) || !check.tensor("q_rope", q_rope, ScalarType::Float, 4) ||
      !check.tensor("latents", latents, ScalarType::Float, 3) || !check.tensor("rope", rope, ScalarType::Float, 3) ||
      !check.tensor("latent_cache", latent_cache, stored, 4) || !check.tensor("rope_cache", rope_cache, stored, 4) ||
      !check.tensor_from("start_pos", start_pos, ScalarType::Long, 0) ||
      !check.same("caches of latents and of rotated parts with scales", latent_scale.has_value(), rope_scale.has_value()))
    return out;
  if (latent_scale.has_value() && (!check.tensor("latent_scale", *latent_scale, ScalarType::Float, 3) ||
                                   !check.tensor("rope_scale", *rope_scale, ScalarType::Float, 3)))
    return out;
  if (!check.same("elements of start_pos and 1", start_pos.numel(), 1) || !check.same("batch size and 1", q.size(0), 1) ||
      !check.same("tokens of q and q_rope", q.size(1), q_rope.size(1)) ||
      !check.same("tokens of q and latents", q.size(1), latents.size(1)) ||
      !check.same("tokens of q and rope", q.size(1), rope.size(1)) ||
      !check.same("heads of q and q_rope", q.size(2), q_rope.size(2)) ||
      !check.same("widths of q and latents", q.size(3), latents.size(2)) ||
      !check.same("widths of q_rope and rope", q_rope.size(3), rope.size(2)) ||
      !check.same("widths of latents and their cache", latents.size(2), latent_cache.size(3)) ||
      !check.same("widths of rope and its cache", rope.size(2), rope_cache.size(3)) ||
      !check.same("heads of latent_cache and 1", latent_cache.size(2), 1) ||
      !check.same("heads of rope_cache and 1", rope_cache.size(2), 1) ||
      !check.same("lengths of the caches", latent_cache.size(1), rope_cache.size(1)))
    return out;
  const SizesType sizes[] = {1, static_cast<SizesType>(q.size(1)), static_cast<SizesType>(q.size(2)),
                             static_cast<SizesType>(q.size(3))};
  if (!check.resize(out, sizes, 4)) return out;
  moec_latent_args args = {};
  args.tokens = q.size(1);
  args.heads = q.size(2);
  args.rank = q.size(3);
  args.rope_dim = q_rope.size(3);
  args.capacity = latent_cache.size(1);
  args.start_pos = start_pos.const_data_ptr<int64_t>()[0];
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.q = in(q);
  args.q_rope = in(q_rope);
  args.latents = in(latents);
  args.rope = in(rope);
  args.latent_cache = out_of(latent_cache);
  args.rope_cache = out_of(rope_cache);
  if (latent_scale.has_value()) {
    args.latent_scale = out_of(*latent_scale);
    args.rope_scale = out_of(*rope_scale);
  }
  args.out = out_of(out);
  check.done(moec_latent_attention(&args));
  return out;
}

EXECUTORCH_LIBRARY(moec, "head_linear_packed.out", head_linear_packed_out);
EXECUTORCH_LIBRARY(moec, "latent_attention.out", latent_attention_out);

}  // namespace
