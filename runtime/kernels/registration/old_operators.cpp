// Names and arguments that operators had in artifacts of earlier versions: registered so that those still open, and used by
// nothing that is written now. A .pte passes arguments by position, so an operator whose arguments change gets a new name
// and its old one moves here; targets/xnnpack/operator_table.py lists both, tests/runtime/test_old_artifacts.py opens them.
//
//   moec::cached_attention.out      over a float32 cache; now cached_attention.softcap_out without scales
//   moec::cached_attention_q8.out   over an INT8 cache; now cached_attention.softcap_out with scales
//   moec::cached_attention.scales_out   over either; now cached_attention.softcap_out without sinks
//   moec::cached_attention.sinks_out    now cached_attention.softcap_out with a cap of 0
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include "registration/cached_attention.h"

namespace {

using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

Tensor& cached_attention_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& k_cache, const Tensor& v_cache, const Tensor& start_pos, double scale,
                             int64_t window, Tensor& out) {
  return moec_operators::cached_attention(context, q, k, v, k_cache, v_cache, start_pos, scale, window, std::nullopt,
                                          std::nullopt, std::nullopt, 0.0, out);
}

Tensor& cached_attention_q8_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_scale, const Tensor& v_scale,
                                const Tensor& start_pos, double scale, int64_t window, Tensor& out) {
  return moec_operators::cached_attention(context, q, k, v, k_cache, v_cache, start_pos, scale, window, k_scale, v_scale,
                                          std::nullopt, 0.0, out);
}

Tensor& cached_attention_scales_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& k_cache, const Tensor& v_cache, const Tensor& start_pos, double scale,
                                    int64_t window, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                    Tensor& out) {
  return moec_operators::cached_attention(context, q, k, v, k_cache, v_cache, start_pos, scale, window, k_scale, v_scale,
                                          std::nullopt, 0.0, out);
}

Tensor& cached_attention_sinks_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& k_cache, const Tensor& v_cache, const Tensor& start_pos, double scale,
                                   int64_t window, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                   const std::optional<Tensor>& sinks, Tensor& out) {
  return moec_operators::cached_attention(context, q, k, v, k_cache, v_cache, start_pos, scale, window, k_scale, v_scale, sinks,
                                          0.0, out);
}

EXECUTORCH_LIBRARY(moec, "cached_attention.out", cached_attention_out);
EXECUTORCH_LIBRARY(moec, "cached_attention_q8.out", cached_attention_q8_out);
EXECUTORCH_LIBRARY(moec, "cached_attention.scales_out", cached_attention_scales_out);
EXECUTORCH_LIBRARY(moec, "cached_attention.sinks_out", cached_attention_sinks_out);

}  // namespace
