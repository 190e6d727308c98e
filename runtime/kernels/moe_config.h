// The `config` and `params` lists of moec_moe, field by field. runtime/moe_config.py holds the same tables; a test
// compares the enumerators of this file with it. Append, never renumber.
#ifndef MOEC_MOE_CONFIG_H_
#define MOEC_MOE_CONFIG_H_

enum {
  MOEC_MOE_VERSION_NUMBER = 1,
};

enum moec_moe_config {
  MOEC_CONFIG_VERSION = 0,
  MOEC_CONFIG_EXPERTS = 1,
  MOEC_CONFIG_D_MODEL = 2,
  MOEC_CONFIG_EXPERT_WIDTH = 3,
  MOEC_CONFIG_TOP_K = 4,
  MOEC_CONFIG_SHARED_WIDTH = 5,  // 0: no shared expert
  MOEC_CONFIG_W13_FORMAT = 6,
  MOEC_CONFIG_W2_FORMAT = 7,
  MOEC_CONFIG_SHARED_W13_FORMAT = 8,
  MOEC_CONFIG_SHARED_W2_FORMAT = 9,
  MOEC_CONFIG_SCORE = 10,        // 0 softmax, 1 sigmoid, 2 sqrt(softplus), 3 sparsemixer
  MOEC_CONFIG_AFTER_TOPK = 11,   // 1: select on logits, score the selected ones
  MOEC_CONFIG_BIAS_ON = 12,      // selection bias added to: 0 scores, 1 logits
  MOEC_CONFIG_GROUPS = 13,       // 0: selection is not limited to groups
  MOEC_CONFIG_KEEP = 14,
  MOEC_CONFIG_GROUP_SCORE = 15,  // 0 max, 1 sum of the two best
  MOEC_CONFIG_FILL = 16,         // what the dropped groups' choices become: 0 zero, 1 -inf
  MOEC_CONFIG_NORMALIZE = 17,    // 0 none, 1 weights /= max(sum + eps, clamp_min)
  MOEC_CONFIG_APPLY = 18,        // weights multiply: 0 the expert's output, 1 its input
  MOEC_CONFIG_ACTIVATION = 19,   // 0 silu, 1 gelu (erf), 2 gelu (tanh), 3 relu, 4 relu squared
  MOEC_CONFIG_GATED = 20,
  MOEC_CONFIG_INTERLEAVED = 21,  // gate and up are the even and odd rows of w13, else its halves
  MOEC_MOE_CONFIG_LENGTH = 22,
};

enum moec_moe_params {
  MOEC_PARAMS_EPS = 0,
  MOEC_PARAMS_CLAMP_MIN = 1,  // 0: no lower bound
  MOEC_PARAMS_SCALE = 2,
  MOEC_PARAMS_ALPHA = 3,
  MOEC_PARAMS_GATE_MIN = 4,
  MOEC_PARAMS_GATE_MAX = 5,
  MOEC_PARAMS_UP_MIN = 6,
  MOEC_PARAMS_UP_MAX = 7,
  MOEC_PARAMS_UP_OFFSET = 8,
  MOEC_PARAMS_THRESHOLD = 9,  // of sparsemixer; a list without it ends here
  MOEC_MOE_PARAMS_LENGTH = 10,
};

#endif  // MOEC_MOE_CONFIG_H_
