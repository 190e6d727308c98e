// The operator moec::cached_attention, for ops_executorch.cpp, which defines it, and old_operators.cpp, which gives it the
// names that it had.
#ifndef MOEC_CACHED_ATTENTION_H_
#define MOEC_CACHED_ATTENTION_H_

#include <executorch/runtime/kernel/kernel_includes.h>

#include <optional>

namespace moec_operators {

// Shapes as in compiler/ops/cached_attention.py. Caches of codes come with their scales, both or none. Returns `out`; a
// fault is logged and fails `context`.
executorch::aten::Tensor& cached_attention(
    executorch::runtime::KernelRuntimeContext& context, const executorch::aten::Tensor& q, const executorch::aten::Tensor& k,
    const executorch::aten::Tensor& v, const executorch::aten::Tensor& k_cache, const executorch::aten::Tensor& v_cache,
    const executorch::aten::Tensor& start_pos, double scale, int64_t window,
    const std::optional<executorch::aten::Tensor>& k_scale, const std::optional<executorch::aten::Tensor>& v_scale,
    const std::optional<executorch::aten::Tensor>& sinks, double softcap, executorch::aten::Tensor& out);

}  // namespace moec_operators

#endif  // MOEC_CACHED_ATTENTION_H_
