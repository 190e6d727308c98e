// UTF-8: checking it, reading code points, and bytes that come in pieces as whole characters.
#ifndef MOEC_UTF8_H_
#define MOEC_UTF8_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

// The length of the character at the beginning of `text`; 0 if `text` ends within it; -n if the first n bytes are not UTF-8 and
// one U+FFFD stands for them (n is the length of the longest valid beginning of a character, at least 1).
inline int character_at(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return -1;
  const int length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  uint8_t low = 0x80, high = 0xBF;
  if (first == 0xE0) low = 0xA0;
  if (first == 0xED) high = 0x9F;
  if (first == 0xF0) low = 0x90;
  if (first == 0xF4) high = 0x8F;
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) >= text.size()) return 0;
    if (byte(static_cast<size_t>(i)) < low || byte(static_cast<size_t>(i)) > high) return -i;
    low = 0x80;
    high = 0xBF;
  }
  return length;
}

// The offset of the first byte that is not UTF-8; text.size() if there is none.
inline size_t valid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const int length = character_at(text.substr(at));
    if (length <= 0) return at;
    at += static_cast<size_t>(length);
  }
  return at;
}

// The code point at `*at` of a valid text; *at becomes the offset behind it.
inline uint32_t next_code(std::string_view text, size_t* at) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[*at + i])); };
  const uint32_t first = byte(0);
  const size_t length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  uint32_t code = length == 1 ? first : first & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) code = code << 6 | (byte(i) & 0x3F);
  *at += length;
  return code;
}

// How many bytes a code point takes.
inline uint32_t code_size(uint32_t code) { return code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4; }

inline void append_code(uint32_t code, std::string* text) {
  const auto put = [&](uint32_t byte) { text->push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else {
    if (code < 0x10000) {
      put(0xE0 | code >> 12);
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
    }
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

// The value of a hexadecimal digit, -1 for another character.
inline int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The four hexadecimal digits at `at`, -1 if they are not there.
inline int32_t hex4(std::string_view text, size_t at) {
  if (at + 4 > text.size()) return -1;
  int32_t value = 0;
  for (size_t i = 0; i < 4; ++i) {
    const int digit = hex_digit(text[at + i]);
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

// White space as Unicode has it.
inline bool is_white(uint32_t code) {
  return (code >= 9 && code <= 13) || code == ' ' || code == 0x85 || code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) ||
         code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

// White space as Python's str.strip() knows it.
inline bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// A valid text without the white space at its beginning; at both ends.
inline std::string_view stripped_left(std::string_view text) {
  size_t begin = 0;
  for (size_t at = 0; at < text.size() && is_space(next_code(text, &at));) begin = at;
  return text.substr(begin);
}
inline std::string_view stripped_text(std::string_view text) {
  text = stripped_left(text);
  size_t end = text.size();
  while (end > 0) {
    size_t last = end - 1;
    while (last > 0 && (static_cast<uint8_t>(text[last]) & 0xC0) == 0x80) --last;
    size_t at = last;
    if (!is_space(next_code(text, &at))) break;
    end = last;
  }
  return text.substr(0, end);
}

// Whole characters from bytes that come in pieces; bytes that are not UTF-8 become U+FFFD.
class Characters {
 public:
  std::string push(std::string_view bytes) {
    held_ += bytes;
    std::string found;
    size_t at = 0;
    while (at < held_.size()) {
      const int length = character_at(std::string_view(held_).substr(at));
      if (length == 0) break;
      if (length > 0) found.append(held_, at, static_cast<size_t>(length));
      if (length < 0) found += "\xEF\xBF\xBD";
      at += static_cast<size_t>(length > 0 ? length : -length);
    }
    held_.erase(0, at);
    return found;
  }
  std::string finish() {
    const bool cut = !held_.empty();
    held_.clear();
    return cut ? "\xEF\xBF\xBD" : "";
  }

 private:
  std::string held_;
};

#endif  // MOEC_UTF8_H_
