// A conversation with an artifact by the interface for applications (runtime/include/moec.h, docs/app.md): each line of stdin is
// a question, the answer comes piece by piece.
//
//   moec_chat FOLDER [SYSTEM]      e.g.  echo "Name a city." | moec_chat build/s "Answer in one word."
//
// What the model recommends decides how tokens are chosen. Statistics go to stderr.
#include <cinttypes>
#include <cstdio>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "moec.h"

namespace {

int32_t show(void* answer, const char* piece, int64_t bytes) {
  const auto size = static_cast<size_t>(bytes);
  static_cast<std::string*>(answer)->append(piece, size);
  std::fwrite(piece, 1, size, stdout);
  return std::fflush(stdout);
}

int fail() {
  std::fprintf(stderr, "error: %s\n", moec_app_error());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: %s FOLDER [SYSTEM]\n", argv[0]);
    return 2;
  }
  const int64_t model = moec_app_open(argv[1], nullptr);
  if (model < 0) return fail();
  const int64_t session = moec_app_session(model);
  if (session < 0) return fail();
  std::vector<std::pair<std::string, std::string>> turns;  // role and content
  if (argc == 3) turns.emplace_back("system", argv[2]);
  for (std::string line; std::getline(std::cin, line);) {
    turns.emplace_back("user", line);
    std::vector<moec_app_message> messages;
    for (const auto& [role, content] : turns) messages.push_back({role.c_str(), content.c_str()});
    const auto turn_count = static_cast<int64_t>(messages.size());
    const int64_t count = moec_app_chat(model, messages.data(), turn_count, nullptr, 0);
    if (count < 0) return fail();
    std::vector<int32_t> prompt(static_cast<size_t>(count));
    if (moec_app_chat(model, messages.data(), turn_count, prompt.data(), count) < 0) return fail();

    const int64_t generation = moec_app_generate(session, prompt.data(), count, nullptr);
    std::string answer;
    moec_app_stats stats = {};
    stats.size = sizeof stats;
    if (generation < 0 || moec_app_run(generation, show, &answer) < 0 || moec_app_stats_of(generation, &stats) < 0) return fail();
    std::printf("\n");
    std::fprintf(stderr, "%" PRId64 " tokens of the prompt, %" PRId64 " of them held already; %" PRId64 " new in %.2f s, of %" PRId64
                 " drafted ones %" PRId64 " accepted\n", stats.prompt_tokens, stats.reused_tokens, stats.new_tokens,
                 stats.decode_seconds, stats.drafted_tokens, stats.accepted_tokens);
    moec_app_close(generation);
    turns.emplace_back("assistant", std::move(answer));
  }
  moec_app_close(session);
  moec_app_close(model);
  return 0;
}
