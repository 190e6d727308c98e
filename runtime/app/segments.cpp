#include "segments.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "utf8.h"

namespace {

using Marks = std::vector<std::string_view>;
constexpr size_t kNone = std::string_view::npos;
constexpr std::string_view kThink = "<think>", kThought = "</think>", kChannel = "<|channel|>", kMessage = "<|message|>";

// How many bytes at the end of a text may be the beginning of a marker. Markers begin with ASCII: no character is cut.
size_t held(std::string_view text, const Marks& marks) {
  size_t longest = 0;
  for (const std::string_view mark : marks) longest = std::max(longest, mark.size());
  for (size_t length = std::min(longest > 0 ? longest - 1 : 0, text.size()); length > 0; --length) {
    const std::string_view end = text.substr(text.size() - length);
    if (std::any_of(marks.begin(), marks.end(), [&](std::string_view mark) { return mark.substr(0, length) == end; })) return length;
  }
  return 0;
}

class Segments : public Splitter {
 public:
  Segments(const ToolFormat* tools, bool thinks, bool thinking)
      : tools_(tools), thinks_(thinks || thinking), state_(thinking ? Segment::kThinking : Segment::kText), skip_lines_(thinking) {}

  void finish(std::vector<Segment>* found) override {
    const std::string rest = std::exchange(text_, "");
    if (state_ == Segment::kCall) {
      end_call(found, rest, "");
    } else {
      say(found, rest);
    }
  }

 private:
  bool step(std::vector<Segment>* found) override {
    if (state_ == Segment::kCall) {
      const size_t end = tools_->end.empty() ? kNone : text_.find(tools_->end);
      if (end == kNone) return false;
      const std::string body = text_.substr(0, end);
      text_.erase(0, end + tools_->end.size());
      end_call(found, body, tools_->end);
      return true;
    }
    const Marks marks = this->marks();
    size_t at = kNone;
    std::string_view mark;
    for (const std::string_view candidate : marks) {
      const size_t place = find(candidate);
      if (place < at || (place == at && place != kNone && candidate < mark)) {
        at = place;
        mark = candidate;
      }
    }
    if (opens()) {
      const size_t space = text_.size() - stripped_left(text_).size();
      say(found, text_.substr(0, space));
      state_ = Segment::kCall;
      opened_ = "";
      text_.erase(0, space);
      return true;
    }
    if (at == kNone) {
      const std::string said = text_.substr(0, text_.size() - held(text_, marks));
      text_.erase(0, said.size());
      say(found, said);
      return false;
    }
    const std::string said = text_.substr(0, at);
    text_.erase(0, at + mark.size());
    say(found, said);
    if (mark == kThink || mark == kThought) {
      state_ = mark == kThink ? Segment::kThinking : Segment::kText;
      skip_lines_ = true;
    } else {
      state_ = Segment::kCall;
      opened_ = mark;
    }
    return true;
  }

  Marks marks() const {
    if (state_ == Segment::kThinking) return {kThought};
    Marks found;
    if (tools_) found.push_back(tools_->begin);
    if (thinks_ && !begun_) found.push_back(kThink);
    return found;
  }

  // Where a marker stands; thinking begins an answer, and is a text in the middle of one.
  size_t find(std::string_view mark) const {
    const size_t at = text_.find(mark);
    if (at != kNone && mark == kThink && !stripped_text(std::string_view(text_).substr(0, at)).empty()) return kNone;
    return at;
  }

  // Whether the answer begins as a call without a marker does.
  bool opens() const {
    if (!tools_ || tools_->opens.empty() || begun_) return false;
    return stripped_left(text_).substr(0, tools_->opens.size()) == tools_->opens;
  }

  void say(std::vector<Segment>* found, std::string_view text) {
    if (skip_lines_) {  // line ends around a thinking segment belong to its markers
      text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
      skip_lines_ = text.empty();
    }
    if (text.empty()) return;
    if (state_ == Segment::kText && !stripped_text(text).empty()) begun_ = true;
    found->push_back({state_, std::string(text), {}});
  }

  void end_call(std::vector<Segment>* found, std::string_view body, std::string_view end) {
    const auto calls = tools_->parse(stripped_text(body));
    state_ = Segment::kText;
    begun_ = true;
    if (!calls) {
      found->push_back({Segment::kText, std::string(opened_) + std::string(body) + std::string(end), {}});
      return;
    }
    for (const ToolCall& call : *calls) found->push_back({Segment::kCall, "", call});
    skip_lines_ = true;  // a line end between calls
  }

  const ToolFormat* tools_;
  bool thinks_;
  Segment::Kind state_;
  std::string_view opened_;  // the marker that began the call
  bool begun_ = false;       // whether anything but white space was said
  bool skip_lines_;
};

bool is_word(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (c & 0x80); }

class Channels : public Splitter {
 public:
  void finish(std::vector<Segment>* found) override {
    const std::string rest = std::exchange(text_, "");
    if (!in_header_) {
      end(found, rest);
    } else {  // else a model that does not keep to the form
      const std::string_view words = stripped_text(rest);
      if (!words.empty() && words.substr(0, 2) != "<|" && words.substr(0, 9) != "assistant") found->push_back({Segment::kText, rest, {}});
    }
    in_header_ = true;
  }

 private:
  bool step(std::vector<Segment>* found) override {
    static const Marks ends = {"<|end|>", "<|call|>", "<|return|>", "<|start|>"};
    if (in_header_) {
      const size_t at = text_.find(kMessage);
      if (at == kNone) return false;
      begin(std::string_view(text_).substr(0, at));
      text_.erase(0, at + kMessage.size());
      return true;
    }
    size_t at = kNone;
    std::string_view mark;
    for (const std::string_view candidate : ends) {
      const size_t place = text_.find(candidate);
      if (place < at) {
        at = place;
        mark = candidate;
      }
    }
    if (at != kNone) {
      const std::string body = text_.substr(0, at);
      text_.erase(0, at + mark.size());
      end(found, body);
      in_header_ = true;
      return true;
    }
    if (to_.empty()) {
      const std::string said = text_.substr(0, text_.size() - held(text_, ends));
      text_.erase(0, said.size());
      if (!said.empty()) found->push_back({kind_, said, {}});
    }
    return false;
  }

  void begin(std::string_view header) {
    in_header_ = false;
    to_ = "";
    constexpr std::string_view kTo = "to=functions.";
    for (size_t at = 0; to_.empty() && (at = header.find(kTo, at)) != kNone; at += kTo.size()) {
      size_t end = at + kTo.size();
      while (end < header.size() && (is_word(header[end]) || header[end] == '.' || header[end] == '-')) ++end;
      to_ = header.substr(at + kTo.size(), end - at - kTo.size());
    }
    std::string_view channel;
    for (size_t at = 0; channel.empty() && (at = header.find(kChannel, at)) != kNone; at += kChannel.size()) {
      channel = stripped_left(header.substr(at + kChannel.size()));
      size_t end = 0;
      while (end < channel.size() && is_word(channel[end])) ++end;
      channel = channel.substr(0, end);
    }
    kind_ = channel == "analysis" && to_.empty() ? Segment::kThinking : Segment::kText;
  }

  void end(std::vector<Segment>* found, const std::string& body) {
    if (to_.empty()) {
      if (!body.empty()) found->push_back({kind_, body, {}});
      return;
    }
    const std::string_view arguments = stripped_text(body);
    const auto call = named_call(to_, arguments.empty() ? "{}" : arguments);
    found->push_back(call ? Segment{Segment::kCall, "", *call} : Segment{Segment::kText, body, {}});
    to_ = "";
  }

  bool in_header_ = true;  // of a message; its text follows
  Segment::Kind kind_ = Segment::kText;
  std::string to_;  // the tool that the message is to
};

}  // namespace

std::unique_ptr<Splitter> make_segments(const ToolFormat* tools, bool thinks, bool thinking) {
  return std::make_unique<Segments>(tools, thinks, thinking);
}

std::unique_ptr<Splitter> make_channels() { return std::make_unique<Channels>(); }
