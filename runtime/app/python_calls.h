// Calls of tools in Python's syntax, as LFM2 writes them: [name(key="text", other=3), another()].
#ifndef MOEC_PYTHON_CALLS_H_
#define MOEC_PYTHON_CALLS_H_

#include <optional>
#include <string_view>
#include <vector>

#include "tool_calls.h"

// The calls that a text in UTF-8 consists of, their arguments as json.dumps writes them; nothing where it is anything else.
// assistant/python_calls.py says what a call is.
std::optional<std::vector<ToolCall>> python_calls(std::string_view text);

#endif  // MOEC_PYTHON_CALLS_H_
