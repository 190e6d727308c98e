#include "chat_form.h"

#include <cstdint>

#include "table_reader.h"
#include "utf8.h"

namespace {

std::string_view trimmed(std::string_view text, ChatForm::Trim trim) {
  if (trim == ChatForm::kNewlines) {
    const size_t at = text.find_first_not_of('\n');
    return at == std::string_view::npos ? std::string_view() : text.substr(at);
  }
  return trim == ChatForm::kBoth ? stripped_text(text) : text;
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
