// JSON that an application gives, as a tree, and written as Python's json.dumps writes what json.loads read: keys in their order,
// the last of equal ones in the place of the first, numbers as Python spells them.
#ifndef MOEC_JSON_TREE_H_
#define MOEC_JSON_TREE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct Json {
  enum Kind { kWord, kText, kList, kObject };  // kWord: a number, true, false or null
  Kind kind = kWord;
  std::string text;  // of a word as Python writes it; of a text in UTF-8
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  const Json* find(std::string_view name) const;  // a member of an object, nullptr if it has none of this name
};

// How json.dumps is told to write; assistant/json_spelling.py has the same.
struct JsonSpelling {
  bool ascii = false, sorted = false;
  int32_t indent = 0;  // spaces, 0: one line
  std::string item = ", ", key = ": ";
};

// Reads a text that is a value and nothing else; "" or what is wrong with it. Refused are NaN and Infinity, numbers beyond a
// double's range or of more than 4300 characters, half a surrogate pair, and values more than 100 deep.
std::string parse_json(std::string_view text, Json* value);
// Appends a value; false where `out` would have more than `most` bytes.
bool write_json(const Json& value, const JsonSpelling& spelling, size_t most, std::string* out);
// The inside of a text as a JSON string.
std::string escaped_json(std::string_view text, bool ascii);
// A double as Python's repr writes it.
std::string python_float(double value);

#endif  // MOEC_JSON_TREE_H_
