// Timing of a loaded model: what `moec_runner` measures and prints.
#ifndef MOEC_BENCH_H_
#define MOEC_BENCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "moec_runtime.h"

struct BenchOptions {
  std::vector<int64_t> prompt;  // token ids
  int64_t decode = 0;           // tokens to generate (greedy) after the prompt
  int64_t context = 0;          // decode starts at this position: the cache is filled up to it first, untimed
  int64_t chunk = 0;            // most tokens of one prefill call; 0: what the program takes
  int64_t repeats = 1;
  bool stop = false;    // end at a stop token
  bool follow = false;  // the last `decode` ids of the prompt are decoded instead of generated ones
};

struct BenchResult {
  std::vector<double> prefill_s;          // one per repeat
  std::vector<double> decode_s;           // one per repeat, all tokens of it
  std::vector<double> decode_token_s;     // every token of every repeat
  std::vector<int64_t> generated;         // of the first repeat
  int64_t decode_start = 0;
  moec_expert_stats experts = {};         // what decoding added in the last repeat
};

// Empty when all went well, else the reason.
std::string run_bench(moec_model* model, const BenchOptions& options, BenchResult* result);

// Ids spread over the vocabulary, the same for the same seed. Repeated or consecutive ids would route to few experts and
// flatter speed and memory of a mixture-of-experts model.
std::vector<int64_t> spread_tokens(int64_t count, int64_t vocab_size, uint64_t seed);

double median(std::vector<double> values);

#endif  // MOEC_BENCH_H_
