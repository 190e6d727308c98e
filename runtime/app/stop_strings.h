// Stop strings in a text that comes in pieces, as assistant/stops.py finds them: also across pieces, never shown in part.
#ifndef MOEC_STOP_STRINGS_H_
#define MOEC_STOP_STRINGS_H_

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

class StopStrings {
 public:
  static constexpr size_t kMost = 1000, kLongest = 4096;

  explicit StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
    for (const std::string& stop : stops_) longest_ = std::max(longest_, stop.size());
  }
  bool found() const { return found_; }

  // What can be shown already. The text ends before the stop string that ends first; of several, before the longest.
  std::string push(std::string_view piece) {
    if (found_) return "";
    std::string text = std::move(held_);
    held_.clear();
    text += piece;
    size_t end = std::string::npos, begin = 0;
    for (const std::string& stop : stops_) {
      const size_t at = text.find(stop);
      if (at == std::string::npos) continue;
      if (at + stop.size() < end || (at + stop.size() == end && at < begin)) {
        end = at + stop.size();
        begin = at;
      }
    }
    if (end != std::string::npos) {
      found_ = true;
      return text.substr(0, begin);
    }
    size_t keep = text.size() < longest_ ? 0 : text.size() - longest_ + 1;
    while (keep < text.size() && !begins(std::string_view(text).substr(keep))) ++keep;
    if (longest_ == 0) keep = text.size();
    held_ = text.substr(keep);
    return text.substr(0, keep);
  }

  std::string finish() { return std::exchange(held_, ""); }

 private:
  bool begins(std::string_view text) const {
    for (const std::string& stop : stops_)
      if (std::string_view(stop).substr(0, text.size()) == text) return true;
    return false;
  }

  std::vector<std::string> stops_;
  std::string held_;
  size_t longest_ = 0;
  bool found_ = false;
};

#endif  // MOEC_STOP_STRINGS_H_
