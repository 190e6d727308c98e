// Prompt lookup decoding, as assistant/speculate.py does it: drafts of what follows, and whether drafting saves time.
#ifndef MOEC_SPECULATION_H_
#define MOEC_SPECULATION_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

// Drafts the tokens that followed when the text's last tokens occurred before: the last three, or else the last two, after which
// few tokens are drafted. One object serves one growing text.
class PromptLookup {
 public:
  std::vector<int32_t> draft(const std::vector<int32_t>& tokens, size_t most) {
    for (size_t end = std::max(known_, kPair); end < tokens.size(); ++end)
      for (const size_t gram : {kTriple, kPair})
        if (gram <= end) behind_[last(tokens, end, gram)] = end;
    known_ = tokens.size();
    for (const size_t gram : {kTriple, kPair}) {
      if (tokens.size() < gram) continue;
      const auto found = behind_.find(last(tokens, tokens.size(), gram));
      if (found == behind_.end()) continue;
      const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(found->second);
      const size_t count = gram == kTriple ? most : std::min(most, kUnsure);
      return {begin, begin + static_cast<std::ptrdiff_t>(std::min(count, tokens.size() - found->second))};
    }
    return {};
  }

 private:
  static constexpr size_t kTriple = 3, kPair = 2;
  static constexpr size_t kUnsure = 2;  // tokens of a draft that only a pair speaks for
  using Gram = std::array<int32_t, kTriple>;  // a pair begins with -1
  struct Hash {
    size_t operator()(const Gram& gram) const {
      uint64_t value = 0;
      for (const int32_t token : gram) value = (value ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15u;
      return static_cast<size_t>(value ^ value >> 32);
    }
  };
  static Gram last(const std::vector<int32_t>& tokens, size_t end, size_t gram) {
    return {gram == kPair ? -1 : tokens[end - 3], tokens[end - 2], tokens[end - 1]};
  }

  size_t known_ = 0;  // tokens that `behind_` covers
  std::unordered_map<Gram, size_t, Hash> behind_;  // the position behind the latest occurrence, the last tokens' own aside
};

// Whether drafting is faster than single steps, by measured time. The gain of a call is the time that its tokens would have
// taken one by one over the time that it took; when the mean of the last calls falls below 1, drafting pauses for 16 steps,
// then for twice as many each time.
class Pays {
 public:
  bool now() {
    if (step_ < 0) return false;  // nothing to compare with yet
    if (resting_ == 0) return true;
    --resting_;
    return false;
  }
  void stepped(double seconds) { step_ = step_ < 0 ? seconds : 0.8 * step_ + 0.2 * seconds; }
  // How many single tokens take as long.
  double steps(double seconds) const { return seconds / std::max(step_, 1e-9); }
  // A call of which the first `tokens` tokens were kept.
  void checked(int64_t tokens, double seconds) {
    worth_ = 0.6 * worth_ + 0.4 * static_cast<double>(tokens) * step_ / std::max(seconds, 1e-9);
    if (worth_ >= 1) {
      rest_ = kRest;
      return;
    }
    resting_ = rest_;
    rest_ = std::min<int64_t>(2 * rest_, 1024);
    worth_ = 1;
  }

 private:
  static constexpr int64_t kRest = 16;
  double step_ = -1, worth_ = 1.3;  // seconds of a single token; mean gain
  int64_t rest_ = kRest, resting_ = 0;
};

// How many tokens the next draft has: those that promise the most tokens for their time. Known are how often drafted tokens were
// kept and, in times of a single step, what checks of other lengths took. Lengths between two of these lie on the line between
// them, longer ones on the line beyond, so that an untried one is tried where the last one paid. What is known grows old: a
// measurement that came out badly once does not stand for ever.
class DraftLength {
 public:
  size_t value() const {
    if (known_ == 1) return kFirst;
    const double share = (kept_ + 0.35) / (kept_ + missed_ + 0.5);
    size_t best = 1;
    double most = 0;
    for (const size_t length : kLengths) {
      double tokens = 1, likely = 1;
      for (size_t i = 0; i < length; ++i) tokens += likely *= share;
      if (tokens / at(length + 1) <= most) continue;
      best = length;
      most = tokens / at(length + 1);
    }
    return best;
  }
  // A call of 1 + `drafted` tokens, at most 16, that took as long as `steps` single ones and gave `tokens`.
  void checked(int64_t tokens, size_t drafted, double steps) {
    kept_ = 0.8 * kept_ + static_cast<double>(tokens - 1);
    missed_ = 0.8 * missed_ + (tokens <= static_cast<int64_t>(drafted) ? 1 : 0);
    for (double& cost : cost_)
      if (cost > 0) cost = std::max(1.0, 0.99 * cost);
    double& mine = cost_[1 + drafted];
    if (mine == 0) ++known_;
    mine = mine == 0 ? steps : 0.7 * mine + 0.3 * steps;
  }

 private:
  static constexpr std::array<size_t, 7> kLengths = {1, 2, 3, 5, 7, 11, 15};
  static constexpr size_t kFirst = 3;

  double at(size_t size) const {
    if (cost_[size] > 0) return cost_[size];
    size_t below = size, above = size;
    while (cost_[below] == 0) --below;
    while (above < cost_.size() && cost_[above] == 0) ++above;
    if (above == cost_.size()) {  // beyond all: along the last two
      above = below--;
      while (cost_[below] == 0) --below;
    }
    const double slope = (cost_[above] - cost_[below]) / static_cast<double>(above - below);
    return cost_[below] + std::max(slope, 0.0) * static_cast<double>(size - below);
  }

  std::array<double, 17> cost_ = {0, 1};  // by tokens of a call, in single steps; 0: not known
  size_t known_ = 1;
  double kept_ = 1.4, missed_ = 0.6;
};

#endif  // MOEC_SPECULATION_H_
