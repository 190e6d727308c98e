#include "json_tree.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iomanip>
#include <locale>
#include <map>
#include <sstream>

#include "json_scan.h"
#include "utf8.h"

namespace {

constexpr int kDeepest = 100;         // values inside each other
constexpr size_t kLongestNumber = 4300;  // Python's limit for digits of an int

// Reads or writes a number whatever the locale of the process is.
bool read_double(const std::string& text, double* value) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  in >> *value;
  // some libraries call what is too small for a double a failure
  return std::isfinite(*value) && (!in.fail() || std::abs(*value) < 1);
}

// Digits and exponent of a finite positive number: value = d.ddd x 10^exponent.
struct Decimal {
  std::string digits;
  int exponent;

  double value() const {
    double found = 0;
    const std::string text = digits.substr(0, 1) + "." + digits.substr(1) + "0e" + std::to_string(exponent);
    return read_double(text, &found) ? found : 0;  // 0: beyond the largest double
  }
  // The next larger one of as many digits.
  Decimal next() const {
    Decimal found = *this;
    size_t at = found.digits.size();
    while (at > 0 && found.digits[at - 1] == '9') found.digits[--at] = '0';
    if (at > 0) {
      ++found.digits[at - 1];
    } else {
      found.digits[0] = '1';
      ++found.exponent;
    }
    return found;
  }
};

Decimal rounded(double value, int digits) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out << std::scientific << std::setprecision(digits - 1) << value;
  const std::string text = out.str();
  const size_t mark = text.find('e');
  std::string found;
  for (const char c : text.substr(0, mark))
    if (c != '.') found += c;
  return {found, std::atoi(text.c_str() + mark + 1)};
}

// The shortest decimal that reads as `value`, the nearest of these. Below a power of two doubles are closer to each other than
// above it, so that the nearest decimal of so many digits may read as another double, and the next above it as this one.
Decimal shortest(double value) {
  int low = 1, high = 17;
  Decimal found = rounded(value, high);
  while (low < high) {
    const int digits = (low + high) / 2;
    Decimal given = rounded(value, digits);
    if (given.value() != value) given = given.next();
    if (given.value() == value) {
      high = digits;
      found = given;
    } else {
      low = digits + 1;
    }
  }
  return found;
}

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  std::string read(Json* value) {
    at_ = json_skip_space(text_, 0);
    if (!read_value(value, 0)) return fault_.empty() ? "is not JSON, at byte " + std::to_string(at_) : fault_;
    at_ = json_skip_space(text_, at_);
    return at_ == text_.size() ? "" : "is not JSON, at byte " + std::to_string(at_);
  }

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool wrong(const std::string& what) {
    fault_ = what + ", at byte " + std::to_string(at_);
    return false;
  }
  // Takes a character if it is the next one, and the white space around it.
  bool takes(char c) {
    const size_t at = json_skip_space(text_, at_);
    if (at >= text_.size() || text_[at] != c) return false;
    at_ = json_skip_space(text_, at + 1);
    return true;
  }

  bool read_value(Json* value, int depth) {
    if (depth > kDeepest) return wrong("more than 100 values inside each other");
    const char first = peek();
    if (first == '"') {
      value->kind = Json::kText;
      return read_text(&value->text);
    }
    if (first == '[') return read_list(value, depth);
    if (first == '{') return read_object(value, depth);
    for (const std::string_view word : {"true", "false", "null"}) {
      if (text_.substr(at_, word.size()) != word) continue;
      value->text = word;
      at_ += word.size();
      return true;
    }
    return read_number(&value->text);
  }

  bool read_list(Json* value, int depth) {
    value->kind = Json::kList;
    takes('[');
    if (takes(']')) return true;
    do {
      value->items.emplace_back();
      if (!read_value(&value->items.back(), depth + 1)) return false;
    } while (takes(','));
    return closes(']');
  }

  bool read_object(Json* value, int depth) {
    value->kind = Json::kObject;
    std::map<std::string, size_t> places;
    takes('{');
    if (takes('}')) return true;
    do {
      std::string name;
      if (peek() != '"' || !read_text(&name)) return false;
      if (!takes(':')) return false;
      Json member;
      if (!read_value(&member, depth + 1)) return false;
      const auto [place, added] = places.emplace(name, value->members.size());
      if (added) {
        value->members.emplace_back(std::move(name), std::move(member));
      } else {
        value->members[place->second].second = std::move(member);
      }
    } while (takes(','));
    return closes('}');
  }

  // The end of a list or an object, without the white space behind it: it may be the end of the text.
  bool closes(char c) {
    at_ = json_skip_space(text_, at_);
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  bool read_text(std::string* out) {
    ++at_;
    for (;;) {
      if (at_ >= text_.size() || static_cast<uint8_t>(text_[at_]) < 32) return false;
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return true;
      }
      if (c != '\\') {
        out->push_back(c);
        ++at_;
      } else if (!read_escape(out)) {
        return false;
      }
    }
  }

  bool read_escape(std::string* out) {
    const char c = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
    if (c != 'u') {
      const size_t place = c == '\0' ? std::string_view::npos : std::string_view("\"\\/bfnrt").find(c);
      if (place == std::string_view::npos) return false;
      out->push_back("\"\\/\b\f\n\r\t"[place]);
      at_ += 2;
      return true;
    }
    const int32_t high = hex4(text_, at_ + 2);
    if (high < 0) return false;
    auto code = static_cast<uint32_t>(high);
    size_t size = 6;
    if (code >= 0xD800 && code < 0xE000) {
      const int32_t low = code < 0xDC00 && text_.substr(at_ + 6, 2) == "\\u" ? hex4(text_, at_ + 8) : -1;
      if (low < 0xDC00 || low >= 0xE000) return wrong("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (static_cast<uint32_t>(low) - 0xDC00);
      size = 12;
    }
    append_code(code, out);
    at_ += size;
    return true;
  }

  size_t digits(size_t at) const {
    while (at < text_.size() && text_[at] >= '0' && text_[at] <= '9') ++at;
    return at;
  }

  bool read_number(std::string* out) {
    const size_t begin = peek() == '-' ? at_ + 1 : at_;
    size_t end = digits(begin);
    if (end == begin) return false;
    if (text_[begin] == '0') end = begin + 1;
    bool whole = true;
    if (end < text_.size() && text_[end] == '.' && digits(end + 1) > end + 1) {
      end = digits(end + 1);
      whole = false;
    }
    if (end < text_.size() && (text_[end] == 'e' || text_[end] == 'E')) {
      const size_t sign = end + 1 < text_.size() && (text_[end + 1] == '+' || text_[end + 1] == '-') ? end + 2 : end + 1;
      if (digits(sign) > sign) {
        end = digits(sign);
        whole = false;
      }
    }
    *out = text_.substr(at_, end - at_);
    if (out->size() > kLongestNumber) return wrong("a number of more than 4300 characters");
    double value = 0;
    if (!whole && !read_double(*out, &value)) return wrong("a number out of range");
    if (!whole) *out = python_float(value);
    if (*out == "-0") *out = "0";
    at_ = end;
    return true;
  }

  std::string_view text_;
  size_t at_ = 0;
  std::string fault_;
};

class Writer {
 public:
  Writer(const JsonSpelling& spelling, size_t most, std::string* out) : spelling_(spelling), most_(most), out_(out) {}

  bool write(const Json& value, size_t depth) {
    if (out_->size() > most_) return false;
    if (value.kind == Json::kWord) {
      *out_ += value.text;
    } else if (value.kind == Json::kText) {
      quote(value.text);
    } else if (value.kind == Json::kList) {
      if (value.items.empty()) return say("[]");
      for (size_t i = 0; i < value.items.size(); ++i) {
        begin(i == 0 ? "[" : spelling_.item, depth + 1);
        if (!write(value.items[i], depth + 1)) return false;
      }
      begin("", depth);
      *out_ += ']';
    } else {
      return write_object(value, depth);
    }
    return out_->size() <= most_;
  }

 private:
  bool say(std::string_view text) {
    *out_ += text;
    return out_->size() <= most_;
  }
  void quote(std::string_view text) { *out_ += '"' + escaped_json(text, spelling_.ascii) + '"'; }
  // What stands before an item, or before the end.
  void begin(std::string_view text, size_t depth) {
    *out_ += text;
    if (spelling_.indent > 0) *out_ += '\n' + std::string(depth * static_cast<size_t>(spelling_.indent), ' ');
  }
  bool write_object(const Json& value, size_t depth) {
    if (value.members.empty()) return say("{}");
    std::vector<const std::pair<std::string, Json>*> order;
    for (const auto& member : value.members) order.push_back(&member);
    // bytes of UTF-8 are in the order of code points, which is Python's
    if (spelling_.sorted) std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
    for (size_t i = 0; i < order.size(); ++i) {
      begin(i == 0 ? "{" : spelling_.item, depth + 1);
      quote(order[i]->first);
      *out_ += spelling_.key;
      if (!write(order[i]->second, depth + 1)) return false;
    }
    begin("", depth);
    return say("}");
  }

  const JsonSpelling& spelling_;
  size_t most_;
  std::string* out_;
};

void append_escape(uint32_t code, std::string* out) {
  constexpr char kDigits[] = "0123456789abcdef";
  *out += "\\u";
  for (int shift = 12; shift >= 0; shift -= 4) out->push_back(kDigits[code >> shift & 15]);
}

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& member : members)
    if (member.first == name) return &member.second;
  return nullptr;
}

std::string parse_json(std::string_view text, Json* value) {
  if (valid_utf8(text) != text.size()) return "is not UTF-8, at byte " + std::to_string(valid_utf8(text));
  return Reader(text).read(value);
}

bool write_json(const Json& value, const JsonSpelling& spelling, size_t most, std::string* out) {
  return Writer(spelling, most, out).write(value, 0);
}

std::string escaped_json(std::string_view text, bool ascii) {
  std::string found;
  for (size_t at = 0; at < text.size();) {
    const size_t from = at;
    const uint32_t code = next_code(text, &at);
    const size_t place = code < 128 ? std::string_view("\"\\\b\f\n\r\t").find(static_cast<char>(code)) : std::string_view::npos;
    if (place != std::string_view::npos) {
      found += '\\';
      found += "\"\\bfnrt"[place];
    } else if (code < 32 || (ascii && code > 126 && code < 0x10000)) {
      append_escape(code, &found);
    } else if (ascii && code >= 0x10000) {
      append_escape(0xD800 + ((code - 0x10000) >> 10), &found);
      append_escape(0xDC00 + ((code - 0x10000) & 0x3FF), &found);
    } else {
      found += text.substr(from, at - from);
    }
  }
  return found;
}

std::string python_float(double value) {
  const std::string sign = std::signbit(value) ? "-" : "";
  if (value == 0) return sign + "0.0";
  Decimal found = shortest(std::fabs(value));
  std::string& digits = found.digits;
  digits.erase(std::max<size_t>(digits.find_last_not_of('0') + 1, 1));
  const int point = found.exponent + 1;  // where the decimal point stands in the digits
  const auto count = static_cast<int>(digits.size());
  if (point > 16 || point <= -4) {
    const int exponent = std::abs(found.exponent);
    const std::string tail = (found.exponent < 0 ? "e-" : "e+") + std::string(exponent < 10 ? "0" : "") + std::to_string(exponent);
    return sign + digits.substr(0, 1) + (count > 1 ? "." + digits.substr(1) : "") + tail;
  }
  if (point <= 0) return sign + "0." + std::string(static_cast<size_t>(-point), '0') + digits;
  if (point >= count) return sign + digits + std::string(static_cast<size_t>(point - count), '0') + ".0";
  return sign + digits.substr(0, static_cast<size_t>(point)) + "." + digits.substr(static_cast<size_t>(point));
}
