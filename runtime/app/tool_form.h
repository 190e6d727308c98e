// Conversations with tools by a chat template of regular form, which assistant/tool_probes.py has compared with the template:
// items, and texts between them that depend on the kinds of the two (assistant/tool_form.py).
#ifndef MOEC_TOOL_FORM_H_
#define MOEC_TOOL_FORM_H_

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chat_form.h"
#include "json_tree.h"

class TableReader;

struct ChatCall {
  std::string_view name, arguments;
};

struct ChatTurn {
  std::string_view role, content;
  std::vector<ChatCall> calls;
};

// Definitions of tools in OpenAI's form, as {"type": "function", "function": {...}}: a Fault for a text that is something else.
std::vector<Json> tool_definitions(std::string_view text);

class ToolForm {
 public:
  bool read(TableReader& part);
  // Why the template has no such form; empty if it has one.
  const std::string& missing() const { return missing_; }
  // The conversation up to where the answer begins, with one tool or more. Contents are UTF-8. A Fault for what is no conversation.
  std::vector<ChatPart> render(const std::vector<Json>& tools, const std::vector<ChatTurn>& turns) const;

 private:
  enum Kind : int32_t { kStart, kSystem, kTool, kUser, kReply, kSaid, kCall, kResult, kEnd, kKinds };
  enum Part : int32_t { kWhole, kFunction, kParameters, kDescription, kName, kArguments, kParts };
  enum Way : int32_t { kAsItIs, kStripped, kWithoutNewlines, kEscaped, kEscapedAscii, kWays };
  enum Says : int32_t { kNever, kNotEmpty, kNotBlank, kSays };
  using Texts = std::array<std::string, kParts>;

  struct Pattern {
    std::vector<int32_t> parts;
    std::vector<std::string> texts;  // between them
    bool has(Part part) const;
  };
  class Writer;

  static bool read_pattern(TableReader& part, Pattern* pattern);
  static JsonSpelling read_spelling(TableReader& part);
  void write_tools(const std::vector<Json>& tools, Writer* writer) const;
  void write_calls(const ChatTurn& turn, const std::string& place, Writer* writer) const;
  bool says(std::string_view content) const;

  std::string missing_;
  bool tools_first_ = false, said_last_ = false, one_call_ = false;
  int32_t says_ = kNever;
  std::array<int32_t, kKinds> ways_{};
  Pattern tool_, call_;
  JsonSpelling tool_spelling_, call_spelling_;
  std::map<std::pair<int32_t, int32_t>, std::string> between_;
  std::vector<std::string> unless_contains_;
};

#endif  // MOEC_TOOL_FORM_H_
