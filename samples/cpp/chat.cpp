// A conversation with an artifact by the interface for applications (runtime/include/moec.h, docs/app.md): each line of stdin is
// a question, the answer comes piece by piece.
//
//   moec_chat FOLDER [SYSTEM [TOOLS]]      e.g.  echo "Name a city." | moec_chat build/s "Answer in one word."
//
// TOOLS is a file with definitions of tools in OpenAI's form. A call is printed as `NAME ARGUMENTS` behind `call: `, and the next
// line of stdin is what the tool answers; an empty SYSTEM is none. What the model recommends decides how tokens are chosen.
// Statistics go to stderr.
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "moec.h"

namespace {

struct Turn {
  std::string role, content;
  std::vector<std::pair<std::string, std::string>> calls;  // name and arguments
};

int fail() {
  std::fprintf(stderr, "error: %s\n", moec_app_error());
  return 1;
}

// The ids of a conversation; tools NULL: none. Empty: it failed.
std::vector<int32_t> prompt_of(int64_t model, const char* tools, const std::vector<Turn>& conversation) {
  std::vector<std::vector<moec_app_call>> calls;
  std::vector<moec_app_turn> turns;
  for (const Turn& turn : conversation) {
    calls.emplace_back();
    for (const auto& [name, arguments] : turn.calls) calls.back().push_back({name.c_str(), arguments.c_str()});
  }
  for (size_t i = 0; i < conversation.size(); ++i)
    turns.push_back({sizeof(moec_app_turn), 0, conversation[i].role.c_str(), conversation[i].content.c_str(), calls[i].data(),
                     static_cast<int64_t>(calls[i].size())});
  const auto turn_count = static_cast<int64_t>(turns.size());
  const int64_t count = moec_app_chat_with_tools(model, tools, turns.data(), turn_count, nullptr, 0);
  std::vector<int32_t> ids(static_cast<size_t>(count < 0 ? 0 : count));
  if (count < 0 || moec_app_chat_with_tools(model, tools, turns.data(), turn_count, ids.data(), count) < 0) return {};
  return ids;
}

// Shows the segments that are certain, and keeps them in the turn; false where it fails. Thinking is not shown.
bool take_segments(int64_t splitter, Turn* answer) {
  moec_app_segment part = {};
  part.size = sizeof part;
  int32_t found;
  while ((found = moec_app_next_segment(splitter, &part)) == 1) {
    if (part.kind == MOEC_APP_CALL) {
      answer->calls.emplace_back(part.name, part.arguments);
      std::printf("call: %s %s\n", part.name, part.arguments);
    } else if (part.kind == MOEC_APP_TEXT) {
      answer->content.append(part.text, static_cast<size_t>(part.bytes));
      std::fwrite(part.text, 1, static_cast<size_t>(part.bytes), stdout);
    }
  }
  return found == 0 && std::fflush(stdout) == 0;
}

// Computes the answer to a prompt and shows it; false where it fails.
bool answer_to(int64_t model, int64_t session, const std::vector<int32_t>& prompt, bool tools, Turn* answer) {
  moec_app_options options = {};
  options.size = sizeof options;
  if (moec_app_defaults(model, &options) < 0) return false;
  const auto count = static_cast<int64_t>(prompt.size());
  options.segments = tools ? MOEC_APP_SEGMENTS | MOEC_APP_TOOLS : 0;
  const int64_t splitter = tools ? moec_app_splitter(model, prompt.data(), count, options.segments) : 0;
  const int64_t generation = moec_app_generate(session, prompt.data(), count, &options);
  if (splitter < 0 || generation < 0) return false;
  const char* piece = nullptr;
  int64_t bytes = 0;
  int32_t found;
  while ((found = moec_app_next(generation, &piece, &bytes)) == 1) {
    if (tools) {
      if (moec_app_split(splitter, piece, bytes) < 0 || !take_segments(splitter, answer)) return false;
      continue;
    }
    answer->content.append(piece, static_cast<size_t>(bytes));
    std::fwrite(piece, 1, static_cast<size_t>(bytes), stdout);
    if (std::fflush(stdout) != 0) return false;
  }
  if (found < 0) return false;
  if (tools && (moec_app_split(splitter, nullptr, 0) < 0 || !take_segments(splitter, answer))) return false;
  std::printf("\n");
  moec_app_stats stats = {};
  stats.size = sizeof stats;
  if (moec_app_stats_of(generation, &stats) < 0) return false;
  std::fprintf(stderr, "%" PRId64 " tokens of the prompt, %" PRId64 " of them held already; %" PRId64 " new in %.2f s, of %" PRId64
               " drafted ones %" PRId64 " accepted\n", stats.prompt_tokens, stats.reused_tokens, stats.new_tokens,
               stats.decode_seconds, stats.drafted_tokens, stats.accepted_tokens);
  moec_app_close(generation);
  if (tools) moec_app_close(splitter);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: %s FOLDER [SYSTEM [TOOLS]]\n", argv[0]);
    return 2;
  }
  std::stringstream tools;
  if (argc == 4 && !(tools << std::ifstream(argv[3]).rdbuf())) {
    std::fprintf(stderr, "error: %s: cannot be read, or is empty\n", argv[3]);
    return 2;
  }
  const std::string definitions = tools.str();
  const int64_t model = moec_app_open(argv[1], nullptr);
  if (model < 0) return fail();
  const int64_t session = moec_app_session(model);
  if (session < 0) return fail();
  std::vector<Turn> conversation;
  if (argc >= 3 && *argv[2] != '\0') conversation.push_back({"system", argv[2], {}});
  size_t calls = 0;  // that wait for an answer
  for (std::string line; std::getline(std::cin, line);) {
    conversation.push_back({calls > 0 ? "tool" : "user", line, {}});
    if (calls > 0 && --calls > 0) continue;
    const std::vector<int32_t> prompt = prompt_of(model, argc == 4 ? definitions.c_str() : nullptr, conversation);
    if (prompt.empty()) return fail();
    Turn answer = {"assistant", "", {}};
    if (!answer_to(model, session, prompt, argc == 4, &answer)) return fail();
    calls = answer.calls.size();
    conversation.push_back(std::move(answer));
  }
  moec_app_close(session);
  moec_app_close(model);
  return 0;
}
