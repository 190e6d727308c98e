// From router logits to the selected experts and their weights: compiler/ops/attributes.py, Routing, step by step.
#ifndef MOEC_ROUTING_H_
#define MOEC_ROUTING_H_

#include <cstdint>

#include "isa/isa.h"

namespace moec {

struct Routing {
  enum Score { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2, kSparsemixer = 3 };
  int32_t score = kSoftmax;
  bool after_topk = false;
  bool bias_on_logits = false;
  int64_t groups = 0, keep = 0;
  bool top2sum = false;
  bool fill_ninf = false;
  bool normalize = false;
  bool apply_input = false;
  float eps = 0.0f, clamp_min = 0.0f, scale = 1.0f;
  float threshold = 0.0f;  // of sparsemixer, which selects by the logits
};

// Experts that a token's selection should prefer: those whose flag is set are selected as if their values were larger by
// `share` times the range of the token's values. The best expert is selected in any case, and an expert never loses its place
// to one whose value is farther below. Of groups only those that are kept count.
struct Preference {
  const uint8_t* flags = nullptr;  // [experts]; NULL: none
  float share = 0.0f;
};

// Floats of scratch that route_token needs for `experts` experts in `groups` groups.
inline int64_t routing_scratch(int64_t experts, int64_t groups, int64_t top_k) {
  return 3 * experts + 2 * groups + top_k + 16;
}

// logits [experts] of one token, selection_bias [experts] or NULL -> indices [top_k], best first, weights [top_k].
// Of equal choices the lower index is first; a NaN ranks above every number, so indices are valid and distinct for any
// input. A preference changes which experts are selected, not their order among each other or their weights.
void route_token(const Kernels& isa, const Routing& how, int64_t experts, int64_t top_k, const float* logits,
                 const float* selection_bias, const Preference& preference, float* scratch, int32_t* indices, float* weights);

}  // namespace moec

#endif  // MOEC_ROUTING_H_
