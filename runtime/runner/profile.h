// One profiled pass over a prompt: rates, memory and expert use at chosen lengths of context.
#ifndef MOEC_PROFILE_H_
#define MOEC_PROFILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "moec_runtime.h"

struct ProfileOptions {
  std::vector<int64_t> prompt;  // token ids
  std::vector<int64_t> points;  // ascending lengths of context; empty: the whole prompt
  int64_t decode = 0;           // tokens decoded at each point
  int64_t warm = 0;             // further passes, with every page in memory, for rates alone
  bool follow = false;          // decode the ids that follow in the prompt, not the model's own
};

struct ProfilePoint {
  int64_t tokens = 0;
  std::vector<double> prefill_s;   // of the first `tokens` ids, to the first token chosen; the cold pass, then the warm ones
  std::vector<double> decode_s;    // of `decode` tokens; the same order
  std::vector<double> token_s;     // of the last pass, token by token
  moec_memory prefilled = {}, decoded = {};
  int64_t experts_touched = 0;     // (layer, expert) pairs selected so far
};

// What the cache of routed experts did, in all layers and in each; `tokens` were run.
struct ExpertUse {
  int64_t tokens = 0;
  moec_expert_layer_stats all = {};
  std::vector<moec_expert_layer_stats> layers;
};

struct ProfileResult {
  std::vector<ProfilePoint> points;
  std::vector<std::vector<int64_t>> prefill_counts, decode_counts;  // selections by [layer][expert], of the cold pass
  std::vector<int64_t> generated;                                   // at the first point
  int64_t peak_bytes = 0;                                           // of the cold pass
  moec_expert_stats budget = {};                                    // at the end; its `budget` is 0 without one
  ExpertUse prefill_use, decode_use;                                // of the last pass, with a budget
};

// How the model came into memory.
struct LoadReport {
  double seconds = 0.0;
  bool dropped = false;          // the system was asked to forget the file first, and agreed
  int64_t cached_bytes = -1;     // of the file, in the page cache just before it was opened; -1: unknown
  moec_memory before = {}, loaded = {};
};

// Empty when all went well, else the reason.
std::string run_profile(moec_model* model, const ProfileOptions& options, ProfileResult* result);

std::string profile_json(const std::string& path, moec_model* model, const LoadReport& load, const ProfileOptions& options,
                         const ProfileResult& result);

#endif  // MOEC_PROFILE_H_
