#include "json_scan.h"

#include <cstdint>
#include <cstdio>

#include "utf8.h"

namespace {

constexpr int kDeepest = 500;  // values inside each other
constexpr size_t kNone = std::string_view::npos;

bool is_digit(std::string_view text, size_t at) { return at < text.size() && text[at] >= '0' && text[at] <= '9'; }

size_t digits(std::string_view text, size_t at) {
  while (is_digit(text, at)) ++at;
  return at;
}

// Each function gives the place behind what begins at `at`, kNone if that is not there.
size_t string_end(std::string_view text, size_t at) {
  for (++at; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '"') return at + 1;
    if (static_cast<uint8_t>(c) < 32) return kNone;
    if (c != '\\') continue;
    if (++at == text.size()) return kNone;
    if (text[at] == 'u') {
      if (hex4(text, at + 1) < 0) return kNone;
      at += 4;
    } else if (std::string_view("\"\\/bfnrt").find(text[at]) == kNone) {
      return kNone;
    }
  }
  return kNone;
}

size_t number_end(std::string_view text, size_t at) {
  if (text.substr(at, 9) == "-Infinity") return at + 9;
  if (text[at] == '-') ++at;
  if (!is_digit(text, at)) return kNone;
  at = text[at] == '0' ? at + 1 : digits(text, at);
  if (at < text.size() && text[at] == '.' && is_digit(text, at + 1)) at = digits(text, at + 1);
  if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    const size_t from = at + 1 < text.size() && (text[at + 1] == '+' || text[at + 1] == '-') ? at + 2 : at + 1;
    if (is_digit(text, from)) at = digits(text, from);
  }
  return at;
}

size_t value_end(std::string_view text, size_t at, int depth) {
  if (at >= text.size() || depth > kDeepest) return kNone;
  const char first = text[at];
  if (first == '"') return string_end(text, at);
  for (const std::string_view word : {"true", "false", "null", "NaN", "Infinity"})
    if (text.substr(at, word.size()) == word) return at + word.size();
  if (first != '{' && first != '[') return number_end(text, at);
  const char last = first == '{' ? '}' : ']';
  at = json_skip_space(text, at + 1);
  if (at < text.size() && text[at] == last) return at + 1;
  for (;;) {
    if (first == '{') {
      if (at >= text.size() || text[at] != '"') return kNone;
      at = string_end(text, at);
      if (at == kNone) return kNone;
      at = json_skip_space(text, at);
      if (at >= text.size() || text[at] != ':') return kNone;
      at = json_skip_space(text, at + 1);
    }
    at = value_end(text, at, depth + 1);
    if (at == kNone) return kNone;
    at = json_skip_space(text, at);
    if (at >= text.size()) return kNone;
    if (text[at] == last) return at + 1;
    if (text[at] != ',') return kNone;
    at = json_skip_space(text, at + 1);
  }
}

}  // namespace

size_t json_skip_space(std::string_view text, size_t at) {
  while (at < text.size() && (text[at] == ' ' || text[at] == '\t' || text[at] == '\n' || text[at] == '\r')) ++at;
  return at;
}

std::optional<JsonValue> json_value(std::string_view text, size_t at) {
  const size_t end = value_end(text, at, 0);
  if (end == kNone) return std::nullopt;
  return JsonValue{text.substr(at, end - at)};
}

std::optional<JsonValue> json_whole(std::string_view text) {
  const auto found = json_value(text, json_skip_space(text, 0));
  if (!found) return std::nullopt;
  const auto end = static_cast<size_t>(found->text.data() - text.data()) + found->text.size();
  return json_skip_space(text, end) == text.size() ? found : std::nullopt;
}

std::map<std::string, JsonValue> json_members(const JsonValue& object) {
  std::map<std::string, JsonValue> found;
  const std::string_view text = object.text;
  for (size_t at = json_skip_space(text, 1); text[at] != '}';) {
    const JsonValue name = *json_value(text, at);
    at = json_skip_space(text, json_skip_space(text, at + name.text.size()) + 1);
    const JsonValue value = *json_value(text, at);
    found.insert_or_assign(json_string(name), value);
    at = json_skip_space(text, at + value.text.size());
    if (text[at] == ',') at = json_skip_space(text, at + 1);
  }
  return found;
}

std::string json_string(const JsonValue& value) {
  const std::string_view text = value.text;
  std::string found;
  for (size_t at = 1; at + 1 < text.size(); ++at) {
    if (text[at] != '\\') {
      found += text[at];
      continue;
    }
    const char c = text[++at];
    if (c != 'u') {
      const size_t place = std::string_view("bfnrt").find(c);
      found += place == kNone ? c : "\b\f\n\r\t"[place];
      continue;
    }
    auto code = static_cast<uint32_t>(hex4(text, at + 1));
    at += 4;
    if (code >= 0xD800 && code < 0xDC00 && text.substr(at + 1, 2) == "\\u") {
      const int32_t low = hex4(text, at + 3);
      if (low >= 0xDC00 && low < 0xE000) {
        code = 0x10000 + ((code - 0xD800) << 10) + (static_cast<uint32_t>(low) - 0xDC00);
        at += 6;
      }
    }
    append_code(code >= 0xD800 && code < 0xE000 ? 0xFFFD : code, &found);
  }
  return found;
}

std::string json_quoted(std::string_view text) {
  std::string found = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      found += '\\';
      found += c;
    } else if (static_cast<uint8_t>(c) < 32) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(static_cast<uint8_t>(c)));
      found += escaped;
    } else {
      found += c;
    }
  }
  return found + "\"";
}
