#include "core/routing.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace moec {
namespace {

// Softmax needs all values; the others are elementwise. x and y may be the same.
void score(const Kernels& isa, int32_t kind, const float* x, int64_t n, float* y) {
  if (kind == Routing::kSigmoid) {
    isa.sigmoid(x, n, y);
    return;
  }
  if (kind == Routing::kSqrtSoftplus) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = std::sqrt(x[i] > 20.0f ? x[i] : std::log1p(std::exp(x[i])));  // torch's softplus is linear above 20
    }
    return;
  }
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] - most;
  isa.exponential(y, n, y);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += y[i];
  for (int64_t i = 0; i < n; ++i) y[i] /= sum;
}

// Order of floats as unsigned integers: -inf lowest, -0 and +0 equal, every NaN on top.
uint32_t rank(float x) {
  if (std::isnan(x)) return std::numeric_limits<uint32_t>::max();
  x += 0.0f;  // -0 becomes +0
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Indices of the `k` largest of x[n], best first.
void top(const float* x, int64_t n, int64_t k, int32_t* indices) {
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t r = rank(x[i]);
    if (held == k && r <= rank(x[indices[k - 1]])) continue;
    int64_t place = held < k ? held++ : k - 1;
    for (; place > 0 && r > rank(x[indices[place - 1]]); --place) indices[place] = indices[place - 1];
    indices[place] = int32_t(i);
  }
}

constexpr float kLargest = std::numeric_limits<float>::max();

// Overwrites the choices of all but the `keep` best groups. `space` holds groups + keep floats' worth of memory.
void limit_to_groups(const Routing& how, int64_t experts, float* choice, float* space) {
  const int64_t size = experts / how.groups;
  float* const group_score = space;
  auto* const best = reinterpret_cast<int32_t*>(space + how.groups);
  for (int64_t g = 0; g < how.groups; ++g) {
    const float* const c = choice + g * size;
    int32_t two[2];
    top(c, size, how.top2sum ? 2 : 1, two);
    group_score[g] = how.top2sum ? c[two[0]] + c[two[1]] : c[two[0]];
  }
  top(group_score, how.groups, how.keep, best);
  const float fill = how.fill_ninf ? -std::numeric_limits<float>::infinity() : 0.0f;
  for (int64_t g = 0; g < how.groups; ++g) {
    bool kept = false;
    for (int64_t i = 0; i < how.keep; ++i) kept |= best[i] == g;
    for (int64_t i = 0; !kept && i < size; ++i) choice[g * size + i] = fill;
  }
}

// As `top` of choice [experts], with a preference. `kept`: the groups that may be selected from; NULL: there are none.
// `raised` [experts] is scratch.
void top_preferred(const Routing& how, const Preference& preference, int64_t experts, int64_t top_k, const float* choice,
                   const int32_t* kept, float* raised, int32_t* indices) {
  const int64_t size = how.groups > 0 ? experts / how.groups : experts, parts = how.groups > 0 ? how.keep : 1;
  float least = std::numeric_limits<float>::infinity(), most = -least;
  for (int64_t part = 0; part < parts; ++part) {
    const float* const c = choice + (kept ? kept[part] : 0) * size;
    for (int64_t i = 0; i < size; ++i) {
      least = c[i] < least && c[i] >= -kLargest ? c[i] : least;
      most = c[i] > most ? c[i] : most;
    }
  }
  top(choice, experts, 1, indices);
  const int32_t best = indices[0];
  const float bonus = preference.share * (most - least);
  std::memcpy(raised, choice, size_t(experts) * 4);
  if (bonus > 0.0f && bonus <= kLargest) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = (kept ? kept[part] : 0) * size;
      for (int64_t e = begin; e < begin + size; ++e) raised[e] += preference.flags[e] ? bonus : 0.0f;
    }
    raised[best] = std::numeric_limits<float>::infinity();
  }
  top(raised, experts, top_k, indices);
  for (int64_t j = 1; j < top_k; ++j) {  // in the order of the router's own values
    const int32_t e = indices[j];
    const uint32_t r = rank(choice[e]);
    int64_t place = j;
    for (; place > 0; --place) {
      const int32_t other = indices[place - 1];
      const uint32_t q = rank(choice[other]);
      if (q > r || (q == r && other < e)) break;
      indices[place] = other;
    }
    indices[place] = e;
  }
}

// Weights of indices [top_k], best first: each is its expert's share among those that were not selected before it and are
// near it. `shares` holds `experts` floats.
void near_weights(const Kernels& isa, float threshold, const float* logits, int64_t experts, const int32_t* indices,
                  int64_t top_k, float* shares, float* weights) {
  for (int64_t j = 0; j < top_k; ++j) {
    const float best = logits[indices[j]];
    for (int64_t e = 0; e < experts; ++e) shares[e] = logits[e] - best;
    isa.exponential(shares, experts, shares);
    for (int64_t i = 0; i < j; ++i) shares[indices[i]] = 0.0f;
    float sum = 0.0f;
    for (int64_t e = 0; e < experts; ++e) {
      const float size = std::fabs(logits[e]);
      const bool far = (best - logits[e]) / (size > best ? size : best) > threshold;
      if (!far) sum += shares[e];
    }
    weights[j] = shares[indices[j]] / sum;
  }
}

}  // namespace

void route_token(const Kernels& isa, const Routing& how, int64_t experts, int64_t top_k, const float* logits,
                 const float* selection_bias, const Preference& preference, float* scratch, int32_t* indices, float* weights) {
  float* const scores = scratch;
  float* const choice = scores + experts;
  float* const raised = choice + experts;
  float* const space = raised + experts;
  const bool sparsemixer = how.score == Routing::kSparsemixer;
  if (how.after_topk || sparsemixer) {
    std::memcpy(scores, logits, size_t(experts) * 4);
  } else {
    score(isa, how.score, logits, experts, scores);
  }
  const bool on_logits = selection_bias && how.bias_on_logits && !how.after_topk;
  for (int64_t e = 0; e < experts; ++e) choice[e] = (on_logits ? logits[e] : scores[e]) + (selection_bias ? selection_bias[e] : 0.0f);
  if (on_logits) score(isa, how.score, choice, experts, choice);
  if (how.groups > 0) limit_to_groups(how, experts, choice, space);
  if (preference.flags) {
    const auto* const kept = how.groups > 0 ? reinterpret_cast<const int32_t*>(space + how.groups) : nullptr;
    top_preferred(how, preference, experts, top_k, choice, kept, raised, indices);
  } else {
    top(choice, experts, top_k, indices);
  }
  for (int64_t j = 0; j < top_k; ++j) weights[j] = scores[indices[j]];
  if (sparsemixer) near_weights(isa, how.threshold, scores, experts, indices, top_k, choice, weights);
  if (how.after_topk) score(isa, how.score, weights, top_k, weights);
  if (how.normalize) {
    float total = 0.0f;
    for (int64_t j = 0; j < top_k; ++j) total += weights[j];
    total += how.eps;
    if (how.clamp_min != 0.0f && total < how.clamp_min) total = how.clamp_min;
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= total;
  }
  for (int64_t j = 0; j < top_k; ++j) weights[j] *= how.scale;
}

}  // namespace moec
