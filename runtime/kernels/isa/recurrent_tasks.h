// What one instruction set computes of the layers with a state. Internal; the C API is recurrent.h, and its letters hold.
// Every task walks through all tokens of a call for a part of the state, which stays in the first cache meanwhile.
#ifndef MOEC_RECURRENT_TASKS_H_
#define MOEC_RECURRENT_TASKS_H_

#include <cstdint>

namespace moec {

// Channels [begin, end) of a short convolution.
struct ConvTask {
  int64_t tokens, channels, taps;
  int64_t begin, end;
  bool fresh, silu;
  const float* x;
  const float* weight;
  const float* bias;  // or NULL
  float* state;
  float* out;
};

// Columns [begin, end) of the values of one head. q and k are normalized, q is scaled, decay is a factor.
struct DeltaTask {
  int64_t tokens, key_heads, heads, key_dim, value_dim;
  int64_t head, begin, end;
  bool fresh;
  const float* q;
  const float* k;
  const float* v;
  const float* decay;
  const float* beta;
  float* state;
  float* out;
};

// Rows [begin, end) of the H * p rows of a selective scan's state.
struct ScanTask {
  int64_t tokens, heads, groups, head_dim, state_dim, a_columns;
  int64_t begin, end;
  bool fresh;
  const float* x;
  const float* dt;
  const float* a;
  const float* b;
  const float* c;
  const float* d;  // or NULL
  float* state;
  float* out;
};

}  // namespace moec

#endif  // MOEC_RECURRENT_TASKS_H_
