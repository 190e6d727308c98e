#include "sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kMostBias = 1e6;  // scores stay finite, however many biases a token has

unsigned __int128 wide(uint64_t high, uint64_t low) { return static_cast<unsigned __int128>(high) << 64 | low; }

const unsigned __int128 kMultiplier = wide(0x2360ED051FC65DA4ull, 0x4385DF649FCCF645ull);

// numpy's SeedSequence(seed).generate_state(4, uint64).
std::array<uint64_t, 4> seeds_of(uint64_t seed) {
  const std::array<uint32_t, 4> entropy = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
  std::array<uint32_t, 4> pool{};
  uint32_t constant = 0x43B0D7E5u;
  const auto mixed = [&](uint32_t value) {
    value ^= constant;
    constant *= 0x931E8875u;
    value *= constant;
    return value ^ value >> 16;
  };
  for (size_t i = 0; i < 4; ++i) pool[i] = mixed(entropy[i]);
  for (size_t from = 0; from < 4; ++from)
    for (size_t to = 0; to < 4; ++to) {
      if (from == to) continue;
      const uint32_t value = pool[to] * 0xCA01F9DDu - mixed(pool[from]) * 0x4973F715u;
      pool[to] = value ^ value >> 16;
    }
  std::array<uint32_t, 8> words{};
  constant = 0x8B51F9DDu;
  for (size_t i = 0; i < 8; ++i) {
    uint32_t value = pool[i % 4] ^ constant;
    constant *= 0x58F38DEDu;
    value *= constant;
    words[i] = value ^ value >> 16;
  }
  std::array<uint64_t, 4> found{};
  for (size_t i = 0; i < 4; ++i) found[i] = words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32;
  return found;
}

}  // namespace

RandomNumbers::RandomNumbers(uint64_t seed) {
  const std::array<uint64_t, 4> seeds = seeds_of(seed);
  increment_ = wide(seeds[2], seeds[3]) << 1 | 1;
  state_ = (increment_ + wide(seeds[0], seeds[1])) * kMultiplier + increment_;
}

double RandomNumbers::next() {
  state_ = state_ * kMultiplier + increment_;
  const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
  const auto turn = static_cast<unsigned>(state_ >> 122);
  const uint64_t value = folded >> turn | folded << ((64 - turn) & 63);
  return static_cast<double>(value >> 11) * (1.0 / 9007199254740992.0);
}

std::string Sampling::check(int64_t vocabulary) const {
  const auto within = [](double value, double low, double high) { return value >= low && value <= high; };  // no NaN
  if (!within(temperature, 0, 100)) return "temperature: 0 (the likeliest token) to 100";
  if (!(top_p > 0 && top_p <= 1)) return "top_p: above 0 and at most 1";
  if (top_k < 0) return "top_k: 0 (all tokens) or above";
  if (!within(min_p, 0, 1)) return "min_p: 0 to 1";
  if (!within(repeat_penalty, 0.001, 100)) return "repeat_penalty: 0.001 to 100";
  if (!within(presence_penalty, -100, 100)) return "presence_penalty: -100 to 100";
  if (!within(frequency_penalty, -100, 100)) return "frequency_penalty: -100 to 100";
  for (const auto& [token, bias] : biases)
    if (token < 0 || token >= vocabulary || !(bias == kNone || within(bias, -kMostBias, kMostBias)))
      return "a bias for token " + std::to_string(token) + ": the id must be in the vocabulary, the bias at most 1e6, or -infinity";
  return "";
}

Sampler::Sampler(Sampling sampling, const std::vector<int32_t>& prompt)
    : sampling_(std::move(sampling)), random_(sampling_.seed) {
  if (sampling_.repeat_penalty != 1) seen_.insert(prompt.begin(), prompt.end());
}

int32_t Sampler::take(const std::vector<float>& logits, const std::vector<uint32_t>& mask) {
  std::vector<double> scores(logits.begin(), logits.end());
  for (const auto& [token, bias] : sampling_.biases) scores[static_cast<size_t>(token)] += bias;
  for (const int32_t token : seen_) {
    double& score = scores[static_cast<size_t>(token)];
    score = score < 0 ? score * sampling_.repeat_penalty : score / sampling_.repeat_penalty;
  }
  for (const auto& [token, count] : counts_)
    scores[static_cast<size_t>(token)] -= sampling_.presence_penalty + sampling_.frequency_penalty * static_cast<double>(count);
  for (size_t i = 0; i < scores.size() && !mask.empty(); ++i)
    if (!(mask[i / 32] >> (i % 32) & 1)) scores[i] = kNone;
  const auto top = std::max_element(scores.begin(), scores.end());
  if (*top == kNone) return -1;
  const int32_t token = sampling_.temperature == 0 ? static_cast<int32_t>(top - scores.begin()) : draw(scores, *top);
  if (sampling_.repeat_penalty != 1) seen_.insert(token);
  if (sampling_.presence_penalty != 0 || sampling_.frequency_penalty != 0) ++counts_[token];
  return token;
}

int32_t Sampler::draw(const std::vector<double>& scores, double top) {
  std::vector<int32_t> kept;
  double least = kNone;
  if (sampling_.top_k > 0 && sampling_.top_k < static_cast<int64_t>(scores.size())) {
    std::vector<double> ordered = scores;
    const auto last = ordered.begin() + static_cast<std::ptrdiff_t>(sampling_.top_k - 1);
    std::nth_element(ordered.begin(), last, ordered.end(), std::greater<>());
    least = *last;  // ties with it are kept
  }
  for (size_t i = 0; i < scores.size(); ++i)
    if (scores[i] >= least && scores[i] > kNone) kept.push_back(static_cast<int32_t>(i));
  std::vector<double> weights(kept.size());
  for (size_t i = 0; i < kept.size(); ++i)
    weights[i] = std::exp((scores[static_cast<size_t>(kept[i])] - top) / sampling_.temperature);
  const auto keep_only = [&](const std::vector<size_t>& places) {
    std::vector<int32_t> tokens;
    std::vector<double> shares;
    for (const size_t place : places) {
      tokens.push_back(kept[place]);
      shares.push_back(weights[place]);
    }
    kept.swap(tokens);
    weights.swap(shares);
  };
  if (sampling_.top_p < 1) {
    const double wanted = sampling_.top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<size_t> order(weights.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
    double sum = 0;
    size_t count = 0;
    while (count < order.size()) {
      sum += weights[order[count++]];
      if (sum >= wanted) break;
    }
    order.resize(count);
    std::sort(order.begin(), order.end());
    keep_only(order);
  }
  if (sampling_.min_p > 0) {
    std::vector<size_t> likely;
    for (size_t i = 0; i < weights.size(); ++i)
      if (weights[i] >= sampling_.min_p) likely.push_back(i);
    keep_only(likely);
  }
  if (kept.size() == 1) return kept[0];
  std::vector<double> sums(weights.size());
  std::partial_sum(weights.begin(), weights.end(), sums.begin());
  const auto drawn = std::upper_bound(sums.begin(), sums.end(), random_.next() * sums.back()) - sums.begin();
  return kept[std::min(static_cast<size_t>(drawn), kept.size() - 1)];
}
