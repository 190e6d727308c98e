#include "python_calls.h"

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "json_scan.h"
#include "json_tree.h"
#include "utf8.h"

namespace {

constexpr int kDeepest = 64;           // lists and objects inside each other
constexpr size_t kLongestNumber = 100;  // characters
constexpr size_t kNone = std::string_view::npos;

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool in_name(char c) { return is_letter(c) || is_digit(c) || c == '_' || c == '.' || c == '-'; }
bool in_key(char c) { return in_name(c) || static_cast<uint8_t>(c) >= 0x80; }

// The members of an object: the last of equal names counts, in the place of the first.
class Members {
 public:
  explicit Members(Json* object) : object_(object) { object->kind = Json::kObject; }
  bool empty() const { return places_.empty(); }
  bool has(const std::string& name) const { return places_.count(name) > 0; }
  void set(const std::string& name, Json value) {
    const auto [place, added] = places_.emplace(name, object_->members.size());
    if (added) {
      object_->members.emplace_back(name, std::move(value));
    } else {
      object_->members[place->second].second = std::move(value);
    }
  }

 private:
  Json* object_;
  std::map<std::string, size_t> places_;
};

// The text of a literal, whose escapes may give the two halves of a surrogate pair one after the other.
class Text {
 public:
  bool add(uint32_t code) {
    const bool low = code >= 0xDC00 && code < 0xE000;
    if (low != (high_ != 0)) return false;
    if (code >= 0xD800 && code < 0xDC00) {
      high_ = code;
      return true;
    }
    append_code(low ? 0x10000 + ((high_ - 0xD800) << 10) + (code - 0xDC00) : code, &text_);
    high_ = 0;
    return true;
  }
  bool add(std::string_view plain) {
    if (!plain.empty() && high_ != 0) return false;
    text_ += plain;
    return true;
  }
  bool whole() const { return high_ == 0; }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
  uint32_t high_ = 0;  // half a pair that waits for the other
};

// What has been read of the text ends before `at_`, where no white space is. Functions say whether what they read was there.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text), at_(json_skip_space(text, 0)) {}

  bool read(std::vector<ToolCall>* calls) {
    if (!takes('[')) return false;
    while (true) {
      const Next next = next_of(!calls->empty(), ']');
      if (next == kWrong) return false;
      if (next == kEnd) break;
      calls->emplace_back();
      if (!read_call(&calls->back())) return false;
    }
    return at_ == text_.size() && !calls->empty();
  }

 private:
  enum Next { kItem, kEnd, kWrong };

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void move_to(size_t at) { at_ = json_skip_space(text_, at); }
  bool takes(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    move_to(at_ + 1);
    return true;
  }
  // What stands in a list behind its beginning, or behind an item: another one, or its end, which is taken.
  Next next_of(bool behind_item, char end) {
    if (behind_item && !takes(',')) return takes(end) ? kEnd : kWrong;
    return takes(end) ? kEnd : kItem;
  }
  bool read_while(bool (*in)(char), std::string* out) {
    size_t end = at_;
    while (end < text_.size() && in(text_[end])) ++end;
    *out = text_.substr(at_, end - at_);
    move_to(end);
    return !out->empty();
  }

  bool read_call(ToolCall* call) {
    if (!read_while(in_name, &call->name) || !takes('(')) return false;
    Json arguments;
    Members members(&arguments);
    while (true) {
      const Next next = next_of(!members.empty(), ')');
      if (next == kWrong) return false;
      if (next == kEnd) break;
      std::string key;
      Json value;
      if (!read_while(in_key, &key) || members.has(key) || !takes('=') || !read_value(&value, 0)) return false;
      members.set(key, std::move(value));
    }
    return write_json(arguments, JsonSpelling(), SIZE_MAX, &call->arguments);
  }

  bool read_value(Json* value, int depth) {
    const char first = peek();
    if (first == '"' || first == '\'') {
      value->kind = Json::kText;
      return read_text(&value->text);
    }
    if (first == '-' || is_digit(first)) return read_number(value);
    if (is_letter(first)) return read_word(&value->text);
    if (depth == kDeepest) return false;
    return first == '[' ? read_list(value, depth + 1) : read_object(value, depth + 1);
  }

  bool read_list(Json* value, int depth) {
    value->kind = Json::kList;
    takes('[');
    while (true) {
      const Next next = next_of(!value->items.empty(), ']');
      if (next != kItem) return next == kEnd;
      value->items.emplace_back();
      if (!read_value(&value->items.back(), depth)) return false;
    }
  }

  bool read_object(Json* value, int depth) {
    if (!takes('{')) return false;
    Members members(value);
    while (true) {
      const Next next = next_of(!members.empty(), '}');
      if (next != kItem) return next == kEnd;
      std::string name;
      Json member;
      if ((peek() != '"' && peek() != '\'') || !read_text(&name) || !takes(':') || !read_value(&member, depth)) return false;
      members.set(name, std::move(member));
    }
  }

  bool read_word(std::string* out) {
    std::string word;
    read_while(is_letter, &word);
    if (word == "True" || word == "true") *out = "true";
    if (word == "False" || word == "false") *out = "false";
    if (word == "None" || word == "null") *out = "null";
    return !out->empty();
  }

  bool read_number(Json* value) {
    if (peek() == '-' && (at_ + 1 >= text_.size() || !is_digit(text_[at_ + 1]))) return false;
    const auto number = json_value(text_, at_);
    if (!number || number->text.size() > kLongestNumber || !parse_json(number->text, value).empty()) return false;
    move_to(at_ + number->text.size());
    return true;
  }

  bool read_text(std::string* out) {
    const char quote = text_[at_];
    const char ends[] = {quote, '\\'};
    Text found;
    for (size_t at = at_ + 1;;) {
      const size_t end = text_.find_first_of(std::string_view(ends, sizeof ends), at);
      if (end == kNone || !found.add(text_.substr(at, end - at))) return false;
      at = end + 1;
      if (text_[end] == quote) {
        move_to(at);
        break;
      }
      if (!read_escape(&at, &found)) return false;
    }
    *out = found.take();
    return found.whole();
  }

  // What stands behind a backslash, which is before `*at`; *at becomes the place behind it.
  bool read_escape(size_t* at, Text* out) const {
    if (*at >= text_.size()) return false;
    const char letter = text_[(*at)++];
    const size_t digits = letter == 'x' ? 2 : letter == 'u' ? 4 : letter == 'U' ? 8 : 0;
    if (digits > 0) {
      uint32_t code = 0;
      for (size_t end = *at + digits; *at < end; ++*at) {
        const int digit = *at < text_.size() ? hex_digit(text_[*at]) : -1;
        if (digit < 0) return false;
        code = code << 4 | static_cast<uint32_t>(digit);
      }
      return code <= 0x10FFFF && out->add(code);
    }
    if (letter == 'N' || is_digit(letter)) return false;
    if (letter == '\n') return true;
    constexpr std::string_view kLetters = "\\'\"/abfnrtv", kSaid = "\\'\"/\a\b\f\n\r\t\v";
    const size_t place = kLetters.find(letter);
    if (place != kNone) return out->add(kSaid.substr(place, 1));
    --*at;  // both stay
    return out->add(std::string_view("\\"));
  }

  std::string_view text_;
  size_t at_;
};

}  // namespace

std::optional<std::vector<ToolCall>> python_calls(std::string_view text) {
  std::vector<ToolCall> found;
  return Reader(text).read(&found) ? std::make_optional(std::move(found)) : std::nullopt;
}
