// How a text is changed and cut into pieces, by the steps of a text.moec: expressions run on a small backtracking machine.
#ifndef MOEC_TEXT_STEPS_H_
#define MOEC_TEXT_STEPS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "text_tables.h"

// A text as code points, and where its pieces end. at_start: it begins where the whole text does.
struct Pieces {
  std::vector<uint32_t> codes;
  std::vector<size_t> ends;
  bool at_start = false;
};

class TextSteps {
 public:
  explicit TextSteps(const TextTables& tables) : tables_(tables) {}
  // "" or why it cannot be applied to this text.
  std::string apply(const Step& step, Pieces* pieces) const;
  bool in_set(int32_t set, uint32_t code) const;

 private:
  struct Matching;
  int64_t match(Matching* state, int32_t begin, size_t at, int depth) const;
  void prefix(const Step& step, Pieces* pieces) const;
  std::string whole(const Step& step, std::vector<uint32_t>* codes) const;
  void mapped(const Step& step, std::vector<uint32_t>* codes) const;

  const TextTables& tables_;
};

#endif  // MOEC_TEXT_STEPS_H_
