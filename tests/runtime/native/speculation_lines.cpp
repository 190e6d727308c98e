// Drafts and their pauses as runtime/app/speculation.h decides them, for tests/runtime/test_speculation.py: commands on stdin, a
// line of answers for each that has one.
//   draft MOST TOKEN... ;    now    stepped SECONDS    checked TOKENS SECONDS    length TOKENS DRAFTED STEPS
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "speculation.h"

int main() {
  PromptLookup lookup;
  Pays pays;
  DraftLength length;
  std::vector<int32_t> tokens;  // grows with each draft
  for (std::string command; std::cin >> command;) {
    double seconds = 0;
    int64_t count = 0;
    if (command == "draft") {
      size_t most = 0;
      std::cin >> most;
      for (std::string word; std::cin >> word && word != ";";) tokens.push_back(std::stoi(word));
      for (const int32_t token : lookup.draft(tokens, most)) std::printf("%d ", token);
      std::printf("\n");
    } else if (command == "now") {
      std::printf("%d\n", pays.now());
    } else if (command == "stepped" && std::cin >> seconds) {
      pays.stepped(seconds);
    } else if (command == "checked" && std::cin >> count >> seconds) {
      pays.checked(count, seconds);
    } else if (command == "length") {
      size_t drafted = 0;
      std::cin >> count >> drafted >> seconds;
      length.checked(count, drafted, seconds);
      std::printf("%zu\n", length.value());
    } else {
      return 1;
    }
  }
  return 0;
}
