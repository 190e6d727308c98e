// moec_moe, the entry point: decodes `config` and `params`, checks every buffer and hands over to run_moe chunk by chunk.
#include <atomic>
#include <cfloat>
#include <cinttypes>
#include <cmath>
#include <cstdlib>
#include <mutex>

#include "moe_config.h"
#include "core/moe_run.h"
#include "core/scratch.h"
#include "core/status.h"

namespace moec {
namespace {

constexpr int64_t kMostExperts = 1 << 20;
constexpr int64_t kMostWidth = 1 << 24;

std::recursive_mutex trace_mutex;  // after moec_set_trace no callback runs; one may call it itself
std::atomic<moec_trace_fn> trace_callback{nullptr};
void* trace_user = nullptr;

// Indices and weights of a call whose caller does not want them; thread-local, grow-only, as all scratch.
struct Selection {
  int32_t* indices = nullptr;
  float* weights = nullptr;
  int64_t size = 0;
  ~Selection() { release(); }
  void release() {
    std::free(indices);
    std::free(weights);
    indices = nullptr;
    weights = nullptr;
    size = 0;
  }
  bool reserve(int64_t n) {
    if (n <= size) return true;
    release();
    indices = static_cast<int32_t*>(std::malloc(size_t(n) * 4));
    weights = static_cast<float*>(std::malloc(size_t(n) * 4));
    if (!indices || !weights) {
      release();
      return false;
    }
    size = n;
    return true;
  }
};
thread_local Selection selection;
thread_local Selection foreseen;  // of select, which may run within an operator

struct Range {
  int field;
  const char* name;
  int64_t low, high;
};

int32_t decode(const moec_moe_args& a, Moe* moe) {
  if (!a.config || a.config_length != MOEC_MOE_CONFIG_LENGTH) {
    return fail(MOEC_INVALID_ARGUMENT, "config: %" PRIu64 " entries given, %d needed", a.config_length, MOEC_MOE_CONFIG_LENGTH);
  }
  const int64_t* const c = a.config;
  const bool sparsemixer = c[MOEC_CONFIG_SCORE] == Routing::kSparsemixer;
  const uint64_t needed = sparsemixer ? MOEC_MOE_PARAMS_LENGTH : MOEC_PARAMS_THRESHOLD;
  if (!a.params || a.params_length < needed || a.params_length > MOEC_MOE_PARAMS_LENGTH) {
    return fail(MOEC_INVALID_ARGUMENT, "params: %" PRIu64 " entries given, %" PRIu64 " needed", a.params_length, needed);
  }
  const Range ranges[] = {
      {MOEC_CONFIG_VERSION, "version", MOEC_MOE_VERSION_NUMBER, MOEC_MOE_VERSION_NUMBER},
      {MOEC_CONFIG_EXPERTS, "experts", 1, kMostExperts},
      {MOEC_CONFIG_D_MODEL, "d_model", 1, kMostWidth},
      {MOEC_CONFIG_EXPERT_WIDTH, "expert_width", 1, kMostWidth},
      {MOEC_CONFIG_TOP_K, "top_k", 1, c[MOEC_CONFIG_EXPERTS]},
      {MOEC_CONFIG_SHARED_WIDTH, "shared_width", 0, kMostWidth},
      {MOEC_CONFIG_W13_FORMAT, "w13_format", 0, INT32_MAX},
      {MOEC_CONFIG_W2_FORMAT, "w2_format", 0, INT32_MAX},
      {MOEC_CONFIG_SHARED_W13_FORMAT, "shared_w13_format", 0, INT32_MAX},
      {MOEC_CONFIG_SHARED_W2_FORMAT, "shared_w2_format", 0, INT32_MAX},
      {MOEC_CONFIG_SCORE, "score", 0, 3},
      {MOEC_CONFIG_AFTER_TOPK, "after_topk", 0, sparsemixer ? 0 : 1},
      {MOEC_CONFIG_BIAS_ON, "bias_on", 0, 1},
      {MOEC_CONFIG_GROUPS, "groups", 0, sparsemixer ? 0 : c[MOEC_CONFIG_EXPERTS]},
      {MOEC_CONFIG_KEEP, "keep", c[MOEC_CONFIG_GROUPS] > 0 ? 1 : 0, c[MOEC_CONFIG_GROUPS]},
      {MOEC_CONFIG_GROUP_SCORE, "group_score", 0, 1},
      {MOEC_CONFIG_FILL, "fill", 0, 1},
      {MOEC_CONFIG_NORMALIZE, "normalize", 0, 1},
      {MOEC_CONFIG_APPLY, "apply", 0, 1},
      {MOEC_CONFIG_ACTIVATION, "activation", 0, 4},
      {MOEC_CONFIG_GATED, "gated", 0, 1},
      {MOEC_CONFIG_INTERLEAVED, "interleaved", 0, c[MOEC_CONFIG_GATED]},
  };
  for (const Range& r : ranges) {
    if (c[r.field] < r.low || c[r.field] > r.high) {
      return fail(MOEC_INVALID_ARGUMENT, "config: %s is %" PRId64 ", not in %" PRId64 "..%" PRId64, r.name, c[r.field], r.low,
                  r.high);
    }
  }
  for (uint64_t i = 0; i < a.params_length; ++i) {
    if (std::isnan(a.params[i])) return fail(MOEC_INVALID_ARGUMENT, "params: entry %" PRIu64 " is not a number", i);
  }
  moe->experts = c[MOEC_CONFIG_EXPERTS];
  moe->d = c[MOEC_CONFIG_D_MODEL];
  moe->width = c[MOEC_CONFIG_EXPERT_WIDTH];
  moe->top_k = c[MOEC_CONFIG_TOP_K];
  moe->shared_width = c[MOEC_CONFIG_SHARED_WIDTH];
  Routing& r = moe->routing;
  r.score = int32_t(c[MOEC_CONFIG_SCORE]);
  r.after_topk = c[MOEC_CONFIG_AFTER_TOPK];
  r.bias_on_logits = c[MOEC_CONFIG_BIAS_ON];
  r.groups = c[MOEC_CONFIG_GROUPS];
  r.keep = c[MOEC_CONFIG_KEEP];
  r.top2sum = c[MOEC_CONFIG_GROUP_SCORE];
  r.fill_ninf = c[MOEC_CONFIG_FILL];
  r.normalize = c[MOEC_CONFIG_NORMALIZE];
  r.apply_input = c[MOEC_CONFIG_APPLY];
  r.eps = float(a.params[MOEC_PARAMS_EPS]);
  r.clamp_min = float(a.params[MOEC_PARAMS_CLAMP_MIN]);
  r.scale = float(a.params[MOEC_PARAMS_SCALE]);
  if (sparsemixer) r.threshold = float(a.params[MOEC_PARAMS_THRESHOLD]);
  if (sparsemixer && !(r.threshold >= 0.0f && r.threshold <= FLT_MAX)) {
    return fail(MOEC_INVALID_ARGUMENT, "params: threshold is %g, not a finite number from 0 on", double(r.threshold));
  }
  if (r.groups > 0) {
    const int64_t size = moe->experts / r.groups;
    if (moe->experts % r.groups) {
      return fail(MOEC_INVALID_ARGUMENT, "config: %" PRId64 " experts do not form %" PRId64 " groups", moe->experts, r.groups);
    }
    if (moe->top_k > size * r.keep) return fail(MOEC_INVALID_ARGUMENT, "config: the kept groups hold fewer than top_k experts");
    if (r.top2sum && size < 2) return fail(MOEC_INVALID_ARGUMENT, "config: top2sum needs two experts a group");
  }
  moe->activation = Activation(c[MOEC_CONFIG_ACTIVATION]);
  moe->gated = c[MOEC_CONFIG_GATED];
  moe->interleaved = c[MOEC_CONFIG_INTERLEAVED];
  moe->alpha = float(a.params[MOEC_PARAMS_ALPHA]);
  moe->gate_min = float(a.params[MOEC_PARAMS_GATE_MIN]);
  moe->gate_max = float(a.params[MOEC_PARAMS_GATE_MAX]);
  moe->up_min = float(a.params[MOEC_PARAMS_UP_MIN]);
  moe->up_max = float(a.params[MOEC_PARAMS_UP_MAX]);
  moe->up_offset = float(a.params[MOEC_PARAMS_UP_OFFSET]);
  return MOEC_OK;
}

int32_t optional_floats(const char* name, moec_in buffer, int64_t rows, int64_t columns, const float** out) {
  if (!buffer.data && buffer.bytes == 0) return MOEC_OK;
  MOEC_RETURN_IF_ERROR(check_buffer(name, buffer.data, buffer.bytes, rows, columns, 4));
  *out = static_cast<const float*>(buffer.data);
  return MOEC_OK;
}

// f32 router_weight [E, D], router_bias [E] or absent, selection_bias [E] or absent.
int32_t open_router(moec_in weight, moec_in bias, moec_in selection_bias, Moe* moe) {
  MOEC_RETURN_IF_ERROR(check_buffer("router_weight", weight.data, weight.bytes, moe->experts, moe->d, 4));
  moe->router_weight = static_cast<const float*>(weight.data);
  MOEC_RETURN_IF_ERROR(optional_floats("router_bias", bias, 1, moe->experts, &moe->router_bias));
  MOEC_RETURN_IF_ERROR(optional_floats("selection_bias", selection_bias, 1, moe->experts, &moe->selection_bias));
  if (moe->selection_bias && moe->routing.score == Routing::kSparsemixer) {
    return fail(MOEC_INVALID_ARGUMENT, "selection_bias: given, which sparsemixer has no use for");
  }
  return MOEC_OK;
}

int32_t open_weights(const moec_moe_args& a, Moe* moe) {
  const int64_t* const c = a.config;
  const int64_t per = moe->gated ? 2 : 1, e = moe->experts, d = moe->d, f = moe->width, s = moe->shared_width;
  const auto format = [&](int field) { return int32_t(c[field]); };
  MOEC_RETURN_IF_ERROR(
      open_matrices("w13", e, per * f, d, format(MOEC_CONFIG_W13_FORMAT), a.w13, &moe->w13, &moe->w13_stride));
  MOEC_RETURN_IF_ERROR(open_matrices("w2", e, d, f, format(MOEC_CONFIG_W2_FORMAT), a.w2, &moe->w2, &moe->w2_stride));
  MOEC_RETURN_IF_ERROR(open_router(a.router_weight, a.router_bias, a.selection_bias, moe));
  MOEC_RETURN_IF_ERROR(optional_floats("b13", a.b13, e, per * f, &moe->b13));
  MOEC_RETURN_IF_ERROR(optional_floats("b2", a.b2, e, d, &moe->b2));
  MOEC_RETURN_IF_ERROR(optional_floats("shared_gate", a.shared_gate, 1, d, &moe->shared_gate));
  if (s == 0) {
    if (a.shared_w13.bytes || a.shared_w2.bytes || moe->shared_gate) {
      return fail(MOEC_INVALID_ARGUMENT, "shared_w13, shared_w2, shared_gate: given although shared_width is 0");
    }
    return MOEC_OK;
  }
  MOEC_RETURN_IF_ERROR(
      open_matrices("shared_w13", 1, per * s, d, format(MOEC_CONFIG_SHARED_W13_FORMAT), a.shared_w13, &moe->shared_w13, nullptr));
  return open_matrices("shared_w2", 1, d, s, format(MOEC_CONFIG_SHARED_W2_FORMAT), a.shared_w2, &moe->shared_w2, nullptr);
}

bool overlap(const moec_out& a, const moec_in& b) {
  const auto p = reinterpret_cast<uintptr_t>(a.data), q = reinterpret_cast<uintptr_t>(b.data);
  return p < q + b.bytes && q < p + a.bytes;
}

int32_t run(const moec_moe_args& a) {
  MOEC_RETURN_IF_ERROR(select_isa());
  Moe moe;
  MOEC_RETURN_IF_ERROR(decode(a, &moe));
  MOEC_RETURN_IF_ERROR(open_weights(a, &moe));
  const int64_t t = a.tokens, d = moe.d, k = moe.top_k;
  MOEC_RETURN_IF_ERROR(check_buffer("x", a.x.data, a.x.bytes, t, d, 4));
  MOEC_RETURN_IF_ERROR(check_buffer("router_input", a.router_input.data, a.router_input.bytes, t, d, 4));
  MOEC_RETURN_IF_ERROR(check_buffer("y", a.y.data, a.y.bytes, t, d, 4));
  const bool wants_indices = a.indices.data || a.indices.bytes, wants_weights = a.weights.data || a.weights.bytes;
  if (wants_indices) MOEC_RETURN_IF_ERROR(check_buffer("indices", a.indices.data, a.indices.bytes, t, k, 4));
  if (wants_weights) MOEC_RETURN_IF_ERROR(check_buffer("weights", a.weights.data, a.weights.bytes, t, k, 4));
  if (overlap(a.y, a.x) || overlap(a.y, a.router_input)) {
    return fail(MOEC_INVALID_ARGUMENT, "y: overlaps x or router_input");
  }
  if (t > INT32_MAX / k) return fail(MOEC_INVALID_ARGUMENT, "tokens: %" PRId64 " of top_k %" PRId64 " are too many", t, k);
  if ((!wants_indices || !wants_weights) && !selection.reserve(t * k)) {
    return fail(MOEC_OUT_OF_MEMORY, "moe: no memory for the routing of %" PRId64 " tokens", t);
  }
  const auto* x = static_cast<const float*>(a.x.data);
  const auto* router_input = static_cast<const float*>(a.router_input.data);
  auto* const y = static_cast<float*>(a.y.data);
  auto* const indices = wants_indices ? static_cast<int32_t*>(a.indices.data) : selection.indices;
  auto* const weights = wants_weights ? static_cast<float*>(a.weights.data) : selection.weights;
  const int64_t chunk = moe_chunk_tokens(moe);
  for (int64_t i = 0; i < t; i += chunk) {
    const int64_t n = t - i < chunk ? t - i : chunk;
    MOEC_RETURN_IF_ERROR(run_moe(moe, n, t == 1, x + i * d, router_input + i * d, y + i * d, indices + i * k, weights + i * k));
  }
  if (trace_callback.load(std::memory_order_acquire)) {
    std::lock_guard<std::recursive_mutex> lock(trace_mutex);
    if (const moec_trace_fn callback = trace_callback.load(std::memory_order_relaxed)) {
      callback(trace_user, t, d, k, x, indices, weights, y);
    }
  }
  return MOEC_OK;
}

int32_t select(int64_t tokens, const int64_t* config, uint64_t config_length, moec_in router_input, moec_in weight, moec_in bias,
               moec_in selection_bias, moec_out indices) {
  MOEC_RETURN_IF_ERROR(select_isa());
  const double params[MOEC_MOE_PARAMS_LENGTH] = {};
  moec_moe_args a = {};
  a.config = config;
  a.config_length = config_length;
  a.params = params;
  a.params_length = MOEC_MOE_PARAMS_LENGTH;
  Moe moe;
  MOEC_RETURN_IF_ERROR(decode(a, &moe));
  MOEC_RETURN_IF_ERROR(open_router(weight, bias, selection_bias, &moe));
  const int64_t e = moe.experts, d = moe.d, k = moe.top_k;
  MOEC_RETURN_IF_ERROR(check_buffer("router_input", router_input.data, router_input.bytes, tokens, d, 4));
  MOEC_RETURN_IF_ERROR(check_buffer("indices", indices.data, indices.bytes, tokens, k, 4));
  const int64_t space = routing_scratch(e, moe.routing.groups, k);
  if (!foreseen.reserve(e + space + k)) return fail(MOEC_OUT_OF_MEMORY, "moe: no memory for the routing of a token");
  float* const logits = foreseen.weights;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* const x = static_cast<const float*>(router_input.data) + t * d;
    kernels().gemm_f32({moe.router_weight, x, d, 1, e, d, moe.router_bias, logits, e});
    route_token(kernels(), moe.routing, e, k, logits, moe.selection_bias, {}, logits + e,
                static_cast<int32_t*>(indices.data) + t * k, logits + e + space);
  }
  return MOEC_OK;
}

}  // namespace

void release_selection() {
  selection.release();
  foreseen.release();
}

}  // namespace moec

int32_t moec_moe(const moec_moe_args* args) {
  return args ? moec::run(*args) : moec::fail(MOEC_INVALID_ARGUMENT, "args: the pointer is null");
}

int32_t moec_select_experts(int64_t tokens, const int64_t* config, uint64_t config_length, moec_in router_input,
                            moec_in router_weight, moec_in router_bias, moec_in selection_bias, moec_out indices) {
  return moec::select(tokens, config, config_length, router_input, router_weight, router_bias, selection_bias, indices);
}

void moec_set_trace(moec_trace_fn callback, void* user) {
  std::lock_guard<std::recursive_mutex> lock(moec::trace_mutex);
  moec::trace_user = user;
  moec::trace_callback.store(callback, std::memory_order_release);
}
