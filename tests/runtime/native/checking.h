// What the checks of kernels share: counted failures, random values, operands of the C interface.
#ifndef MOEC_TESTS_CHECKING_H_
#define MOEC_TESTS_CHECKING_H_

#include <stdio.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "moec_kernel.h"

namespace checking {

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  fprintf(stderr, "FAILED: %s (%s)\n", what.c_str(), moec_last_error());
  ++failures;
}

inline std::mt19937 generator;

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

inline std::vector<float> normal(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> d(0.0f, scale);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = d(generator);
  return v;
}

template <typename T>
moec_in in(const std::vector<T>& v) {
  return {v.empty() ? nullptr : v.data(), v.size() * sizeof(T)};
}

template <typename T>
moec_out out(std::vector<T>& v) {
  return {v.empty() ? nullptr : v.data(), v.size() * sizeof(T)};
}

// Instruction sets that this machine can run, the best first.
inline std::vector<std::string> isas() {
  std::vector<std::string> names;
  const std::string text = moec_available_isas();
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    names.push_back(text.substr(at, comma - at));
    at = comma + 1;
  }
  return names;
}

}  // namespace checking

#endif  // MOEC_TESTS_CHECKING_H_
