#include "tool_form.h"

#include <algorithm>
#include <set>

#include "fault.h"
#include "table_reader.h"
#include "utf8.h"

namespace {

constexpr size_t kMostBytes = size_t{1} << 20;     // of the JSON of tools, or of one call's arguments
constexpr size_t kMostWritten = size_t{16} << 20;  // of one value as a template writes it
constexpr size_t kMostInAll = size_t{256} << 20;   // of a conversation
constexpr size_t kMostTools = 1000, kLongestName = 128;

bool is_name(std::string_view text) {
  const auto fits = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
  };
  return !text.empty() && text.size() <= kLongestName && std::all_of(text.begin(), text.end(), fits);
}

Json parsed(std::string_view text, const std::string& place) {
  if (text.size() > kMostBytes) throw Fault(place + ": more than 1 MB");
  Json found;
  const std::string fault = parse_json(text, &found);
  if (!fault.empty()) throw Fault(place + ": " + fault);
  return found;
}

std::string json_text(const Json& value, const JsonSpelling& spelling, const std::string& place) {
  std::string found;
  if (!write_json(value, spelling, kMostWritten, &found)) throw Fault(place + ": more than 16 MB as the chat template writes it");
  return found;
}

Json word(std::string_view text) {
  Json found;
  found.kind = Json::kText;
  found.text = text;
  return found;
}

}  // namespace

std::vector<Json> tool_definitions(std::string_view text) {
  Json given = parsed(text, "tools");
  if (given.kind != Json::kList) throw Fault("tools: is no list");
  if (given.items.size() > kMostTools) throw Fault("tools: more than 1000 of them");
  std::vector<Json> found;
  std::set<std::string> names;
  for (Json& tool : given.items) {
    const std::string place = "tools[" + std::to_string(found.size()) + "]";
    Json* function = nullptr;
    const Json* type = tool.find("type");
    for (auto& member : tool.members)
      if (member.first == "function" && member.second.kind == Json::kObject) function = &member.second;
    if (!function || !type || type->kind != Json::kText || type->text != "function")
      throw Fault(place + R"(: is no function; write {"type": "function", "function": {"name": ...}})");
    const Json *name = function->find("name"), *parameters = function->find("parameters");
    if (!name || name->kind != Json::kText || !is_name(name->text))
      throw Fault(place + ".function.name: no name of a function; use up to 128 letters, digits, _, - and .");
    if (!names.insert(name->text).second) throw Fault(place + ".function.name: a second tool " + name->text);
    if (parameters && parameters->kind != Json::kObject) throw Fault(place + ".function.parameters: is no object");
    Json definition;
    definition.kind = Json::kObject;
    definition.members.emplace_back("type", word("function"));
    definition.members.emplace_back("function", std::move(*function));
    found.push_back(std::move(definition));
  }
  return found;
}

// -------------------------------------------------------------------------------------------------------------- reading

bool ToolForm::Pattern::has(Part part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

bool ToolForm::read_pattern(TableReader& part, Pattern* pattern) {
  pattern->parts = part.numbers<int32_t>(part.number<uint32_t>());
  for (const int32_t kind : pattern->parts)
    if (kind < 0 || kind >= kParts) return false;
  for (size_t i = 1; i < pattern->parts.size() && part.ok(); ++i) pattern->texts.push_back(part.string());
  return part.ok() && !pattern->parts.empty();
}

JsonSpelling ToolForm::read_spelling(TableReader& part) {
  JsonSpelling found;
  found.ascii = part.number<int32_t>() != 0;
  found.indent = part.number<int32_t>();
  found.sorted = part.number<int32_t>() != 0;
  found.item = part.string();
  found.key = part.string();
  return found;
}

bool ToolForm::read(TableReader& part) {
  if (part.number<uint32_t>() != 1) return false;
  missing_ = part.string();
  if (!missing_.empty()) return part.ok();
  for (bool* flag : {&tools_first_, &said_last_, &one_call_}) *flag = part.number<int32_t>() != 0;
  says_ = part.number<int32_t>();
  if (says_ < 0 || says_ >= kSays) return false;
  for (int32_t& way : ways_) {
    way = part.number<int32_t>();
    if (way < 0 || way >= kWays) return false;
  }
  if (!read_pattern(part, &tool_) || !read_pattern(part, &call_)) return false;
  tool_spelling_ = read_spelling(part);
  call_spelling_ = read_spelling(part);
  constexpr int32_t kMostIndent = 16;
  for (const JsonSpelling* spelling : {&tool_spelling_, &call_spelling_})
    if (spelling->indent < 0 || spelling->indent > kMostIndent) return false;
  const auto texts = part.number<uint32_t>();
  for (uint32_t i = 0; i < texts && part.ok(); ++i) {
    const auto from = part.number<int32_t>(), to = part.number<int32_t>();
    if (from < 0 || from >= kKinds || to < 0 || to >= kKinds) return false;
    between_[{from, to}] = part.string();
  }
  const auto count = part.number<uint32_t>();
  for (uint32_t i = 0; i < count && part.ok(); ++i) unless_contains_.push_back(part.string());
  return part.ok();
}

// -------------------------------------------------------------------------------------------------------------- writing

class ToolForm::Writer {
 public:
  Writer(const ToolForm& form, std::vector<ChatPart>* parts) : form_(form), parts_(parts) {}

  // What stands before an item of this kind.
  void begin(Kind kind, const std::string& place) {
    const auto found = form_.between_.find({last_, kind});
    if (found == form_.between_.end()) throw Fault(place + ": the chat template has no place for it, where tools are given");
    say(found->second, false);
    last_ = kind;
  }
  void content(Kind kind, std::string_view text, const std::string& place) {
    for (const std::string& marker : form_.unless_contains_)
      if (text.find(marker) != std::string_view::npos)
        throw Fault(place + ": the chat template renders " + marker + " differently; leave it out");
    begin(kind, place);
    const int32_t way = form_.ways_[kind];
    std::string shown(text);
    if (way == kStripped) shown = stripped_text(text);
    if (way == kWithoutNewlines) shown = text.substr(std::min(text.find_first_not_of('\n'), text.size()));
    if (way == kEscaped || way == kEscapedAscii) shown = escaped_json(text, way == kEscapedAscii);
    say(shown, true);
  }
  void item(Kind kind, const Pattern& pattern, const Texts& texts, const std::string& place) {
    begin(kind, place);
    for (size_t i = 0; i < pattern.parts.size(); ++i) {
      if (i > 0) say(pattern.texts[i - 1], false);
      say(texts[static_cast<size_t>(pattern.parts[i])], true);
    }
  }

 private:
  void say(const std::string& text, bool content) {
    bytes_ += text.size() + 1;
    if (bytes_ > kMostInAll) throw Fault("turns: more than 256 MB as the chat template writes them");
    parts_->push_back({text, content});
  }

  const ToolForm& form_;
  std::vector<ChatPart>* parts_;
  int32_t last_ = kStart;
  size_t bytes_ = 0;
};

void ToolForm::write_tools(const std::vector<Json>& tools, Writer* writer) const {
  for (size_t i = 0; i < tools.size(); ++i) {
    const std::string place = "tools[" + std::to_string(i) + "]";
    const Json& function = *tools[i].find("function");
    const Json *parameters = function.find("parameters"), *description = function.find("description");
    if (tool_.has(kDescription) && (!description || description->kind != Json::kText))
      throw Fault(place + ".function.description: the model's chat template needs one");
    if (tool_.has(kParameters) && !parameters) throw Fault(place + ".function.parameters: the model's chat template needs them");
    Texts texts;
    texts[kName] = function.find("name")->text;
    if (tool_.has(kDescription)) texts[kDescription] = description->text;
    if (tool_.has(kWhole)) texts[kWhole] = json_text(tools[i], tool_spelling_, place);
    if (tool_.has(kFunction)) texts[kFunction] = json_text(function, tool_spelling_, place);
    if (tool_.has(kParameters)) texts[kParameters] = json_text(*parameters, tool_spelling_, place);
    writer->item(kTool, tool_, texts, place);
  }
}

bool ToolForm::says(std::string_view content) const {
  if (says_ == kNotBlank) content = stripped_text(content);
  return says_ != kNever && !content.empty();
}

void ToolForm::write_calls(const ChatTurn& turn, const std::string& place, Writer* writer) const {
  if (one_call_ && turn.calls.size() > 1) throw Fault(place + ".calls: the model's chat template takes one call in a turn");
  if (says(turn.content) && !said_last_) writer->content(kSaid, turn.content, place);
  for (size_t i = 0; i < turn.calls.size(); ++i) {
    const std::string here = place + ".calls[" + std::to_string(i) + "]";
    const ChatCall& call = turn.calls[i];
    if (!is_name(call.name)) throw Fault(here + ".name: no name of a function; use up to 128 letters, digits, _, - and .");
    const Json arguments = parsed(call.arguments.empty() ? "{}" : call.arguments, here + ".arguments");
    if (arguments.kind != Json::kObject) throw Fault(here + ".arguments: is no object");
    Texts texts;
    texts[kName] = call.name;
    texts[kArguments] = json_text(arguments, call_spelling_, here + ".arguments");
    writer->item(kCall, call_, texts, here);
  }
  if (says(turn.content) && said_last_) writer->content(kSaid, turn.content, place);
}

std::vector<ChatPart> ToolForm::render(const std::vector<Json>& tools, const std::vector<ChatTurn>& turns) const {
  std::vector<ChatPart> parts;
  Writer writer(*this, &parts);
  const auto place = [](size_t index) { return "turns[" + std::to_string(index) + "]"; };
  const bool system = !turns.empty() && turns[0].role == "system";
  if (tools_first_) write_tools(tools, &writer);
  if (system && !turns[0].content.empty()) writer.content(kSystem, turns[0].content, place(0));
  if (!tools_first_) write_tools(tools, &writer);
  enum { kAsked, kCalled, kTold, kAnswered } last = kAnswered;
  for (size_t i = system ? 1 : 0; i < turns.size(); ++i) {
    const ChatTurn& turn = turns[i];
    const bool asks = turn.role == "user", tells = turn.role == "tool", answers = turn.role == "assistant";
    if (!turn.calls.empty() && !answers) throw Fault(place(i) + ".calls: only a turn of the assistant has calls");
    if (asks && last == kAnswered) {
      writer.content(kUser, turn.content, place(i));
      last = kAsked;
    } else if (tells && (last == kCalled || last == kTold)) {
      writer.content(kResult, turn.content, place(i));
      last = kTold;
    } else if (answers && (last == kAsked || last == kTold) && turn.calls.empty()) {
      writer.content(kReply, turn.content, place(i));
      last = kAnswered;
    } else if (answers && (last == kAsked || last == kTold)) {
      write_calls(turn, place(i), &writer);
      last = kCalled;
    } else {
      throw Fault(place(i) + ": after a system prompt or none, questions of the user and answers of the assistant alternate; "
                             "turns of tools follow calls, and an answer or more calls follow them");
    }
  }
  if (turns.empty() || last == kAnswered || last == kCalled) throw Fault("turns: the last must be the user's or a tool's");
  writer.begin(kEnd, "turns");
  return parts;
}
