#include "chat_form.h"

#include <cstdint>

#include "table_reader.h"
#include "utf8.h"

namespace {

// White space as Python's str.strip() knows it.
bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

std::string_view trimmed(std::string_view text, ChatForm::Trim trim) {
  if (trim == ChatForm::kNewlines) {
    const size_t at = text.find_first_not_of('\n');
    return at == std::string_view::npos ? std::string_view() : text.substr(at);
  }
  if (trim != ChatForm::kBoth) return text;
  size_t begin = text.size(), end = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t from = at;
    if (is_space(next_code(text, &at))) continue;
    if (begin == text.size()) begin = from;
    end = at;
  }
  return begin < end ? text.substr(begin, end - begin) : std::string_view();
}

}  // namespace

bool ChatForm::read(TableReader& part) {
  if (part.number<uint32_t>() != 1) return false;
  has_system = part.number<int32_t>() != 0;
  for (Trim& trim : trims) {
    const auto value = part.number<int32_t>();
    if (value < kNone || value > kNewlines) return false;
    trim = static_cast<Trim>(value);
  }
  const auto count = part.number<uint32_t>();
  if (count < 8) return false;
  for (std::string* text : {&begin, &before_system, &after_system, &before[0], &after[0], &before[1], &after[1], &answer})
    *text = part.string();
  for (uint32_t i = 8; i < count && part.ok(); ++i) unless_contains.push_back(part.string());
  return part.ok();
}

std::string ChatForm::render(const std::vector<ChatMessage>& messages, std::vector<ChatPart>* parts) const {
  const auto place = [](size_t index) { return "messages[" + std::to_string(index) + "]: "; };
  const auto say = [&](std::string_view text, bool content) { parts->push_back({std::string(text), content}); };
  if (messages.empty()) return "there are no messages";
  size_t index = 0;
  for (const ChatMessage& message : messages) {
    for (const std::string& text : unless_contains)
      if (message.content.find(text) != std::string_view::npos)
        return place(index) + "the chat template renders " + text + " differently; leave it out";
    ++index;
  }
  index = 0;
  if (messages[0].role == "system" && messages[0].content.empty()) {  // none
    say(begin, false);
    index = 1;
  } else if (messages[0].role == "system") {
    if (!has_system) return place(0) + "the model has no system prompt";
    say(before_system, false);
    say(trimmed(messages[0].content, trims[0]), true);
    say(after_system, false);
    index = 1;
  } else {
    say(begin, false);
  }
  if (index == messages.size()) return "there is no message of the user";
  for (size_t first = index; index < messages.size(); ++index) {
    const size_t turn = (index - first) % 2;
    if (messages[index].role != (turn == 0 ? "user" : "assistant"))
      return place(index) + "messages of user and assistant must alternate, the user's first; a system prompt comes before them";
    say(before[turn], false);
    say(trimmed(messages[index].content, trims[1 + turn]), true);
    say(after[turn], false);
  }
  if (messages.back().role != "user") return place(messages.size() - 1) + "the last message must be the user's";
  say(answer, false);
  return "";
}
