// Prompt lookup decoding, as assistant/speculate.py does it: drafts of what follows, and whether drafting saves time.
#ifndef MOEC_SPECULATION_H_
#define MOEC_SPECULATION_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

// Drafts the tokens that followed when the text's last three tokens occurred before. One object serves one growing text.
class PromptLookup {
 public:
  std::vector<int32_t> draft(const std::vector<int32_t>& tokens, size_t most) {
    for (size_t end = std::max(known_, kGram); end < tokens.size(); ++end) behind_[gram(tokens, end)] = end;
    known_ = tokens.size();
    if (tokens.size() < kGram) return {};
    const auto found = behind_.find(gram(tokens, tokens.size()));
    if (found == behind_.end()) return {};
    const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(found->second);
    return {begin, begin + static_cast<std::ptrdiff_t>(std::min(most, tokens.size() - found->second))};
  }

 private:
  static constexpr size_t kGram = 3;
  using Gram = std::array<int32_t, kGram>;
  struct Hash {
    size_t operator()(const Gram& gram) const {
      uint64_t value = 0;
      for (const int32_t token : gram) value = (value ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15u;
      return static_cast<size_t>(value ^ value >> 32);
    }
  };
  static Gram gram(const std::vector<int32_t>& tokens, size_t end) { return {tokens[end - 3], tokens[end - 2], tokens[end - 1]}; }

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

// How many tokens the next draft has.
class DraftLength {
 public:
  size_t value() const { return length_; }
  // all: every token of the last draft was kept; else `tokens` of its call were.
  void checked(bool all, int64_t tokens) {
    length_ = all ? std::min<size_t>(2 * length_, kMost) : static_cast<size_t>(std::max<int64_t>(tokens, 2));
  }

 private:
  static constexpr size_t kMost = 15;
  size_t length_ = 4;
};

#endif  // MOEC_SPECULATION_H_
