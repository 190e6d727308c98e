// How likely a model took tokens to be, as assistant/sampling.py's `score` tells it.
#ifndef MOEC_SCORES_H_
#define MOEC_SCORES_H_

#include <cstdint>
#include <vector>

#include "../include/moec.h"

constexpr int32_t kMostTopScores = 100;

// Appends the log-probability of a token, with `text_bytes`, and those of the `top` likeliest, the lower id first of equal ones.
void append_scores(const std::vector<float>& logits, int32_t token, int32_t top, int64_t text_bytes, std::vector<moec_app_score>* scores);

#endif  // MOEC_SCORES_H_
