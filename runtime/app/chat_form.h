// A chat template as prefixes and suffixes by role, which assistant/role_form.py has compared with the template.
#ifndef MOEC_CHAT_FORM_H_
#define MOEC_CHAT_FORM_H_

#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

class TableReader;

struct ChatMessage {
  std::string_view role, content;
};

// A rendered part: what the template writes, or a content, in which special tokens are text.
struct ChatPart {
  std::string text;
  bool content;
};

struct ChatForm {
  bool has_system = false;
  enum Trim : int32_t { kNone, kBoth, kNewlines };
  std::array<Trim, 3> trims{};  // of system, user, assistant
  std::string begin, before_system, after_system;
  std::array<std::string, 2> before, after;  // user, assistant
  std::string answer;
  std::vector<std::string> unless_contains;

  bool read(TableReader& part);
  // The conversation up to where the answer begins; "" or what is wrong with it.
  std::string render(const std::vector<ChatMessage>& messages, std::vector<ChatPart>* parts) const;
};

#endif  // MOEC_CHAT_FORM_H_
