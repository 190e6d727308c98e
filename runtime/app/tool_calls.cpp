#include "tool_calls.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "json_scan.h"
#include "python_calls.h"
#include "utf8.h"

namespace {

using Calls = std::optional<std::vector<ToolCall>>;
constexpr size_t kNone = std::string_view::npos;

// A zero byte would end the name where an application reads it.
bool is_name(std::string_view name) { return !name.empty() && name.find('\0') == kNone; }

bool begins(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

// A call written as an object with a name and its arguments, by whichever key.
std::optional<ToolCall> call_of(JsonValue value) {
  if (!value.is_object()) return std::nullopt;
  auto members = json_members(value);
  const auto inner = members.find("function");
  if (inner != members.end() && inner->second.is_object()) members = json_members(JsonValue(inner->second));
  const auto name = members.find("name");
  auto given = members.find("arguments");
  if (given == members.end()) given = members.find("parameters");
  std::string arguments = given == members.end() ? "{}" : std::string(given->second.text);
  if (arguments[0] == '"') {  // some models write the text of an object
    const std::string text = json_string(given->second);
    const auto whole = json_whole(text);
    arguments = whole ? std::string(whole->text) : "";
  }
  if (name == members.end() || !name->second.is_string() || arguments.empty() || arguments[0] != '{') return std::nullopt;
  ToolCall call = {json_string(name->second), arguments};
  return is_name(call.name) ? std::make_optional(call) : std::nullopt;
}

// An object, a list of them, or several one behind the other, with white space, commas or semicolons between.
Calls json_calls(std::string_view text) {
  std::vector<ToolCall> found;
  const auto add = [&](const JsonValue& value) {
    const auto call = call_of(value);
    if (call) found.push_back(*call);
    return call.has_value();
  };
  for (size_t at = 0; at < text.size();) {
    if (std::string_view(" \t\r\n,;").find(text[at]) != kNone) {
      ++at;
      continue;
    }
    const auto value = json_value(text, at);
    if (!value) return std::nullopt;
    if (!(value->is_array() ? json_items(*value, add) : add(*value))) return std::nullopt;
    at += value->text.size();
  }
  return found.empty() ? std::nullopt : Calls(std::move(found));
}

// `<MARK=NAME>` at a place of a text: the name, and what begins behind it; nothing if it is not there.
struct Opening {
  std::string_view name;
  size_t behind;
};
std::optional<Opening> opening(std::string_view text, size_t at, std::string_view mark) {
  const size_t from = at + mark.size(), end = text.find_first_of(std::string_view(">\n\0", 3), from);
  if (end == kNone || text[end] != '>' || end == from) return std::nullopt;
  return Opening{text.substr(from, end - from), end + 1};
}

// Qwen3-Coder's form.
Calls function_calls(std::string_view text) {
  constexpr std::string_view kFunction = "<function=", kParameter = "<parameter=", kEnd = "</function>", kClose = "</parameter>";
  std::vector<ToolCall> found;
  for (size_t at = 0; (at = text.find(kFunction, at)) != kNone;) {
    const auto head = opening(text, at, kFunction);
    const size_t end = head ? text.find(kEnd, head->behind) : kNone;
    if (end == kNone) {
      ++at;
      continue;
    }
    const std::string_view body = text.substr(head->behind, end - head->behind);
    std::vector<std::pair<std::string_view, std::string>> values;
    for (size_t place = 0; (place = body.find(kParameter, place)) != kNone;) {
      const auto key = opening(body, place, kParameter);
      const size_t close = key ? body.find(kClose, key->behind) : kNone;
      if (close == kNone) {
        ++place;
        continue;
      }
      const size_t from = key->behind < close && body[key->behind] == '\n' ? key->behind + 1 : key->behind;
      const size_t to = from < close && body[close - 1] == '\n' ? close - 1 : close;
      const std::string_view value = body.substr(from, to - from);
      const auto whole = json_whole(value);  // JSON where it is some, else the text
      values.emplace_back(key->name, whole ? std::string(whole->text) : json_quoted(value));
      place = close + kClose.size();
    }
    std::string arguments;
    for (const auto& [key, value] : values) arguments += (arguments.empty() ? "" : ", ") + json_quoted(key) + ": " + value;
    found.push_back({std::string(head->name), "{" + arguments + "}"});
    at = end + kEnd.size();
  }
  return found.empty() ? std::nullopt : Calls(std::move(found));
}

Calls hermes(std::string_view text) { return text.find("<function=") == kNone ? json_calls(text) : function_calls(text); }

// A list of calls, or `name[ARGS]{...}` for each, with the marker between them.
Calls mistral(std::string_view text) {
  constexpr std::string_view kMark = "[TOOL_CALLS]", kArguments = "[ARGS]";
  const std::string_view stripped = stripped_text(text);
  if (begins(stripped, "[") || begins(stripped, "{")) return json_calls(text);
  std::vector<ToolCall> found;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(kMark, at), text.size());
    const std::string_view part = text.substr(at, end - at);
    const size_t marked = part.find(kArguments), brace = std::min(part.find('{'), part.size());
    const std::string_view name = part.substr(0, marked == kNone ? brace : marked);
    const std::string_view arguments = part.substr(marked == kNone ? brace : marked + kArguments.size());
    const auto call = named_call(stripped_text(name.substr(0, name.find("[CALL_ID]"))), stripped_text(arguments));
    if (!call) return std::nullopt;
    found.push_back(*call);
    at = end + kMark.size();
  }
  return found;
}

Calls deepseek(std::string_view text) {
  constexpr std::string_view kBegin = "<｜tool▁call▁begin｜>", kSeparator = "<｜tool▁sep｜>", kEnd = "<｜tool▁call▁end｜>";
  constexpr std::string_view kOld = "function<｜tool▁sep｜>", kBlock = "\n```json\n";
  const std::string close = "\n```" + std::string(kEnd);
  std::vector<ToolCall> found;
  text = stripped_text(text);
  while (!text.empty()) {
    if (!begins(text, kBegin)) return std::nullopt;
    text.remove_prefix(kBegin.size());
    std::string_view name, arguments;
    size_t behind = kNone;
    if (begins(text, kOld)) {
      const size_t line = text.find('\n', kOld.size());
      if (line != kNone && line > kOld.size() && begins(text.substr(line), kBlock)) {
        const size_t from = line + kBlock.size(), end = text.find(close, from);
        if (end != kNone) {
          name = text.substr(kOld.size(), line - kOld.size());
          arguments = text.substr(from, end - from);
          behind = end + close.size();
        }
      }
    }
    if (behind == kNone) {
      const size_t end_of_name = text.find_first_of("<\n");
      if (end_of_name == kNone || end_of_name == 0 || !begins(text.substr(end_of_name), kSeparator)) return std::nullopt;
      const size_t from = end_of_name + kSeparator.size(), end = text.find(kEnd, from);
      if (end == kNone) return std::nullopt;
      name = text.substr(0, end_of_name);
      arguments = text.substr(from, end - from);
      behind = end + kEnd.size();
    }
    const auto call = named_call(stripped_text(name), arguments);
    if (!call) return std::nullopt;
    found.push_back(*call);
    text = stripped_text(text.substr(behind));
  }
  return found.empty() ? std::nullopt : Calls(std::move(found));
}

// As Python writes them, or as JSON, which a system prompt may ask for.
Calls lfm2(std::string_view text) {
  auto found = python_calls(text);
  return found ? found : json_calls(text);
}

constexpr std::array<ToolFormat, 6> kFormats = {{
    {"<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "", deepseek},
    {"[TOOL_CALLS]", "", "", mistral},
    {"<|tool_call|>", "", "", json_calls},
    {"<tool_call>", "</tool_call>", "", hermes},
    {"<|python_tag|>", "", "{", json_calls},
    {"<|tool_call_start|>", "<|tool_call_end|>", "", lfm2},
}};

}  // namespace

const ToolFormat* tool_format(int index) {
  return index < 0 || static_cast<size_t>(index) >= kFormats.size() ? nullptr : &kFormats[static_cast<size_t>(index)];
}

std::optional<ToolCall> named_call(std::string_view name, std::string_view arguments) {
  const auto whole = json_whole(arguments);
  if (!is_name(name) || !whole || !whole->is_object()) return std::nullopt;
  return ToolCall{std::string(name), std::string(whole->text)};
}
