// The kernels as ExecuTorch operators `moec::*.out`. Each one checks ranks and dtypes, gives the output its size (the token
// count is dynamic), and calls the C API, which checks the rest. A fault is logged with its reason and fails the operator
// with Error::InvalidArgument; nothing aborts.
//
// Caches are mutated arguments declared `const Tensor&`: the boxing template wants exactly one non-const Tensor, the output.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "attention.h"
#include "moec_kernel.h"
#include "registration/cached_attention.h"
#include "registration/check.h"
#include "registration/ops_executorch.h"

namespace {

using executorch::aten::ArrayRef;

// ---------------------------------------------------------------------------------------------------------------- threads

void run_on_executorch(void*, int32_t n, moec_task_fn task, void* context) {
  const bool ran = executorch::extension::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, static_cast<int32_t>(i));
  });
  if (ran) return;
  for (int32_t i = 0; i < n; ++i) task(context, i);
}

int32_t executorch_threads(void*) { return static_cast<int32_t>(executorch::extension::get_thread_count()); }

// The default in a program that knows nothing of this library: its threads are ExecuTorch's.
struct UseExecutorchThreads {
  UseExecutorchThreads() { moec_use_executorch_threads(); }
} use_executorch_threads;

}  // namespace

void moec_use_executorch_threads(void) { moec_set_parallel(run_on_executorch, executorch_threads, nullptr); }

namespace {

// -------------------------------------------------------------------------------------------------------------- operators

Tensor& rms_norm_out(KernelRuntimeContext& context, const Tensor& x, const OptionalTensor& weight, double eps, Tensor& out) {
  Check check(context, "rms_norm");
  SizesType sizes[kMostDims];
  if (!check.tensor_from("x", x, ScalarType::Float, 1)) return out;
  if (weight.has_value() && !check.tensor("weight", *weight, ScalarType::Float, 1)) return out;
  const int64_t width = x.size(x.dim() - 1);
  if (!sizes_with_last(x, width, sizes) || !check.resize(out, sizes, x.dim())) return out;
  check.done(moec_rms_norm(rows_of(x), width, static_cast<float>(eps), in(x), in(weight), out_of(out)));
  return out;
}

Tensor& rope_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                 Tensor& out) {
  Check check(context, "rope");
  if (!check.tensor("x", x, ScalarType::Float, 4) || !check.tensor("cos", cos, ScalarType::Float, 2) ||
      !check.tensor("sin", sin, ScalarType::Float, 2) || !check.same("batch size and 1", x.size(0), 1))
    return out;
  SizesType sizes[kMostDims];
  if (!sizes_with_last(x, x.size(3), sizes) || !check.resize(out, sizes, 4)) return out;
  check.done(moec_rope(x.size(1), x.size(2), x.size(3), interleaved, in(x), in(cos), in(sin), out_of(out)));
  return out;
}

// Of a cache: its scales, if it holds codes.
bool check_scales(Check& check, const char* name, const OptionalTensor& scale) {
  return !scale.has_value() || check.tensor(name, *scale, ScalarType::Float, 3);
}

}  // namespace

Tensor& moec_operators::cached_attention(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& k_cache, const Tensor& v_cache, const Tensor& start_pos, double scale,
                                         int64_t window, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                                         const OptionalTensor& sinks, double softcap, Tensor& out) {
  Check check(context, "cached_attention");
  const ScalarType stored = k_scale.has_value() ? ScalarType::Char : ScalarType::Float;
  if (!check.tensor("q", q, ScalarType::Float, 4) || !check.tensor("k", k, ScalarType::Float, 4) ||
      !check.tensor("v", v, ScalarType::Float, 4) || !check.tensor("k_cache", k_cache, stored, 4) ||
      !check.tensor("v_cache", v_cache, stored, 4) || !check.tensor_from("start_pos", start_pos, ScalarType::Long, 0))
    return out;
  if (!check_scales(check, "k_scale", k_scale) || !check_scales(check, "v_scale", v_scale) ||
      !check.same("caches of keys and of values with scales", k_scale.has_value(), v_scale.has_value()))
    return out;
  if (sinks.has_value() && !check.tensor("sinks", *sinks, ScalarType::Float, 1)) return out;
  if (!check.same("elements of start_pos and 1", start_pos.numel(), 1) || !check.same("batch size and 1", q.size(0), 1) ||
      !check.same("batch sizes of q and k", q.size(0), k.size(0)) ||
      !check.same("batch sizes of q and v", q.size(0), v.size(0)) || !check.same("tokens of q and k", q.size(1), k.size(1)) ||
      !check.same("tokens of q and v", q.size(1), v.size(1)) || !check.same("heads of k and v", k.size(2), v.size(2)) ||
      !check.same("heads of k and k_cache", k.size(2), k_cache.size(2)) ||
      !check.same("heads of v and v_cache", v.size(2), v_cache.size(2)) ||
      !check.same("head sizes of q and k", q.size(3), k.size(3)) ||
      !check.same("head sizes of k and k_cache", k.size(3), k_cache.size(3)) ||
      !check.same("head sizes of v and v_cache", v.size(3), v_cache.size(3)) ||
      !check.same("lengths of the caches", k_cache.size(1), v_cache.size(1)))
    return out;
  const SizesType sizes[] = {1, static_cast<SizesType>(q.size(1)), static_cast<SizesType>(q.size(2) * v.size(3))};
  if (!check.resize(out, sizes, 3)) return out;
  moec_attention_args args = {};
  args.tokens = q.size(1);
  args.heads = q.size(2);
  args.kv_heads = k.size(2);
  args.head_dim = q.size(3);
  args.value_dim = v.size(3);
  args.capacity = k_cache.size(1);
  args.start_pos = start_pos.const_data_ptr<int64_t>()[0];
  args.window = window;
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.q = in(q);
  args.k = in(k);
  args.v = in(v);
  args.k_cache = out_of(k_cache);
  args.v_cache = out_of(v_cache);
  if (k_scale.has_value()) {
    args.k_scale = out_of(*k_scale);
    args.v_scale = out_of(*v_scale);
  }
  args.sinks = in(sinks);
  args.out = out_of(out);
  check.done(moec_cached_attention(&args));
  return out;
}

namespace {

// `format` is an int32 of the C API; the schema's int is 64 bits wide
bool as_format(Check& check, int64_t format, int32_t* out) {
  *out = static_cast<int32_t>(format);
  return check.same("format and its low 32 bits", format, *out);
}

Tensor& linear_packed_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                          int64_t n, int64_t k, int64_t format, Tensor& out) {
  Check check(context, "linear_packed");
  SizesType sizes[kMostDims];
  int32_t code = 0;
  if (!check.tensor_from("x", x, ScalarType::Float, 1) || !check.tensor_from("w", w, ScalarType::Byte, 1) ||
      !as_format(check, format, &code) || !check.same("last dimension of x and k", x.size(x.dim() - 1), k) ||
      !check.same("n and itself as a size", n, static_cast<SizesType>(n)))
    return out;
  if (bias.has_value() && !check.tensor("bias", *bias, ScalarType::Float, 1)) return out;
  if (!sizes_with_last(x, n, sizes) || !check.resize(out, sizes, x.dim())) return out;
  check.done(moec_linear(rows_of(x), n, k, code, in(x), in(w), in(bias), out_of(out)));
  return out;
}

Tensor& gated_linear_packed_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& w, int64_t f, int64_t k,
                                int64_t format, int64_t activation, Tensor& out) {
  Check check(context, "gated_linear_packed");
  SizesType sizes[kMostDims];
  int32_t code = 0;
  if (!check.tensor_from("x", x, ScalarType::Float, 1) || !check.tensor_from("w", w, ScalarType::Byte, 1) ||
      !as_format(check, format, &code) || !check.same("last dimension of x and k", x.size(x.dim() - 1), k) ||
      !check.same("f and itself as a size", f, static_cast<SizesType>(f)) ||
      !check.same("activation and its low 32 bits", activation, static_cast<int32_t>(activation)))
    return out;
  if (!sizes_with_last(x, f, sizes) || !check.resize(out, sizes, x.dim())) return out;
  check.done(moec_gated_linear(rows_of(x), f, k, code, static_cast<int32_t>(activation), in(x), in(w), out_of(out)));
  return out;
}

Tensor& embedding_packed_out(KernelRuntimeContext& context, const Tensor& ids, const Tensor& w, int64_t n, int64_t k,
                             int64_t format, Tensor& out) {
  Check check(context, "embedding_packed");
  SizesType sizes[kMostDims];
  int32_t code = 0;
  if (!check.tensor_from("ids", ids, ScalarType::Long, 1) || !check.tensor_from("w", w, ScalarType::Byte, 1) ||
      !as_format(check, format, &code) || !check.same("k and itself as a size", k, static_cast<SizesType>(k)))
    return out;
  if (static_cast<size_t>(ids.dim()) >= kMostDims) {
    check.same("dimensions of ids and 1", ids.dim(), 1);
    return out;
  }
  for (ssize_t i = 0; i < ids.dim(); ++i) sizes[i] = ids.size(i);
  sizes[ids.dim()] = static_cast<SizesType>(k);
  if (!check.resize(out, sizes, ids.dim() + 1)) return out;
  check.done(moec_embedding(ids.numel(), n, k, code, in(ids), in(w), out_of(out)));
  return out;
}

Tensor& fused_moe_packed_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& router_input,
                             const Tensor& router_weight, const OptionalTensor& router_bias,
                             const OptionalTensor& selection_bias, const Tensor& w13, const OptionalTensor& b13,
                             const Tensor& w2, const OptionalTensor& b2, const OptionalTensor& shared_w13,
                             const OptionalTensor& shared_w2, const OptionalTensor& shared_gate, ArrayRef<int64_t> config,
                             ArrayRef<double> params, Tensor& out) {
  Check check(context, "fused_moe_packed");
  SizesType sizes[kMostDims];
  if (!check.tensor_from("x", x, ScalarType::Float, 2) ||
      !check.tensor_from("router_input", router_input, ScalarType::Float, 2) ||
      !check.tensor("router_weight", router_weight, ScalarType::Float, 2) ||
      !check.tensor_from("w13", w13, ScalarType::Byte, 1) || !check.tensor_from("w2", w2, ScalarType::Byte, 1) ||
      !check.same("tokens of x and router_input", rows_of(x), rows_of(router_input)))
    return out;
  const struct {
    const char* name;
    const OptionalTensor& tensor;
    ScalarType type;
  } optionals[] = {{"router_bias", router_bias, ScalarType::Float}, {"selection_bias", selection_bias, ScalarType::Float},
                   {"b13", b13, ScalarType::Float},                 {"b2", b2, ScalarType::Float},
                   {"shared_w13", shared_w13, ScalarType::Byte},    {"shared_w2", shared_w2, ScalarType::Byte},
                   {"shared_gate", shared_gate, ScalarType::Float}};
  for (const auto& o : optionals)
    if (o.tensor.has_value() && !check.tensor_from(o.name, *o.tensor, o.type, 1)) return out;
  if (!sizes_with_last(x, x.size(x.dim() - 1), sizes) || !check.resize(out, sizes, x.dim())) return out;
  moec_moe_args args = {};
  args.tokens = rows_of(x);
  args.config = config.data();
  args.config_length = config.size();
  args.params = params.data();
  args.params_length = params.size();
  args.x = in(x);
  args.router_input = in(router_input);
  args.router_weight = in(router_weight);
  args.router_bias = in(router_bias);
  args.selection_bias = in(selection_bias);
  args.w13 = in(w13);
  args.b13 = in(b13);
  args.w2 = in(w2);
  args.b2 = in(b2);
  args.shared_w13 = in(shared_w13);
  args.shared_w2 = in(shared_w2);
  args.shared_gate = in(shared_gate);
  args.y = out_of(out);
  check.done(moec_moe(&args));
  return out;
}

EXECUTORCH_LIBRARY(moec, "rms_norm.out", rms_norm_out);
EXECUTORCH_LIBRARY(moec, "rope.out", rope_out);
EXECUTORCH_LIBRARY(moec, "cached_attention.softcap_out", moec_operators::cached_attention);
EXECUTORCH_LIBRARY(moec, "linear_packed.out", linear_packed_out);
EXECUTORCH_LIBRARY(moec, "gated_linear_packed.out", gated_linear_packed_out);
EXECUTORCH_LIBRARY(moec, "embedding_packed.out", embedding_packed_out);
EXECUTORCH_LIBRARY(moec, "fused_moe_packed.out", fused_moe_packed_out);

}  // namespace
