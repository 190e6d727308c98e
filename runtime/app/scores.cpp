#include "scores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

void append_scores(const std::vector<float>& logits, int32_t token, int32_t top, int64_t text_bytes, std::vector<moec_app_score>* scores) {
  const double most = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - most);
  const double whole = most + std::log(sum);
  const auto value = [&](int32_t id) { return static_cast<double>(logits[static_cast<size_t>(id)]) - whole; };
  scores->push_back({token, 0, value(token), text_bytes});
  if (top == 0) return;
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto last = ids.begin() + std::min<std::ptrdiff_t>(top, static_cast<std::ptrdiff_t>(ids.size()));
  std::partial_sort(ids.begin(), last, ids.end(), [&](int32_t a, int32_t b) {
    const double one = value(a), other = value(b);
    return one > other || (one == other && a < b);
  });
  for (auto id = ids.begin(); id != last; ++id) scores->push_back({*id, static_cast<int32_t>(id - ids.begin()) + 1, value(*id), 0});
}
