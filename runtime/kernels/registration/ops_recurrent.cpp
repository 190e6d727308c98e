// The layers with a state (recurrent.h) as ExecuTorch operators, as ops_executorch.cpp has the others. States are mutated
// arguments declared `const Tensor&`.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>

#include "recurrent.h"
#include "registration/check.h"

namespace {

// The position of a call; -1, which the kernels refuse, after a fault.
bool position(Check& check, const Tensor& start_pos, int64_t* out) {
  if (!check.tensor_from("start_pos", start_pos, ScalarType::Long, 0) ||
      !check.same("elements of start_pos and 1", start_pos.numel(), 1))
    return false;
  *out = start_pos.const_data_ptr<int64_t>()[0];
  return true;
}

Tensor& short_conv_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const Tensor& state, const Tensor& start_pos, bool silu, Tensor& out) {
  Check check(context, "short_conv");
  moec_short_conv_args args = {};
  if (!check.tensor("x", x, ScalarType::Float, 3) || !check.tensor("weight", weight, ScalarType::Float, 2) ||
      !check.tensor("state", state, ScalarType::Float, 3) || !position(check, start_pos, &args.start_pos) ||
      !check.same("batch size and 1", x.size(0), 1))
    return out;
  if (bias.has_value() && !check.tensor("bias", *bias, ScalarType::Float, 1)) return out;
  const SizesType sizes[] = {1, static_cast<SizesType>(x.size(1)), static_cast<SizesType>(x.size(2))};
  if (!check.resize(out, sizes, 3)) return out;
  args.tokens = x.size(1);
  args.channels = x.size(2);
  args.taps = weight.size(0);
  args.silu = silu;
  args.x = in(x);
  args.weight = in(weight);
  args.bias = in(bias);
  args.state = out_of(state);
  args.out = out_of(out);
  check.done(moec_short_conv(&args));
  return out;
}

Tensor& gated_delta_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& decay, const Tensor& beta, const Tensor& state, const Tensor& start_pos, double scale,
                        double eps, Tensor& out) {
  Check check(context, "gated_delta");
  moec_gated_delta_args args = {};
  if (!check.tensor("q", q, ScalarType::Float, 4) || !check.tensor("k", k, ScalarType::Float, 4) ||
      !check.tensor("v", v, ScalarType::Float, 4) || !check.tensor("decay", decay, ScalarType::Float, 3) ||
      !check.tensor("beta", beta, ScalarType::Float, 3) || !check.tensor("state", state, ScalarType::Float, 4) ||
      !position(check, start_pos, &args.start_pos) || !check.same("batch size and 1", v.size(0), 1))
    return out;
  const SizesType sizes[] = {1, static_cast<SizesType>(v.size(1)), static_cast<SizesType>(v.size(2) * v.size(3))};
  if (!check.resize(out, sizes, 3)) return out;
  args.tokens = v.size(1);
  args.key_heads = k.size(2);
  args.heads = v.size(2);
  args.key_dim = k.size(3);
  args.value_dim = v.size(3);
  args.scale = static_cast<float>(scale);
  args.eps = static_cast<float>(eps);
  args.q = in(q);
  args.k = in(k);
  args.v = in(v);
  args.decay = in(decay);
  args.beta = in(beta);
  args.state = out_of(state);
  args.out = out_of(out);
  check.done(moec_gated_delta(&args));
  return out;
}

Tensor& selective_scan_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& dt, const Tensor& a,
                           const Tensor& b, const Tensor& c, const OptionalTensor& d, const Tensor& state,
                           const Tensor& start_pos, Tensor& out) {
  Check check(context, "selective_scan");
  moec_selective_scan_args args = {};
  if (!check.tensor("x", x, ScalarType::Float, 4) || !check.tensor("dt", dt, ScalarType::Float, 3) ||
      !check.tensor("a", a, ScalarType::Float, 2) || !check.tensor("b", b, ScalarType::Float, 4) ||
      !check.tensor("c", c, ScalarType::Float, 4) || !check.tensor("state", state, ScalarType::Float, 4) ||
      !position(check, start_pos, &args.start_pos) || !check.same("batch size and 1", x.size(0), 1))
    return out;
  if (d.has_value() && !check.tensor("d", *d, ScalarType::Float, 1)) return out;
  const SizesType sizes[] = {1, static_cast<SizesType>(x.size(1)), static_cast<SizesType>(x.size(2) * x.size(3))};
  if (!check.resize(out, sizes, 3)) return out;
  args.tokens = x.size(1);
  args.heads = x.size(2);
  args.head_dim = x.size(3);
  args.groups = b.size(2);
  args.state_dim = b.size(3);
  args.a_columns = a.size(1);
  args.x = in(x);
  args.dt = in(dt);
  args.a = in(a);
  args.b = in(b);
  args.c = in(c);
  args.d = in(d);
  args.state = out_of(state);
  args.out = out_of(out);
  check.done(moec_selective_scan(&args));
  return out;
}

EXECUTORCH_LIBRARY(moec, "short_conv.out", short_conv_out);
EXECUTORCH_LIBRARY(moec, "gated_delta.out", gated_delta_out);
EXECUTORCH_LIBRARY(moec, "selective_scan.out", selective_scan_out);

}  // namespace
