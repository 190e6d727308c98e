// JSON that a model wrote, as Python's json.loads reads it: where values end, and what their strings say.
#ifndef MOEC_JSON_SCAN_H_
#define MOEC_JSON_SCAN_H_

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>

// A value of a text: what it begins with says its kind.
struct JsonValue {
  std::string_view text;
  bool is_object() const { return text[0] == '{'; }
  bool is_array() const { return text[0] == '['; }
  bool is_string() const { return text[0] == '"'; }
};

// The value that begins at `at`, with no white space before it; nothing where there is none, or one nested too deeply.
std::optional<JsonValue> json_value(std::string_view text, size_t at);
// The value that is all of a text but white space around it.
std::optional<JsonValue> json_whole(std::string_view text);
// The members of an object by their names, the last of equal ones. The value has been scanned.
std::map<std::string, JsonValue> json_members(const JsonValue& object);
// The text of a string; half a surrogate pair becomes U+FFFD.
std::string json_string(const JsonValue& value);
// Calls `each(value)` for every item of an array, until it returns false; whether it never did.
template <typename Each>
bool json_items(const JsonValue& array, Each each);
// A text as a JSON string.
std::string json_quoted(std::string_view text);

size_t json_skip_space(std::string_view text, size_t at);

template <typename Each>
bool json_items(const JsonValue& array, Each each) {
  for (size_t at = json_skip_space(array.text, 1); array.text[at] != ']';) {
    const JsonValue item = *json_value(array.text, at);
    if (!each(item)) return false;
    at = json_skip_space(array.text, at + item.text.size());
    if (array.text[at] == ',') at = json_skip_space(array.text, at + 1);
  }
  return true;
}

#endif  // MOEC_JSON_SCAN_H_
