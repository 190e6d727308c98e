// One mixture-of-experts block after its arguments have been checked: what moe.cpp decodes and moe_run.cpp executes.
#ifndef MOEC_MOE_RUN_H_
#define MOEC_MOE_RUN_H_

#include <cstdint>

#include "core/format.h"
#include "isa/isa.h"
#include "core/routing.h"

namespace moec {

struct Moe {
  int64_t experts = 0, d = 0, width = 0, top_k = 0, shared_width = 0;
  Routing routing;
  Activation activation = Activation::kSilu;
  bool gated = true, interleaved = false;
  float alpha = 1.0f, gate_min = 0.0f, gate_max = 0.0f, up_min = 0.0f, up_max = 0.0f, up_offset = 0.0f;

  Matrix w13, w2;                            // of expert 0
  uint64_t w13_stride = 0, w2_stride = 0;    // bytes from one expert to the next
  Matrix shared_w13, shared_w2;              // when shared_width > 0
  const float* router_weight = nullptr;
  const float* router_bias = nullptr;
  const float* selection_bias = nullptr;
  const float* b13 = nullptr;
  const float* b2 = nullptr;
  const float* shared_gate = nullptr;

  Matrix expert_w13(int64_t e) const {
    Matrix m = w13;
    m.data += uint64_t(e) * w13_stride;
    return m;
  }
  Matrix expert_w2(int64_t e) const {
    Matrix m = w2;
    m.data += uint64_t(e) * w2_stride;
    return m;
  }
};

// x, router_input, y [tokens, d]; indices, weights [tokens, top_k]. alone: one token is all that the operator was called with.
// Fails only for want of memory, or for an expert that cannot be read.
int32_t run_moe(const Moe& moe, int64_t tokens, bool alone, const float* x, const float* router_input, float* y,
                int32_t* indices, float* weights);

// Tokens that one call of run_moe may take: bounds its scratch memory.
int64_t moe_chunk_tokens(const Moe& moe);

}  // namespace moec

#endif  // MOEC_MOE_RUN_H_
