// How models write calls of tools, by family, as assistant/tool_formats.py reads them.
#ifndef MOEC_TOOL_CALLS_H_
#define MOEC_TOOL_CALLS_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

struct ToolCall {
  std::string name, arguments;  // arguments: JSON of an object
};

// begin, end: what stands around calls; no end: all that follows. opens: calls also begin with it, first in an answer.
struct ToolFormat {
  std::string_view begin, end, opens;
  std::optional<std::vector<ToolCall>> (*parse)(std::string_view text);  // nothing where it is no call
};

// The formats in the order of assistant/tool_formats.py's FORMATS; nullptr for an index outside.
const ToolFormat* tool_format(int index);
// A call of a name with the text of its arguments, as GPT-OSS writes them.
std::optional<ToolCall> named_call(std::string_view name, std::string_view arguments);

#endif  // MOEC_TOOL_CALLS_H_
