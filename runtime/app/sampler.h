// From logits to a token, as assistant/sampling.py does it: the same order, double precision, and numpy's random numbers.
#ifndef MOEC_SAMPLER_H_
#define MOEC_SAMPLER_H_

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

// numpy.random.default_rng(seed).random(): PCG64 (XSL-RR, 128 bits) seeded by a SeedSequence.
class RandomNumbers {
 public:
  explicit RandomNumbers(uint64_t seed);
  double next();  // 0 <= x < 1

 private:
  unsigned __int128 state_ = 0, increment_ = 0;
};

struct Sampling {
  double temperature = 0, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  double repeat_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, double>> biases;

  // "" or what is out of range.
  std::string check(int64_t vocabulary) const;
};

class Sampler {
 public:
  Sampler(Sampling sampling, const std::vector<int32_t>& prompt);
  // Chooses the next token, of those whose bit is set in `mask` unless it is empty, and counts it for the penalties; -1 if biases
  // and mask exclude all.
  int32_t take(const std::vector<float>& logits, const std::vector<uint32_t>& mask = {});

 private:
  int32_t draw(const std::vector<double>& scores, double top);

  Sampling sampling_;
  RandomNumbers random_;
  std::set<int32_t> seen_;
  std::map<int32_t, int64_t> counts_;
};

#endif  // MOEC_SAMPLER_H_
