// The C API of moec.h: text and ids, conversations, and answers that are taken apart.
#include <algorithm>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "api.h"

namespace {

// Turns of a conversation as an application gave them, checked.
class GivenTurns {
 public:
  std::string tools;
  std::vector<ChatTurn> turns;  // of texts that are kept here

  GivenTurns(const char* definitions, const moec_app_turn* given, int64_t count) {
    if (count < 1 || count > kMostMessages || !given) throw Fault("turns: NULL, or not 1 to 10000 of them");
    if (definitions) tools = text_of(definitions, -1, "tools");
    if (definitions && tools.empty()) throw Fault("tools: is not JSON, at byte 0");
    for (int64_t i = 0; i < count; ++i) add(given[i], "turns[" + std::to_string(i) + "]");
  }

  // Places of the questions.
  std::vector<size_t> questions() const {
    std::vector<size_t> found;
    for (size_t i = 0; i < turns.size(); ++i)
      if (turns[i].role == "user") found.push_back(i);
    return found;
  }

  // Without the turns from one place on to another.
  std::vector<ChatTurn> without(size_t begin, size_t end) const {
    std::vector<ChatTurn> left(turns.begin(), turns.begin() + static_cast<std::ptrdiff_t>(begin));
    left.insert(left.end(), turns.begin() + static_cast<std::ptrdiff_t>(end), turns.end());
    return left;
  }

 private:
  void add(const moec_app_turn& turn, const std::string& name) {
    check_size(&turn, name.c_str());
    if (turn.call_count < 0 || turn.call_count > kMostCalls || (turn.call_count > 0 && !turn.calls))
      throw Fault(name + ".calls: NULL, or not 0 to 1000 of them");
    turns.push_back({kept(turn.role, name + ".role"), "", {}});
    if (turn.content || turn.call_count == 0) turns.back().content = kept(turn.content, name + ".content");
    for (int64_t i = 0; i < turn.call_count; ++i) {
      const std::string call = name + ".calls[" + std::to_string(i) + "]";
      const char* arguments = turn.calls[i].arguments;
      turns.back().calls.push_back({kept(turn.calls[i].name, call + ".name"), kept(arguments ? arguments : "", call + ".arguments")});
    }
  }
  std::string_view kept(const char* text, const std::string& name) {
    texts_.push_back(text_of(text, -1, name.c_str()));
    if (valid_utf8(texts_.back()) != texts_.back().size()) throw Fault(name + ": is not UTF-8");
    return texts_.back();
  }

  std::deque<std::string> texts_;  // where they lie does not change
};

}  // namespace

int64_t moec_app_tokenize(int64_t artifact, const char* text, int64_t bytes, int32_t flags, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (flags & ~(MOEC_APP_PLAIN | MOEC_APP_AS_TEXT)) throw Fault("flags: unknown ones");
    return written(found->tokenize(text_of(text, bytes, "text"), flags), ids, capacity);
  });
}

int64_t moec_app_detokenize(int64_t artifact, const int32_t* ids, int64_t count, int32_t flags, char* text, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (flags & ~MOEC_APP_SPECIAL) throw Fault("flags: unknown ones");
    return written(found->detokenize(ids_of(ids, count), flags & MOEC_APP_SPECIAL), text, capacity);
  });
}

int64_t moec_app_chat(int64_t artifact, const moec_app_message* messages, int64_t count, int32_t* ids, int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (count < 1 || count > kMostMessages || !messages) throw Fault("messages: NULL, or not 1 to 10000 of them");
    std::vector<std::string> texts;
    for (int64_t i = 0; i < count; ++i) {
      const std::string name = "messages[" + std::to_string(i) + "]";
      texts.push_back(text_of(messages[i].role, -1, (name + ".role").c_str()));
      texts.push_back(text_of(messages[i].content, -1, (name + ".content").c_str()));
      if (valid_utf8(texts.back()) != texts.back().size()) throw Fault(name + ".content: is not UTF-8");
    }
    std::vector<ChatMessage> given;
    for (size_t i = 0; i < texts.size(); i += 2) given.push_back({texts[i], texts[i + 1]});
    return written(found->chat(given), ids, capacity);
  });
}

int64_t moec_app_chat_with_tools(int64_t artifact, const char* tools, const moec_app_turn* turns, int64_t count, int32_t* ids,
                                 int64_t capacity) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    const GivenTurns given(tools, turns, count);
    return written(found->chat(given.tools, given.turns), ids, capacity);
  });
}

int64_t moec_app_fitting_chat(int64_t artifact, const char* tools, const moec_app_turn* turns, int64_t count, int64_t room, int32_t* ids,
                              int64_t capacity, int64_t* dropped) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    const int64_t context = found->info().context, wanted = room < 0 ? std::min<int64_t>(64, context / 4) : room;
    if (room < -1 || room >= context)
      throw Fault("room: -1, or 0 to " + std::to_string(context - 1) + ": the context holds " + std::to_string(context));
    const GivenTurns given(tools, turns, count);
    const std::vector<size_t> questions = given.questions();
    std::vector<int32_t> prompt;
    const auto fits = [&](size_t without) {  // so many of the oldest questions
      const auto left = without == 0 ? given.turns : given.without(questions[0], questions[without]);
      prompt = found->chat(given.tools, left);
      return context - static_cast<int64_t>(prompt.size()) >= std::max<int64_t>(wanted, 1);
    };
    size_t few = 0;
    if (!fits(0) && questions.size() > 1) {
      few = 1;  // the least number that suffices: a conversation of thousands of turns is rendered a dozen times
      for (size_t most = questions.size() - 1; few < most;) {
        const size_t middle = (few + most) / 2;
        if (fits(middle)) {
          most = middle;
        } else {
          few = middle + 1;
        }
      }
      fits(few);
    }
    if (static_cast<int64_t>(prompt.size()) >= context)
      throw Fault("no room for an answer: the last question and the system prompt have " + std::to_string(prompt.size()) +
                  " tokens, the context " + std::to_string(context));
    if (dropped) *dropped = few == 0 ? 0 : static_cast<int64_t>(questions[few] - questions[0]);
    return written(prompt, ids, capacity);
  });
}

int64_t moec_app_splitter(int64_t artifact, const int32_t* prompt, int64_t count, int32_t flags) {
  return guarded<int64_t>([&] {
    const auto found = artifact_of(artifact);
    if (flags & ~(MOEC_APP_SEGMENTS | MOEC_APP_TOOLS)) throw Fault("flags: unknown ones");
    return register_object(std::make_shared<OpenSplitter>(*found, ids_of(prompt, count), flags));
  });
}

int32_t moec_app_split(int64_t splitter, const char* piece, int64_t bytes) {
  return guarded<int32_t>([&] {
    const auto found = splitter_of(splitter);
    if (!piece) {
      found->finish();
      return 0;
    }
    const std::string text = text_of(piece, bytes, "piece");
    if (valid_utf8(text) != text.size()) throw Fault("piece: is not UTF-8");
    found->push(text);
    return 0;
  });
}

int32_t moec_app_next_segment(int64_t splitter, moec_app_segment* segment) {
  return guarded<int32_t>([&] {
    const auto found = splitter_of(splitter);
    check_size(segment, "segment");
    const Segment* next = found->next();
    *segment = {};
    segment->size = sizeof *segment;
    if (!next) return 0;
    segment->kind = next->kind;
    segment->text = next->text.c_str();
    segment->bytes = static_cast<int64_t>(next->text.size());
    segment->name = next->call.name.c_str();
    segment->arguments = next->call.arguments.c_str();
    return 1;
  });
}
