// The few forms of JSON that the runner prints.
#ifndef MOEC_JSON_TEXT_H_
#define MOEC_JSON_TEXT_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", c);
      out += code;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

inline std::string list(const std::vector<double>& values) {
  std::string out = "[";
  for (const double v : values) {
    char text[32];
    std::snprintf(text, sizeof text, "%s%.6g", out.size() > 1 ? ", " : "", v);
    out += text;
  }
  return out + "]";
}

inline std::string list(const std::vector<int64_t>& values) {
  std::string out = "[";
  for (const int64_t v : values) out += (out.size() > 1 ? ", " : "") + std::to_string(v);
  return out + "]";
}

#endif  // MOEC_JSON_TEXT_H_
